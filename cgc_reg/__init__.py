"""Consistent explanations for any CNN while it trains: Contrastive Grad-CAM Consistency as one loss term."""

from cgc_reg.dataset import ContrastiveTransforms
from cgc_reg.explain import check_closed_form, explain
from cgc_reg.heatmaps import class_activation, grad_cam, hires_cam, layer_cam, positive_grad_cam
from cgc_reg.losses import info_nce, mse_consistency
from cgc_reg.metrics import Consistency, ContentHeatmap, consistency, content_heatmap, pointing_game
from cgc_reg.regularizer import CGCOutput, CGCRegularizer
from cgc_reg.reshape import TokensToMaps, channels_last_to_maps
from cgc_reg.suggest import suggest_target_layer
from cgc_reg.transforms import RandomAffine, RandomResizedCropFlip, SpatialTransform, TransformSampler
from cgc_reg.wrappers import expose_layer

__version__ = "0.1.0"

__all__ = [
    "CGCOutput",
    "CGCRegularizer",
    "Consistency",
    "ContentHeatmap",
    "ContrastiveTransforms",
    "RandomAffine",
    "RandomResizedCropFlip",
    "SpatialTransform",
    "TokensToMaps",
    "TransformSampler",
    "channels_last_to_maps",
    "check_closed_form",
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
