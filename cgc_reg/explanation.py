"""What an explainer is, the heatmap operator g: a function (model, x, target) -> :class:`Explanation`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cgc_reg.model.processes import reach_all_parameters
from cgc_reg.model.sharded import is_sharded
from cgc_reg.model.trainability import check_trainable
from cgc_reg.model.wrappers import data_parallel


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one pass of a model showed.

    Attributes:
        heatmap: g(x), (n, h, w), in the graph: a loss on it trains the model.
        logits: of the images, (n, k), in the same graph, for the cross-entropy.
        target: what the heatmap explains: a class of each image, (n,), or weights of the scores, (n, k).
        output: what the model returned, for a loss that needs more than logits.
    """

    heatmap: Tensor
    logits: Tensor
    target: Tensor
    output: Any = None


class Explainer(Protocol):
    """Anything that makes an :class:`Explanation`: :class:`GradCAM` and its like, or a function of your own.

    It is called as ``explainer(model, x, target)``: a model, perhaps wrapped; images (n, c, h, w); and what to explain,
    classes (n,), None for the predicted ones, or weights (n, k) if you pass these. Its heatmap must be in the graph of
    the model's parameters, so inner gradients need ``create_graph=True``.

    Example:
        >>> def input_gradient(model, x, target):
        ...     x = x.detach().requires_grad_()
        ...     logits = model(x)
        ...     target = logits.argmax(dim=1) if target is None else target
        ...     score = logits.gather(1, target[:, None]).sum()
        ...     (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        ...     return Explanation(gradient.abs().sum(dim=1), logits, target)
        >>> reg = CGCRegularizer(input_gradient)
    """

    def __call__(self, model: nn.Module, x: Tensor, target: Tensor | None, /) -> Explanation:
        """Explain the model's scores for x."""


def in_its_graph(seen: Explanation, model: nn.Module, x: Tensor, layer_output: Tensor | None = None) -> Explanation:
    """Return an explanation whose backward trains something, or that has none.

    Args:
        seen: of a pass.
        model, x: of the pass.
        layer_output: of a pass of ours, see :func:`check_trainable`.
    """
    if not torch.is_grad_enabled() or not check_trainable(seen.heatmap, model, x, layer_output):
        # Such a pass still builds a graph from the layer upward, for the inner gradient. A loss in it would have a
        # backward that does nothing, in silence.
        output = tree_map_only(Tensor, Tensor.detach, seen.output)
        return Explanation(seen.heatmap.detach(), seen.logits.detach(), seen.target, output)
    if data_parallel(model) is not None or is_sharded(model):
        return replace(seen, heatmap=reach_all_parameters(seen.heatmap, seen.logits))
    return seen
