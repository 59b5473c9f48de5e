"""Heatmaps for looking at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cgc_reg._checks import check_images
from cgc_reg._targets import Target, as_target
from cgc_reg.explainers import as_explainer, explained
from cgc_reg.explanation import Explainer
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.settings import evaluation_mode
from cgc_reg.model.state import left_as_found
from cgc_reg.model.turns import in_turn
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
    with outside_inference_mode(), torch.no_grad(), in_turn(model), left_as_found(model), evaluation_mode(model):
        target = as_target(ordinary(target), len(x), x.device)
        x = x.clone()  # the model may change its images in place
        return explained(explainer, model, x, target).heatmap
