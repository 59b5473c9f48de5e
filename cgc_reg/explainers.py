"""The explainers that look at one layer of a model: a pass, and a rule from the layer's activation to a heatmap.

They are values: they hold names and functions, and neither a model nor a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from cgc_reg._checks import check_function, check_images, describe
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg._targets import Target, as_target, target_of
from cgc_reg.explanation import Explainer, Explanation, in_its_graph
from cgc_reg.model.checkpoints import has_reentrant_checkpoint
from cgc_reg.model.compilation import compiled_exposed_layer
from cgc_reg.model.extra import is_extra_pass
from cgc_reg.model.gradient import score_gradient
from cgc_reg.model.head import head_weight
from cgc_reg.model.inference import ordinary, outside_inference_mode
from cgc_reg.model.layers import find_layer
from cgc_reg.model.mixing import warn_if_images_mix
from cgc_reg.model.passes import ForwardPass, exposed_pass, forward_pass
from cgc_reg.model.processes import is_sharded, warn_if_bypassed
from cgc_reg.model.reuse import find_kept_pass, keep_passes
from cgc_reg.model.suggest import suggest_target_layer
from cgc_reg.model.wrappers import data_parallel, unwrap
from cgc_reg.rules import HeatmapRule, class_activation, grad_cam, hires_cam, layer_cam, positive_grad_cam


@dataclass(frozen=True, repr=False)
class AtLayer:
    """What the explainers share that look at one layer.

    Attributes:
        target_layer: dotted name of the layer, as in ``model.named_modules()``: the last one with a map, ``"layer4"``
            in a ResNet. Or the layer itself, which must be the model's own. None: that of
            :func:`suggest_target_layer`, which takes a pass more in each call.
        output_fn: from the model's output to logits (n, k); by default the output itself, its ``logits``, or the only
            tensor of that shape in a tuple.
        reshape_transform: from the layer's output to (n, c, h, w), for tokens or channels last.
    """

    target_layer: str | nn.Module | None
    _: KW_ONLY
    output_fn: Callable[[Any], Tensor] | None = None
    reshape_transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        layer = self.target_layer
        if layer is not None and not isinstance(layer, nn.Module) and (not isinstance(layer, str) or not layer):
            raise ValueError(
                f"`target_layer` must be the dotted name of a layer, the layer itself, or None; got {describe(layer)}. "
                "Names: `dict(model.named_modules())`."
            )
        check_function("output_fn", self.output_fn)
        check_function("reshape_transform", self.reshape_transform)

    def __call__(self, model: nn.Module, x: Tensor, target: Target | None = None) -> Explanation:
        r"""Run the model on x, once, and explain its scores.

        It is a pass as ``model(x)``, in the mode that the model is in: with gradients on for training, and under
        ``torch.no_grad()`` as a measure.

        Args:
            model: the model, wrapped or not.
            x: images (n, c, h, w), as the model takes them.
            target: class of each image, (n,), or one for all; or weights w of the scores, (n, k), for the heatmap of
                the score :math:`\sum_k w_k y_k`: labels of several classes, or +1 and -1 for what tells two apart. The
                predicted class if None.

        Returns:
            Heatmaps on the layer's grid, and what the model returned.

        Raises:
            ValueError, TypeError: an argument is not as described.
            RuntimeError: the layer was not called, or the heatmap would train nothing.
        """
        check_images("x", x)
        with outside_inference_mode():
            x, target = ordinary(x), as_target(ordinary(target), len(x), x.device)
            g = self.with_layer(model, x)
            made = g._pass(model, x)
            target = target_of(target, made.logits)
            heatmap = at_least_float32(g._heatmap(unwrap(model), made, target))
            if torch.is_grad_enabled():
                name, _ = g._find_layer(model)
                warn_if_images_mix(unwrap(model), name, made.layer_output, made.inner_logits)
            return in_its_graph(Explanation(heatmap, made.logits, target, made.output), model, x)

    def with_layer(self, model: nn.Module, x: Tensor) -> Self:
        """Return this explainer with its layer: where it has none, that of :func:`suggest_target_layer`."""
        return self if self.target_layer is not None else replace(self, target_layer=self._suggest(model, x))

    def _suggest(self, model: nn.Module, x: Tensor) -> str:
        return suggest_target_layer(model, x)

    def reuse(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let this explainer use the loop's own pass over x: no pass of its own, with both lines as they are.

        What is reused is a pass of this model over this very tensor alone, ``model(x)`` or ``model(pixel_values=x)``,
        made inside the ``with`` block with gradients on. Everything else is computed as ever: other tensors, copies of
        x; a pass since which x, its output, the weights or what is frozen of them, the training mode or autocast have
        changed, or an optimizer has made a step (``weight.data.copy_`` is a change that PyTorch shows to nobody, and
        buffers are not looked at); compiled models. The passes are kept until the block ends, so open one for each
        step. Both lines share a graph: sum the losses before the backward.

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
        return self.target_layer is not None and self._kept_pass(model, x) is not None

    def __repr__(self) -> str:
        layer = f"<{type(self.target_layer).__name__}>" if isinstance(self.target_layer, nn.Module) else None
        options = [f"{name}={value!r}" for name, value in self._options().items() if value is not None]
        return f"{type(self).__name__}({', '.join([layer or repr(self.target_layer), *options])})"

    def _options(self) -> dict[str, object]:
        return {"output_fn": self.output_fn, "reshape_transform": self.reshape_transform}

    def _pass(self, model: nn.Module, x: Tensor) -> ForwardPass:
        kept = self._kept_pass(model, x)
        if kept is not None:
            return kept
        if data_parallel(model) is None and not is_extra_pass():
            warn_if_bypassed(unwrap(model))
        name, _ = self._find_layer(model)
        return forward_pass(model, x, name, self.output_fn)

    def _kept_pass(self, model: nn.Module, x: Tensor) -> ForwardPass | None:
        assert self.target_layer is not None  # see `with_layer`; says so to the type checker
        return find_kept_pass(model, x, self.target_layer, self.output_fn)

    def _find_layer(self, model: nn.Module) -> tuple[str, nn.Module]:
        assert self.target_layer is not None  # see `with_layer`; says so to the type checker
        return find_layer(unwrap(model), self.target_layer)

    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        raise NotImplementedError

    def _activation(self, made: ForwardPass, batch_size: int) -> Tensor:
        if made.channels_last and self.reshape_transform is None:
            raise ValueError(
                "`target_layer` must put out maps of shape (n, c, h, w); got channels last, "
                f"{describe(made.layer_output)}, from {self._said_layer()}. Pass "
                "`reshape_transform=channels_last_to_maps`."
            )
        activation = at_least_float32(self._maps(made.layer_output))
        if len(activation) != batch_size:
            raise ValueError(
                f"`target_layer` must put out one map for each of the {batch_size} images; got {describe(activation)} "
                f"from {self._said_layer()}. Name a layer outside of what changes the batch, or do that outside of the "
                "model."
            )
        return activation

    def _maps(self, layer_output: Tensor) -> Tensor:
        maps = layer_output if self.reshape_transform is None else self.reshape_transform(layer_output)
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            whose = (
                "`target_layer` must put out" if self.reshape_transform is None else "`reshape_transform` must return"
            )
            repair = (
                "Name a layer in front of the pooling."
                if layer_output.ndim == 2
                else "For tokens (n, t, c) pass `reshape_transform=TokensToMaps((h, w))`, for channels last "
                "`reshape_transform=channels_last_to_maps`."
            )
            raise ValueError(
                f"{whose} maps of shape (n, c, h, w); got {describe(maps)} from {self._said_layer()}. {repair}"
            )
        return maps

    def _said_layer(self) -> str:
        layer = self.target_layer
        return f"the {type(layer).__name__}" if isinstance(layer, nn.Module) else repr(layer)


@dataclass(frozen=True, repr=False)
class LayerExplainer(AtLayer):
    r"""Explain by a rule of your own: a function of a layer's activation A and of the score's gradient dy/dA.

    Args:
        target_layer: dotted name of the layer, the layer itself, or None for that of :func:`suggest_target_layer`.
        rule: from activation and gradient, (n, c, h, w), to heatmaps (n, h, w).
        output_fn: from the model's output to logits (n, k); by default the output itself, its ``logits``, or the only
            tensor of that shape in a tuple.
        reshape_transform: from the layer's output to (n, c, h, w), for tokens or channels last.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Example:
        >>> def norm(activation, gradient):
        ...     return (activation * gradient).norm(dim=1)
        >>> g = LayerExplainer("layer4", norm)
        >>> g(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])
    """

    rule: HeatmapRule

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.rule):
            raise TypeError(
                f"`rule` must be a function from activation and gradient to heatmaps; got {describe(self.rule)}."
            )

    @override
    def _options(self) -> dict[str, object]:
        return {"rule": self.rule} | super()._options() if type(self) is LayerExplainer else super()._options()

    @override
    def _pass(self, model: nn.Module, x: Tensor) -> ForwardPass:
        if torch.is_grad_enabled() and is_sharded(model):
            raise ValueError(
                "The explainer must be CAM to train a model that is sharded by `fully_shard`: the inner gradient of "
                f"others makes it free its weights too early; got {type(self).__name__}. Take CAM, or "
                "DistributedDataParallel."
            )
        return super()._pass(model, x)

    @override
    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        activation = self._activation(made, len(target))
        gradient = score_gradient(made.inner_logits, made.layer_output, target, create_graph=torch.is_grad_enabled())
        if gradient is None:
            repair = (
                "It lies inside a reentrant checkpoint, which hides it from autograd: checkpoint with "
                "`use_reentrant=False`."
                if has_reentrant_checkpoint(made.inner_logits)
                else "Name a layer on the path to them, or pass an `output_fn` that returns the logits it leads to."
            )
            raise RuntimeError(
                f"`target_layer` must lead to the logits; got {self._said_layer()}, on whose output they do not "
                f"depend. {repair}"
            )
        with without_autocast(activation):
            heatmap = self.rule(activation, self._maps(gradient))
        n, _, height, width = activation.shape
        if not isinstance(heatmap, Tensor) or heatmap.ndim != 3 or len(heatmap) != n:
            raise ValueError(
                f"`rule` must return heatmaps of shape (n, h, w), here ({n}, {height}, {width}); got "
                f"{describe(heatmap)}."
            )
        return heatmap


@dataclass(frozen=True, repr=False)
class GradCAM(LayerExplainer):
    """Explain by :func:`grad_cam`: each channel weighed by its mean gradient.

    Args:
        target_layer: dotted name of the layer, as in ``model.named_modules()``: the last one with a map, ``"layer4"``
            in a ResNet. Or the layer itself, which must be the model's own. None: that of
            :func:`suggest_target_layer`, which takes a pass more in each call.
        output_fn: from the model's output to logits (n, k); by default the output itself, its ``logits``, or the only
            tensor of that shape in a tuple.
        reshape_transform: from the layer's output to (n, c, h, w), for tokens or channels last.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Example:
        >>> model, x = torchvision.models.resnet18(num_classes=10), torch.rand(2, 3, 64, 64)
        >>> y, boring = torch.tensor([3, 7]), torch.ones(2, 2, 2)
        >>> seen = GradCAM("layer4")(model, x, target=y)
        >>> loss = F.cross_entropy(seen.logits, y) + 0.1 * (seen.heatmap * boring).mean()
        >>> loss.backward()

    References:
        Selvaraju et al., Grad-CAM (ICCV 2017).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: grad_cam)


