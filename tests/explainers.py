"""The explainers by the names of their rules, for tests that hold for each of them."""

from cgc_reg import (
    CAM,
    CGCRegularizer,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    LayerExplainer,
    PositiveGradCAM,
    XGradCAM,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    positive_grad_cam,
    xgrad_cam,
)

RULES = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "positive_grad_cam": positive_grad_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "xgrad_cam": xgrad_cam,
}
EXPLAINERS = {
    "grad_cam": GradCAM,
    "hires_cam": HiResCAM,
    "layer_cam": LayerCAM,
    "positive_grad_cam": PositiveGradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlus,
    "xgrad_cam": XGradCAM,
    "class_activation": CAM,
}
OF_EXPLAINER = ("head", "output_fn", "reshape_transform")


def explainer(layer, heatmap="grad_cam", **options):
    """Make one from its rule's name, or from a rule of one's own."""
    return LayerExplainer(layer, heatmap, **options) if callable(heatmap) else EXPLAINERS[heatmap](layer, **options)


def regularizer(layer, *, heatmap="grad_cam", **options):
    """Make a regularizer and its explainer from the options of both."""
    of_explainer = {name: options.pop(name) for name in OF_EXPLAINER if name in options}
    return CGCRegularizer(explainer(layer, heatmap, **of_explainer), **options)
