"""The explainers that the command line knows, by the names of their rules."""

from cgc_reg import CAM, GradCAM, HiResCAM, LayerCAM, PositiveGradCAM

RULES = {
    "grad_cam": GradCAM,
    "hires_cam": HiResCAM,
    "layer_cam": LayerCAM,
    "positive_grad_cam": PositiveGradCAM,
    "class_activation": CAM,
}
