"""Where the object is in each image, and how much of a heatmap's energy lies there.

The energy of a heatmap is what is positive of it, once it is enlarged to the image's size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_size, describe
from cgc_reg._precision import at_least_float32

Boxes: TypeAlias = Tensor | Sequence[Tensor]  # (n, 4), or n tensors (k_i, 4)


def object_masks(
    heatmaps: Tensor, masks: Tensor | None, boxes: Boxes | None, image_size: tuple[int, int] | None
) -> Tensor:
    """Return m, (n, H, W): the masks, or those of the boxes; bool or from 0 to 1."""
    n = len(heatmaps)
    if (masks is None) == (boxes is None):
        raise ValueError(
            f"Exactly one of `masks` and `boxes` must be given; got {'neither' if masks is None else 'both'}. Pass "
            "`masks` for outlines, and `boxes` with `image_size` for any number of boxes of each image."
        )
    if boxes is not None:
        return box_masks(stacked_boxes(boxes, heatmaps), check_size("image_size", image_size))
    if not isinstance(masks, Tensor) or masks.ndim != 3 or len(masks) != n:
        raise ValueError(f"`masks` must be of shape ({n}, H, W); got {describe(masks)}.")
    if image_size is not None:
        raise ValueError(
            f"`image_size` must be given with `boxes` alone; got {describe(image_size)} with masks. Leave it out."
        )
    return masks if masks.is_floating_point() else masks != 0


def stacked_boxes(boxes: Boxes, heatmaps: Tensor) -> Tensor:
    """Return the boxes as (n, k, 4); images with fewer than k of them are given empty ones too."""
    n = len(heatmaps)
    if isinstance(boxes, Tensor) and boxes.shape == (n, 4):
        return boxes[:, None]
    several = [] if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence) else list(boxes)
    if len(several) != n or not all(isinstance(one, Tensor) and one.shape[1:] == (4,) for one in several):
        raise ValueError(
            f"`boxes` must be of shape ({n}, 4): x_min, y_min, x_max, y_max for each heatmap, or a list of {n} tensors "
            f"of shape (k, 4); got {describe(boxes)}. For an image without a box, pass `torch.zeros(0, 4)` in the list."
        )
    dtype = functools.reduce(torch.promote_types, [one.dtype for one in several], torch.float32)
    stacked = heatmaps.new_zeros(n, max(map(len, several), default=0), 4, dtype=dtype)
    for i, one in enumerate(several):
        stacked[i, : len(one)] = one
    return stacked


def box_masks(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Mark the pixels whose centres lie in any of an image's boxes: (n, k, 4) to bool (n, H, W)."""
    y, x = (torch.arange(side, device=boxes.device, dtype=torch.float32) + 0.5 for side in image_size)
    x_min, y_min, x_max, y_max = boxes[..., None].unbind(dim=2)
    rows, columns = (y_min <= y) & (y < y_max), (x_min <= x) & (x < x_max)
    # How many boxes hold a pixel, as a product of matrices, which needs no mask of each box.
    return rows.mT.float() @ columns.float() > 0


def has_object(masks: Tensor) -> Tensor:
    """Tell which masks (n, H, W) mark anything, (n,)."""
    return (masks > 0).flatten(1).any(dim=1)


def energy_maps(heatmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ReLU(g), (n, H, W), of heatmaps that are enlarged to a size; float32 or wider."""
    large = F.interpolate(at_least_float32(heatmaps)[:, None], size, mode="bilinear", align_corners=False)
    return large[:, 0].relu()


def energies(energy: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each heatmap's energy on the object and in all, (n,) both."""
    return (energy * masks).sum(dim=(1, 2)), energy.sum(dim=(1, 2))


def scaled_to_peak(energy: Tensor) -> Tensor:
    """Divide each map by its highest value, so that sums stay in range; a blank map becomes zeros.

    A blank map gets a gradient of zero, where plain division would have none.
    """
    peak = energy.detach().amax(dim=(1, 2), keepdim=True)
    return energy / peak.masked_fill(peak < torch.finfo(energy.dtype).tiny, float("inf"))
