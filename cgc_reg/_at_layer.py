"""What the explainers share that look at one layer of a model: the pass, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cgc_reg._checks import check_function, check_images
from cgc_reg._precision import at_least_float32
from cgc_reg._targets import Target, as_target, target_of
from cgc_reg.explanation import Explanation, in_its_graph
from cgc_reg.model.extra import is_extra_pass
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.layers import check_layer
from cgc_reg.model.passes import ForwardPass, forward_pass
from cgc_reg.model.path import look_at_path
from cgc_reg.model.processes import warn_if_wrapper_is_bypassed
from cgc_reg.model.reuse import find_kept_pass, keep_passes
from cgc_reg.model.suggest import suggest_target_layer
from cgc_reg.model.turns import in_turn
from cgc_reg.model.wrappers import data_parallel, unwrap


@dataclass(frozen=True, repr=False)
class AtLayer:
    """What the explainers share that look at one layer; its arguments are those of ``GradCAM``."""

    target_layer: str | nn.Module | None
    _: KW_ONLY
    output_fn: Callable[[Any], Tensor] | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_layer(self.target_layer, or_none=True)
        check_function("output_fn", self.output_fn)
        check_function("reshape_transform", self.reshape_transform)

    def __call__(self, model: nn.Module, x: Tensor, target: Target | None = None) -> Explanation:
        r"""Run the model on x, once, and explain its scores.

        It is a pass as ``model(x)``, in the mode that the model is in: in training BatchNorm's running statistics move,
        and under ``torch.no_grad()`` the heatmap is a measure without a graph.

        Args:
            model: the model, wrapped or not.
            x: images (n, c, h, w), as the model takes them.
            target: class of each image, (n,), a list of these, or one for all; or weights w of the scores, (n, k), for
                the heatmap of the score :math:`\sum_k w_k y_k`: several labels as 0 and 1, or +1 and -1 for what tells
                two classes apart. The predicted class if None.

        Returns:
            Heatmaps on the layer's grid, and what the model returned.

        Raises:
            ValueError, TypeError: an argument is not as described.
            RuntimeError: the layer was not called, or the heatmap would train nothing.
        """
        check_images("x", x)
        with outside_inference_mode(), in_turn(model):
            target = as_target(ordinary(target), len(x), x.device)
            g = self.with_layer(model, x)
            made = g._pass(model, x)
            target = target_of(target, ordinary(made.logits))
            heatmap = at_least_float32(g._heatmap(unwrap(model), made, target))
            if torch.is_grad_enabled():
                look_at_path(unwrap(model), made, heatmap, of_maps=g.reshape_transform is None)
            seen = Explanation(heatmap, made.logits, target, made.output)
            return in_its_graph(seen, model, x, made.layer_output)

    def with_layer(self, model: nn.Module, x: Tensor) -> Self:
        """Return this explainer with its layer: where it has none, that of :func:`suggest_target_layer`."""
        return self if self.target_layer is not None else replace(self, target_layer=self._suggest(model, x))

    def _suggest(self, model: nn.Module, x: Tensor) -> str:
        return suggest_target_layer(model, x)

    def reuse(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let this explainer use the loop's own pass ``model(x)``, instead of making one.

        What is reused is a pass of this model over this very tensor alone, ``model(x)`` or ``model(pixel_values=x)``,
        made inside the ``with`` block with gradients on. In all other cases the explainer makes its own pass as ever:

        - for another tensor, or a copy of x;
        - for a compiled model;
        - where x, the output, a weight or what is frozen, the training mode or autocast has changed since the pass, or
          an optimizer has made a step. ``weight.data.copy_`` is a change that PyTorch shows to nobody, and buffers and
          attributes are not looked at;
        - where the layer and all below it is frozen, since its output has no graph then;
        - for a pass of another thread.

        The passes are kept until the block ends, so open one for each step. The loop's line and the explainer's share a
        graph: sum the losses before the backward.

        Args:
            model: the model being trained, wrapped or not.

        Raises:
            ValueError: ``target_layer`` is None, so that the layer is not known before the pass.

        Example:
            >>> model, x = torchvision.models.resnet18(num_classes=10), torch.rand(2, 3, 64, 64)
            >>> g = GradCAM("layer4")
            >>> with g.reuse(model):
            ...     logits = model(x)
            ...     heatmap = g(model, x).heatmap
        """
        if self.target_layer is None:
            raise ValueError(
                "`target_layer` must be named to reuse passes, since the layer is watched from the first one on; got "
                "None. Pass `suggest_target_layer(model, x)`."
            )
        return keep_passes(model, self.target_layer)

    def reuses(self, model: nn.Module, x: Tensor) -> bool:
        """Tell whether a pass over x is there to be reused."""
        return self.target_layer is not None and find_kept_pass(model, x, self.target_layer, self.output_fn) is not None

    def __repr__(self) -> str:
        layer = f"<{type(self.target_layer).__name__}>" if isinstance(self.target_layer, nn.Module) else None
        options = [f"{name}={value!r}" for name, value in self._options().items() if value is not None]
        return f"{type(self).__name__}({', '.join([layer or repr(self.target_layer), *options])})"

    def _options(self) -> dict[str, object]:
        return {"output_fn": self.output_fn, "reshape_transform": self.reshape_transform}

    def _pass(self, model: nn.Module, x: Tensor) -> ForwardPass:
        kept = find_kept_pass(model, x, self._layer, self.output_fn)
        if kept is not None:
            return kept
        if data_parallel(model) is None and not is_extra_pass():
            warn_if_wrapper_is_bypassed(unwrap(model))
        return forward_pass(model, ordinary(x), self._layer, self.output_fn)

    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _layer(self) -> str | nn.Module:
        assert self.target_layer is not None  # see `with_layer`; says so to the type checker
        return self.target_layer
