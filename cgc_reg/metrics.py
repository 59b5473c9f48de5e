"""How consistent heatmaps are, and how much of them lies on the object."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_maps, check_pair, describe
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg.losses import unit_maps


def content_heatmap(heatmaps: Tensor, masks: Tensor) -> Tensor:
    r"""Measure the share of each heatmap's energy that lies on the object.

    .. math:: \frac{\sum_{uv} m_{uv} \, \mathrm{ReLU}(g_{uv})}{\sum_{uv} \mathrm{ReLU}(g_{uv})}

    The heatmap g is first enlarged to the mask's size, bilinearly.

    Args:
        heatmaps: g, (n, h, w), at any resolution.
        masks: m, (n, H, W), bool or from 0 to 1: where the object is.

    Returns:
        (n,), from 0 to 1; NaN for a blank heatmap, which has no energy to share. Average with ``nanmean`` and report
        the share of blank maps beside it.

    Example:
        >>> masks = torch.zeros(1, 4, 4)
        >>> masks[:, :, :1] = 1
        >>> content_heatmap(torch.ones(1, 4, 4), masks)
        tensor([0.2500])

    References:
        Pillai and Pirsiavash, Explainable Models with Consistent Interpretations (AAAI 2021).
    """
    check_maps("heatmaps", heatmaps)
    if not isinstance(masks, Tensor) or masks.ndim != 3 or len(masks) != len(heatmaps):
        raise ValueError(f"`masks` must be of shape ({len(heatmaps)}, H, W); got {describe(masks)}.")
    with torch.no_grad(), without_autocast(heatmaps):
        size = (masks.shape[1], masks.shape[2])
        energy = F.interpolate(at_least_float32(heatmaps)[:, None], size, mode="bilinear", align_corners=False)[
            :, 0
        ].relu()
        return (energy * masks).sum(dim=(1, 2)) / energy.sum(dim=(1, 2))


def consistency(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    r"""Measure how alike T(g(x)) and g(T(x)) are, and how unlike other images' heatmaps.

    Args:
        query: T(g(x)), heatmaps (n, h, w).
        key: g(T(x)), heatmaps (n, h, w).

    Returns:
        Detached scalars on the maps' device: ``positive_similarity``, the mean of sim(q_i, k_i);
        ``negative_similarity``, the mean of sim(q_i, k_j) over j != i (NaN for a batch of one); ``margin``, the first
        less the second; ``blank_share``, the share of blank maps among all 2n.

    Example:
        >>> consistency(torch.ones(2, 7, 7), torch.ones(2, 7, 7))["positive_similarity"]
        tensor(1.0000)
    """
    check_pair(query, key)
    with torch.no_grad(), without_autocast(query):
        q, k = unit_maps(query), unit_maps(key)
        n = len(q)
        positive = (q * k).sum(dim=1)
        # The sum over all pairs is one product of sums.
        negatives = (q.sum(dim=0) * k.sum(dim=0)).sum() - positive.sum()
        negative = negatives / (n * (n - 1)) if n > 1 else positive.sum() * float("nan")
        blank = torch.cat([q, k]).eq(0).all(dim=1)
        return {
            "positive_similarity": positive.mean(),
            "negative_similarity": negative,
            "margin": positive.mean() - negative,
            "blank_share": blank.float().mean(),
        }
