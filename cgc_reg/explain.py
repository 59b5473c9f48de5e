"""Heatmaps for looking at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cgc_reg._checks import check_images, describe
from cgc_reg._targets import Target, as_target
from cgc_reg.explainers import CAM, GradCAM, as_explainer, explained
from cgc_reg.explanation import Explainer
from cgc_reg.losses import unit_maps
from cgc_reg.model.inference import ordinary, outside_inference_mode
from cgc_reg.model.settings import evaluation_mode
from cgc_reg.model.wrappers import unwrap


def explain(
    model: nn.Module,
    x: Tensor,
    explainer: Explainer | str | None = None,
    target: Target | None = None,
) -> Tensor:
    """Compute heatmaps for looking at.

    The model runs once, in evaluation mode, and is left as it was found. The heatmaps carry no graph.

    Args:
        model: any image classifier, wrapped or not.
        x: images (n, c, h, w), as the model takes them.
        explainer: g; a layer's name is short for its :class:`GradCAM`, and None for that of
            :func:`suggest_target_layer`.
        target: what to explain in each image: classes (n,), one for all, or weights of the scores (n, k); the predicted
            class if None.

    Returns:
        Heatmaps (n, h, w) on the explainer's grid, not negative for the built-in ones.

    Raises:
        ValueError, TypeError: an argument is not as described; the message says which, and what to do.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> explain(model, torch.rand(2, 3, 224, 224), "layer4").shape
        torch.Size([2, 7, 7])
    """
    explainer = as_explainer(explainer)
    check_images("x", x)
    model = unwrap(model)
    with outside_inference_mode(), torch.no_grad(), evaluation_mode(model):
        target = as_target(ordinary(target), len(x), x.device)
        x = x.clone()  # the model may change its images in place
        return explained(explainer, model, x, target).heatmap


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
