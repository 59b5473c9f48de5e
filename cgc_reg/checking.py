"""Checks to make once of a model, of what nothing else would show."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from cgc_reg._at_layer import AtLayer
from cgc_reg._checks import check_images, check_positive, describe
from cgc_reg._targets import Target, as_target
from cgc_reg.explain import explain
from cgc_reg.explainers import CAM, GradCAM, as_explainer, explained
from cgc_reg.explanation import Explainer
from cgc_reg.losses import unit_maps
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.layers import find_layer
from cgc_reg.model.wrappers import unwrap


def check_closed_form(
    model: nn.Module, x: Tensor, explainer: CAM | str | None = None, *, tolerance: float = 1e-3
) -> float:
    """Make sure that :class:`CAM` and :class:`GradCAM` agree on this model, as it is now.

    They do where global average pooling and one linear layer follow the target layer. A ReLU, a normalisation or
    another linear layer between them makes the closed form wrong, which nothing else would show. An adapter around the
    head, such as LoRA's, shows only once it has been trained for some steps. The model is in evaluation mode, so that a
    dropout between them does not show: the closed form has no mask.

    Args:
        model, x: as for :func:`explain`; some real images.
        explainer: the closed form; a layer's name is short for its :class:`CAM`.
        tolerance: largest distance allowed between the two heatmaps of an image, each scaled to length 1.

    Returns:
        The largest distance found.

    Raises:
        ValueError: the distance is above the tolerance.

    Example:
        >>> check_closed_form(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64), "layer4") < 1e-3
        True
    """
    cam = CAM(explainer) if explainer is None or isinstance(explainer, str) else explainer
    if not isinstance(cam, CAM):
        raise TypeError(f"`explainer` must be a CAM, a layer's name or None; got {describe(cam)}.")
    autograd = GradCAM(cam.target_layer, output_fn=cam.output_fn, reshape_transform=cam.reshape_transform)
    closed, differentiated = (unit_maps(explain(model, x, g)) for g in (cam, autograd))
    distance = float((closed - differentiated).norm(dim=1).max())
    if not distance <= tolerance:
        raise ValueError(
            f"CAM must agree with autograd's Grad-CAM; got a distance of {distance:.2g} between unit maps, above "
            f"{tolerance:g}. Something besides average pooling stands between the layer and the head: use GradCAM, or "
            "name the layer right before the pooling."
        )
    return distance


def check_gradient(
    model: nn.Module,
    x: Tensor,
    explainer: Explainer | str | None = None,
    target: Target | None = None,
    *,
    tolerance: float = 1e-3,
) -> float:
    r"""Make sure that a loss on heatmaps has the gradient that autograd says, by finite differences.

    Training on heatmaps takes second derivatives, and a function of the model's own may have wrong ones: a
    ``torch.autograd.Function`` whose ``backward`` uses what its ``forward`` kept aside, instead of what
    ``save_for_backward`` gives, trains in a wrong direction, and nothing says so. For S the sum of the heatmaps'
    pixels, each times a fixed random number, this compares

    .. math:: \frac{S(\theta + \epsilon v) - S(\theta - \epsilon v)}{2 \epsilon}
        \quad\text{with}\quad \langle \nabla S(\theta), v \rangle

    along the gradient and two random directions v, in which each number moves by a random multiple of its own
    derivative. A copy of the model is used, in evaluation mode and double precision.

    Args:
        model, x: as for :func:`explain`; two images are enough, and small ones take less time.
        explainer: g, as for :func:`explain`.
        target: what the heatmaps explain; the predicted class if None.
        tolerance: largest difference allowed, relative to the larger of the two values; the step is made shorter until
            it holds.

    Returns:
        The largest difference found.

    Raises:
        ValueError: it is above the tolerance.

    Example:
        >>> check_gradient(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64), "layer4") < 1e-3
        True
    """
    check_images("x", x)
    check_positive("tolerance", tolerance)
    g = as_explainer(explainer)
    if isinstance(g, AtLayer):  # whose layer, where it is given itself, is not that of a copy
        g = g.with_layer(model, x)
        name, _ = find_layer(unwrap(model), g._layer)
        g = replace(g, target_layer=name)
    with outside_inference_mode(), torch.enable_grad():
        largest = _largest_difference(g, copy.deepcopy(unwrap(model)).double().eval(), x, target, tolerance)
    if not largest <= tolerance:
        raise ValueError(
            f"The gradient of the heatmaps must be that of finite differences; got a relative difference of "
            f"{largest:.2g}, above {tolerance:g}. A function between the layer and the logits has a wrong second "
            "derivative: in an `autograd.Function` of your own, let `backward` use `ctx.saved_tensors` alone, which "
            "`save_for_backward` keeps for inputs and outputs, and compute anything else anew."
        )
    return largest


def _largest_difference(g: Explainer, model: nn.Module, x: Tensor, target: Target | None, tolerance: float) -> float:
    """Return the largest difference along the gradient and two random directions, for :func:`check_gradient`."""
    generator = torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = ordinary(x).detach().double()
    seen = explained(g, model, x, as_target(ordinary(target), len(x), x.device))
    weights = _random(seen.heatmap, generator)
    found = torch.autograd.grad((seen.heatmap * weights).sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]
    here, gradient = (torch.cat([each.detach().flatten() for each in tensors]) for tensors in (parameters, gradients))

    @torch.no_grad()
    def at(place: Tensor) -> Tensor:
        """Return S there."""
        vector_to_parameters(place, parameters)
        return (explained(g, model, x, seen.target).heatmap * weights).sum()

    if not gradient.any():
        raise ValueError(
            "The heatmaps must have a gradient to be checked; got heatmaps that are blank, or do not change. Pass "
            "other images, or a `target` that something in them speaks for."
        )
    largest = 0.0
    for factor in (1.0, _random(gradient, generator), _random(gradient, generator)):
        direction = F.normalize(factor * gradient, dim=0)
        largest = max(largest, _difference(at, here, direction, gradient @ direction, tolerance))
    return largest


def _difference(at: Callable[[Tensor], Tensor], here: Tensor, along: Tensor, slope: Tensor, enough: float) -> float:
    """Return the relative difference of a slope from the measured one, by the step that shows the smallest."""
    least = math.inf
    # Too long a step crosses kinks of the network, such as those of ReLU; too short a one drowns in rounding.
    for step in (1e-6, 1e-8, 1e-10):
        measured = (at(here + step * along) - at(here - step * along)) / (2 * step)
        least = min(least, float((measured - slope).abs() / torch.maximum(measured.abs(), slope.abs())))
        if least <= enough:
            break
    return least


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
