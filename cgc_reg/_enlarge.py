"""Heatmaps at another size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def enlarge(heatmaps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate heatmaps (n, *space) linearly along each axis, as ``align_corners=False`` does: (n, *size)."""
    mode = ("linear", "bilinear", "trilinear")[heatmaps.ndim - 2]
    return F.interpolate(heatmaps[:, None], tuple(size), mode=mode, align_corners=False)[:, 0]
