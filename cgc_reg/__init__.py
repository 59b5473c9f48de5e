"""Consistent explanations for any CNN while it trains: Contrastive Grad-CAM Consistency, and heatmaps to train on."""

from cgc_reg.checking import check_closed_form, check_gradient
from cgc_reg.compile import compile_below
from cgc_reg.dataset import ContrastiveTransforms
from cgc_reg.explain import explain
from cgc_reg.explainers import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    LayerExplainer,
    PositiveGradCAM,
    XGradCAM,
)
from cgc_reg.explanation import Explainer, Explanation
from cgc_reg.full_grad import FullGrad
from cgc_reg.losses import energy_loss, info_nce, mse_consistency
from cgc_reg.metrics import (
    Consistency,
    ContentHeatmap,
    consistency,
    content_heatmap,
    object_coverage,
    pointing_game,
)
from cgc_reg.model.suggest import suggest_target_layer
from cgc_reg.model.wrappers import expose_layer
from cgc_reg.regularizer import CGCOutput, CGCRegularizer
from cgc_reg.reshape import TokensToMaps, channels_last_to_maps
from cgc_reg.rules import (
    class_activation,
    full_grad,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    positive_grad_cam,
    xgrad_cam,
)
from cgc_reg.samplers import (
    Compose,
    RandomAffine,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCropFlip,
    TransformSampler,
)
from cgc_reg.transforms import SpatialTransform
from cgc_reg.weightings import confidence

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "CGCOutput",
    "CGCRegularizer",
    "Compose",
    "Consistency",
    "ContentHeatmap",
    "ContrastiveTransforms",
    "Explainer",
    "Explanation",
    "FullGrad",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "LayerExplainer",
    "PositiveGradCAM",
    "RandomAffine",
    "RandomFlip",
    "RandomQuarterTurn",
    "RandomResizedCropFlip",
    "SpatialTransform",
    "TokensToMaps",
    "TransformSampler",
    "XGradCAM",
    "channels_last_to_maps",
    "check_closed_form",
    "check_gradient",
    "class_activation",
    "compile_below",
    "confidence",
    "consistency",
    "content_heatmap",
    "energy_loss",
    "explain",
    "expose_layer",
    "full_grad",
    "grad_cam",
    "grad_cam_plus_plus",
    "hires_cam",
    "info_nce",
    "layer_cam",
    "mse_consistency",
    "object_coverage",
    "pointing_game",
    "positive_grad_cam",
    "suggest_target_layer",
    "xgrad_cam",
]
