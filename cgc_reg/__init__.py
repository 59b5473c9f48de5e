"""Consistent explanations for any CNN while it trains: Contrastive Grad-CAM Consistency, and heatmaps to train on."""

from cgc_reg.checking import check_closed_form, check_gradient
from cgc_reg.dataset import ContrastiveTransforms
from cgc_reg.explain import explain
from cgc_reg.explainers import (
    CAM,
    GradCAM,
    HiResCAM,
    LayerCAM,
    LayerExplainer,
    PositiveGradCAM,
)
from cgc_reg.explanation import Explainer, Explanation
from cgc_reg.losses import info_nce, mse_consistency
from cgc_reg.metrics import Consistency, ContentHeatmap, consistency, content_heatmap, pointing_game
from cgc_reg.model.suggest import suggest_target_layer
from cgc_reg.model.wrappers import expose_layer
from cgc_reg.regularizer import CGCOutput, CGCRegularizer
from cgc_reg.reshape import TokensToMaps, channels_last_to_maps
from cgc_reg.rules import class_activation, grad_cam, hires_cam, layer_cam, positive_grad_cam
from cgc_reg.transforms import RandomAffine, RandomResizedCropFlip, SpatialTransform, TransformSampler

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "CGCOutput",
    "CGCRegularizer",
    "Consistency",
    "ContentHeatmap",
    "ContrastiveTransforms",
    "Explainer",
    "Explanation",
    "GradCAM",
    "HiResCAM",
    "LayerCAM",
    "LayerExplainer",
    "PositiveGradCAM",
    "RandomAffine",
    "RandomResizedCropFlip",
    "SpatialTransform",
    "TokensToMaps",
    "TransformSampler",
    "channels_last_to_maps",
    "check_closed_form",
    "check_gradient",
    "class_activation",
    "consistency",
    "content_heatmap",
    "explain",
    "expose_layer",
    "grad_cam",
    "hires_cam",
    "info_nce",
    "layer_cam",
    "mse_consistency",
    "pointing_game",
    "positive_grad_cam",
    "suggest_target_layer",
]
