"""The explainers that look at one layer of a model: a pass, and a rule from the layer's activation to a heatmap.

They are values: they hold names and functions, and neither a model nor a tensor (a layer at most, where it is given).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgc_reg._at_layer import AtLayer
from cgc_reg._checks import describe
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg._targets import as_target, target_of
from cgc_reg.explanation import Explainer, Explanation, in_its_graph
from cgc_reg.model.attention import unfused_attention
from cgc_reg.model.checkpoints import has_reentrant_checkpoint
from cgc_reg.model.compilation import compiled_exposed_layer, uncompiled, warn_if_compiled
from cgc_reg.model.given import ordinary
from cgc_reg.model.gradient import score_gradient
from cgc_reg.model.head import head_weight
from cgc_reg.model.layers import find_layer
from cgc_reg.model.maps import activation_maps, as_maps
from cgc_reg.model.measure import as_without_gradients
from cgc_reg.model.passes import ForwardPass, exposed_pass
from cgc_reg.model.processes import is_sharded
from cgc_reg.model.turns import in_turn
from cgc_reg.model.wrappers import data_parallel, unwrap, warn_if_one_device
from cgc_reg.rules import HeatmapRule, class_activation, grad_cam, hires_cam, layer_cam, positive_grad_cam


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
        activation = activation_maps(made, self.reshape_transform)
        gradient = score_gradient(made.inner_logits, made.layer_output, target, create_graph=torch.is_grad_enabled())
        if gradient is None:
            repair = (
                "It lies inside a reentrant checkpoint, which hides it from autograd: checkpoint with "
                "`use_reentrant=False`."
                if has_reentrant_checkpoint(made.inner_logits)
                else "Name a layer on the path to them, or pass an `output_fn` that returns the logits it leads to."
            )
            raise RuntimeError(
                f"`target_layer` must lead to the logits; got {made.target_layer!r}, on whose output they do not "
                f"depend. {repair}"
            )
        with without_autocast(activation):
            heatmap = self.rule(activation, as_maps(gradient, self.reshape_transform, made.target_layer))
        n, _, height, width = activation.shape
        if not isinstance(heatmap, Tensor) or heatmap.ndim != 3 or len(heatmap) != n:
            raise ValueError(
                f"`rule` must return heatmaps of shape (n, h, w), here ({n}, {height}, {width}); got "
                f"{describe(heatmap)}."
            )
        return heatmap


@dataclass(frozen=True, repr=False)
class GradCAM(LayerExplainer):
    r"""Explain by :func:`grad_cam`: each channel weighed by its mean gradient.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \alpha_c A_c\Big), \qquad
              \alpha_c = \frac{1}{hw} \sum_{uv} \frac{\partial y}{\partial A_{cuv}}

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
        >>> y, background = torch.tensor([3, 7]), torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
        >>> seen = GradCAM("layer4")(model, x, target=y)
        >>> loss = F.cross_entropy(seen.logits, y) + 0.1 * (seen.heatmap * background).mean()
        >>> loss.backward()

    References:
        Selvaraju et al., Grad-CAM (ICCV 2017).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: grad_cam)


@dataclass(frozen=True, repr=False)
class HiResCAM(LayerExplainer):
    r"""Explain by :func:`hires_cam`: each value weighed by its own gradient.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \frac{\partial y}{\partial A_c} \odot A_c\Big)

    Arguments and errors are those of :class:`GradCAM`.

    Example:
        >>> HiResCAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])

    References:
        Draelos and Carin, HiResCAM (2020, arXiv 2011.08891).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: hires_cam)


@dataclass(frozen=True, repr=False)
class LayerCAM(LayerExplainer):
    r"""Explain by :func:`layer_cam`: each value weighed by its own gradient where that is positive.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \mathrm{ReLU}\Big(\frac{\partial y}{\partial A_c}\Big) \odot A_c\Big)

    Arguments and errors are those of :class:`GradCAM`.

    Example:
        >>> LayerCAM("layer3")(torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 4, 4])

    References:
        Jiang et al., LayerCAM (IEEE Transactions on Image Processing, 2021).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: layer_cam)


@dataclass(frozen=True, repr=False)
class PositiveGradCAM(LayerExplainer):
    r"""Explain by :func:`positive_grad_cam`: each channel weighed by the mean of its positive gradients.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \alpha_c A_c\Big), \qquad
              \alpha_c = \frac{1}{hw} \sum_{uv} \mathrm{ReLU}\Big(\frac{\partial y}{\partial A_{cuv}}\Big)

    Arguments and errors are those of :class:`GradCAM`.

    Example:
        >>> PositiveGradCAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: positive_grad_cam)


@dataclass(frozen=True, repr=False)
class CAM(AtLayer):
    r"""Explain by :func:`class_activation`: each channel weighed by the linear head's weight, in closed form.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_{kc} A_c\Big)

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
        name, _ = find_layer(unwrap(model), self._layer)
        if name != find_layer(unwrap(model), exposed.target_layer)[0]:
            raise ValueError(
                f"`target_layer` must be the layer that the compiled model exposes, {exposed.target_layer!r}; got "
                f"{name!r}. Compile `expose_layer(model, {name!r})`."
            )
        return exposed_pass(model, ordinary(x), exposed, self.output_fn)

    @override
    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        activation = activation_maps(made, self.reshape_transform)
        channels, classes = activation.shape[1], made.logits.shape[1]
        weight = head_weight(model, self.head, channels=channels, classes=classes, used=made.weights)
        with without_autocast(activation):
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
    """Call an explainer; one that is not of this module gets what ours have, and what it returns is checked.

    Args:
        explainer: ours or the user's.
        model, x: as for calling it.
        target: of :func:`as_target`.
    """
    if isinstance(explainer, AtLayer):
        return explainer(model, x, target)
    warn_if_compiled(model)
    warn_if_one_device(model)
    parallel = data_parallel(model)
    if parallel is not None and parallel.static_graph and torch.is_grad_enabled():
        raise RuntimeError(
            "The explainer must be one of one layer, such as GradCAM, under DistributedDataParallel with "
            f"`static_graph=True`; got {describe(explainer)}, whose inner gradient would pass for the end of the step. "
            "Leave out `static_graph=True`."
        )
    measuring = nullcontext() if torch.is_grad_enabled() else as_without_gradients()
    # Its inner gradient needs a graph, and what can be differentiated twice.
    with in_turn(model), measuring, torch.enable_grad(), uncompiled(model), unfused_attention():
        seen = explainer(unwrap(model) if parallel is None else parallel, ordinary(x), target)
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
    if torch.is_grad_enabled() and heatmap.requires_grad and not logits.requires_grad:
        raise RuntimeError(
            "The explainer must return logits in the graph, since a cross-entropy on them would train nothing; got "
            "some without. Take them from a pass with gradients, and do not detach them."
        )
    return in_its_graph(Explanation(at_least_float32(heatmap), logits, target, seen.output), model, x)
