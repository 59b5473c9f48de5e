"""Where heatmaps are highest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def highest_points(heatmaps: Tensor, size: Sequence[int]) -> Tensor:
    """Return where each heatmap is highest in an image of this size: (n, d), in pixels from the outer edge on.

    The point is the centre of the highest cell, where an enlarged heatmap is highest too. Enlarged heatmaps are level
    from a cell at the rim outward, and which of the level pixels is "the" highest would be a matter of rounding.
    """
    cell, points = heatmaps.flatten(1).argmax(dim=1), []
    for axis, (cells, side) in enumerate(zip(heatmaps.shape[1:], size, strict=True)):
        # `unravel_index` would make a GPU wait.
        along = cell.div(heatmaps.shape[axis + 2 :].numel(), rounding_mode="floor") % cells
        points.append((along + 0.5) * (side / cells))
    return torch.stack(points, dim=1)
