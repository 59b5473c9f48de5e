"""The explainers that the command line knows, by the names of their rules."""

from __future__ import annotations

from collections.abc import Callable

from cgc_reg import (
    CAM,
    Explainer,
    FullGrad,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    PositiveGradCAM,
    XGradCAM,
)

RULES: dict[str, Callable[[str], Explainer]] = {
    "grad_cam": GradCAM,
    "hires_cam": HiResCAM,
    "layer_cam": LayerCAM,
    "positive_grad_cam": PositiveGradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlus,
    "xgrad_cam": XGradCAM,
    "class_activation": CAM,
    "full_grad": lambda layer: FullGrad(),
}
