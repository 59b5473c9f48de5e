"""What the authors' code computes where it departs from the paper's equation."""

from __future__ import annotations

from torch import Tensor

from cgc_reg.losses import mse_consistency
from cgc_reg.rules import hires_cam

IMAGE_SIZE = (224, 224)


def official_heatmap(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Compute their training heatmap, before it is enlarged to 224 x 224.

    They enlarge m = :func:`hires_cam` first and then take :math:`m / (\sum m + \epsilon) + \epsilon` with
    :math:`\epsilon` = 1e-8, which turns a blank map into a uniform one. Bilinear enlargement keeps a map's mean when
    224 is a multiple of its size, so the sum over the large map is known before there is one.
    """
    heatmap = hires_cam(activation, gradient)
    total = heatmap.mean(dim=(1, 2), keepdim=True) * (IMAGE_SIZE[0] * IMAGE_SIZE[1])
    return heatmap / (total + 1e-8) + 1e-8


def official_mse(query: Tensor, key: Tensor) -> Tensor:
    """Compute their non-contrastive loss per image, (n,): the mean over pixels where `mse_consistency` has the sum."""
    return mse_consistency(query, key, reduction="none") / (query.shape[1] * query.shape[2])
