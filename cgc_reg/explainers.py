"""The explainers that look at one layer of a model: a pass, and a rule from the layer's activation to a heatmap.

They are values: they hold names and functions, and neither a model nor a tensor (a layer at most, where it is given).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgc_reg._at_layer import AtLayer
from cgc_reg._checked import checked
from cgc_reg._checks import describe
from cgc_reg._precision import without_autocast
from cgc_reg.explanation import Explainer, Explanation
from cgc_reg.full_grad import FullGrad
from cgc_reg.model.checkpoints import has_reentrant_checkpoint
from cgc_reg.model.compilation import compiled_exposed_layer
from cgc_reg.model.given import ordinary
from cgc_reg.model.gradient import score_gradients
from cgc_reg.model.head import head_weight
from cgc_reg.model.layers import find_layer
from cgc_reg.model.maps import activation_maps, as_maps
from cgc_reg.model.passes import ForwardPass, exposed_pass
from cgc_reg.model.wrappers import unwrap
from cgc_reg.rules import (
    HeatmapRule,
    class_activation,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    positive_grad_cam,
    xgrad_cam,
)


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
    def _heatmap(self, model: nn.Module, made: ForwardPass, target: Tensor) -> Tensor:
        activation = activation_maps(made, self.reshape_transform)
        (gradient,) = score_gradients(
            model, made.inner_logits, [made.layer_output], target, create_graph=torch.is_grad_enabled()
        )
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
            heatmap = self.rule(activation, as_maps(gradient, self.reshape_transform, made))
        expected = (len(activation), *activation.shape[2:])
        if not isinstance(heatmap, Tensor) or heatmap.ndim != len(expected) or len(heatmap) != expected[0]:
            raise ValueError(
                f"`rule` must return heatmaps of shape (n, h, w), here {expected}; got {describe(heatmap)}."
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
class GradCAMPlusPlus(LayerExplainer):
    r"""Explain by :func:`grad_cam_plus_plus`: each channel weighed by its positive gradients, for several objects.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_c A_c\Big), \qquad
              w_c = \sum_{uv} \frac{\mathrm{ReLU}(d_{cuv})}{2 + d_{cuv} \sum_{ab} A_{cab}}, \qquad
              d = \frac{\partial y}{\partial A}

    Arguments and errors are those of :class:`GradCAM`.

    Example:
        >>> GradCAMPlusPlus("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])

    References:
        Chattopadhay et al., Grad-CAM++ (WACV 2018).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: grad_cam_plus_plus)


@dataclass(frozen=True, repr=False)
class XGradCAM(LayerExplainer):
    r"""Explain by :func:`xgrad_cam`: each channel weighed by the mean gradient over what is active in it.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_c A_c\Big), \qquad
              w_c = \frac{\sum_{uv} d_{cuv} A_{cuv}}{\sum_{uv} A_{cuv}}, \qquad d = \frac{\partial y}{\partial A}

    Arguments and errors are those of :class:`GradCAM`.

    Example:
        >>> XGradCAM("layer4")(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 2, 2])

    References:
        Fu et al., Axiom-based Grad-CAM (BMVC 2020).
    """

    rule: HeatmapRule = field(init=False, default_factory=lambda: xgrad_cam)


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
    """Call an explainer, ours or the user's.

    Args:
        explainer: of :func:`as_explainer`.
        model, x: as for calling it.
        target: of :func:`as_target`.
    """
    if isinstance(explainer, (AtLayer, FullGrad)):
        return explainer(model, x, target)
    return checked(explainer, model, x, target)