@dataclass(frozen=True, repr=False)
class HiResCAM(LayerExplainer):
    """Explain by :func:`hires_cam`: each value weighed by its own gradient. Arguments as for :class:`GradCAM`.

    Example:
        >>> HiResCAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])

    References:
        Draelos and Carin, HiResCAM (2020, arXiv 2011.08891).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: hires_cam)


@dataclass(frozen=True, repr=False)
class LayerCAM(LayerExplainer):
    """Explain by :func:`layer_cam`: each value weighed by its positive gradient. Arguments as for :class:`GradCAM`.

    Example:
        >>> LayerCAM("layer3")(torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 4, 4])

    References:
        Jiang et al., LayerCAM (IEEE Transactions on Image Processing, 2021).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: layer_cam)


@dataclass(frozen=True, repr=False)
class PositiveGradCAM(LayerExplainer):
    """Explain by :func:`positive_grad_cam`: each channel weighed by its mean positive gradient.

    Arguments as for :class:`GradCAM`.

    Example:
        >>> PositiveGradCAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: positive_grad_cam)


@dataclass(frozen=True, repr=False)
class CAM(AtLayer):
    """Explain by :func:`class_activation`: each channel weighed by the linear head's weight, in closed form.

    It needs no inner gradient, and is right only where global average pooling and one linear layer follow the target
    layer: see :func:`check_closed_form`.

    Args:
        target_layer, output_fn, reshape_transform: as for :class:`GradCAM`.
        head: dotted name of the linear layer that is read; None: the only one that fits.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Example:
        >>> CAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])

    References:
        Zhou et al., Learning Deep Features for Discriminative Localization (CVPR 2016), equation 2.
    """

    head: str | None = field(default=None, kw_only=True)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None and not isinstance(self.head, str):
            raise TypeError(f"`head` must be the dotted name of a linear layer, or None; got {describe(self.head)}.")

    @override
    def _suggest(self, model: nn.Module, x: Tensor) -> str:
        exposed = compiled_exposed_layer(model)
        return super()._suggest(model, x) if exposed is None else exposed.target_layer

    @override
    def _options(self) -> dict[str, object]:
        return {"head": self.head} | super()._options()

    @override
    def _pass(self, model: nn.Module, x: Tensor) -> ForwardPass:
        exposed = compiled_exposed_layer(model)
        if exposed is None:
            return super()._pass(model, x)
        name, _ = self._find_layer(model)
        if name != find_layer(unwrap(model), exposed.target_layer)[0]:
            raise ValueError(
                f"`target_layer` must be the layer that the compiled model exposes, {exposed.target_layer!r}; got "
                f"{name!r}. Compile `expose_layer(model, {name!r})`."
            )
        return exposed_pass(model, x, exposed, self.output_fn)

    @override
    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        activation = self._activation(made, len(target))
        weight = head_weight(model, self.head, channels=activation.shape[1], classes=made.logits.shape[1])
        return class_activation(activation, weight.to(activation.dtype), target)


def as_explainer(explainer: Explainer | str | None) -> Explainer:
    """Return an explainer; a layer's name, or None, is short for that layer's :class:`GradCAM`."""
    if explainer is None or isinstance(explainer, str):
        return GradCAM(explainer)
    if isinstance(explainer, nn.Module):
        raise TypeError(
            f"`explainer` must be an explainer, a layer's name or None; got {describe(explainer)}. For a layer pass "
            "`GradCAM(layer)`; for a module that explains, its `forward`."
        )
    if isinstance(explainer, type) or not callable(explainer):
        raise TypeError(
            f"`explainer` must be an explainer, a layer's name or None; got {describe(explainer)}. Pass one such as "
            '`GradCAM("layer4")`, or a function (model, x, target) -> Explanation.'
        )
    return explainer


def explained(explainer: Explainer, model: nn.Module, x: Tensor, target: Tensor | None) -> Explanation:
    """Call an explainer; of one that is not of this module, make sure of what it returns.

    Args:
        explainer: whichever.
        model, x: as for calling it.
        target: of :func:`as_target`.
    """
    if isinstance(explainer, AtLayer):
        return explainer(model, x, target)
    with torch.enable_grad():  # for its inner gradient
        seen = explainer(model, x, target)
    if not isinstance(seen, Explanation):
        raise TypeError(f"The explainer must return an Explanation; got {describe(seen)}.")
    heatmap, logits, n = seen.heatmap, seen.logits, len(x)
    if not isinstance(heatmap, Tensor) or heatmap.ndim != 3 or len(heatmap) != n or not heatmap.is_floating_point():
        raise ValueError(f"The explainer must return heatmaps of shape ({n}, h, w); got {describe(heatmap)}.")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        raise ValueError(f"The explainer must return logits of shape ({n}, classes); got {describe(logits)}.")
    if seen.target is None:
        raise TypeError("The explainer must return the target that it explained; got None.")
    target = target_of(as_target(seen.target, n, logits.device), logits)
    return in_its_graph(Explanation(at_least_float32(heatmap), logits, target, seen.output), model, x)
