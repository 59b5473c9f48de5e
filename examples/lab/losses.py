"""The losses of a pair of heatmaps that the command line knows, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cgc_reg import info_nce, mse_consistency
from cgc_reg.regularizer import LossName

NEGATIVES = 0.1  # weight of the contrast beside the plain comparison


def mse_and_info_nce(query: Tensor, key: Tensor) -> Tensor:
    """Compare an image's own pair of heatmaps, and contrast it a little with those of other images; (n,)."""
    contrast = info_nce(query, key, reduction="none")
    return mse_consistency(query, key, reduction="none") + NEGATIVES * contrast


LOSSES: dict[str, LossName | Callable[[Tensor, Tensor], Tensor]] = {
    "info_nce": "info_nce",
    "mse_consistency": "mse_consistency",
    "mse_and_info_nce": mse_and_info_nce,
}
