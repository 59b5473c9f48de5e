"""Where the object is in each image, and how much of a heatmap's energy lies there.

The energy of a heatmap is what is positive of it, once it is enlarged to the image's size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from cgc_reg._checks import AXES, check_size, describe
from cgc_reg._enlarge import enlarge
from cgc_reg._precision import at_least_float32

Boxes: TypeAlias = Tensor | Sequence[Tensor]  # (n, 4), or n tensors (k_i, 4); 2 d numbers in d dimensions


def object_masks(
    heatmaps: Tensor, masks: Tensor | None, boxes: Boxes | None, image_size: Sequence[int] | None
) -> Tensor:
    """Return m, (n, H, W): the masks, or those of the boxes; bool or from 0 to 1."""
    dims = heatmaps.ndim - 1
    n = len(heatmaps)
    if (masks is None) == (boxes is None):
        raise ValueError(
            f"Exactly one of `masks` and `boxes` must be given; got {'neither' if masks is None else 'both'}. Pass "
            "`masks` for outlines, and `boxes` with `image_size` for any number of boxes of each image."
        )
    if boxes is not None:
        return box_masks(stacked_boxes(boxes, heatmaps), check_size("image_size", image_size, dims=dims))
    if not isinstance(masks, Tensor) or masks.ndim != dims + 1 or len(masks) != n:
        repair = ""
        if isinstance(masks, Tensor) and masks.shape[:2] == (n, 1) and masks.ndim == dims + 2:
            repair = " Pass `masks[:, 0]`."
        elif heatmaps.shape[1:-2] == (1,):
            repair = " Of heatmaps (n, 1, h, w) pass `heatmaps[:, 0]`."
        raise ValueError(f"`masks` must be of shape ({n}, {AXES[dims].title()}); got {describe(masks)}.{repair}")
    if image_size is not None:
        raise ValueError(
            f"`image_size` must be given with `boxes` alone; got {describe(image_size)} with masks. Leave it out."
        )
    if not masks.is_floating_point():
        return masks != 0
    # On a GPU the values are not looked at, which would make that wait.
    if masks.device.type == "cpu" and not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError(
            f"`masks` must be from 0 to 1 where they are floating-point; got values from {masks.min():g} to "
            f"{masks.max():g}. Pass `masks > 0`, or divide by the highest value."
        )
    return masks


def stacked_boxes(boxes: Boxes, heatmaps: Tensor) -> Tensor:
    """Return the boxes as (n, k, 2 d); images with fewer than k of them are given empty ones too."""
    n, numbers = len(heatmaps), 2 * (heatmaps.ndim - 1)
    if isinstance(boxes, Tensor) and boxes.shape == (n, numbers):
        corners = _as_corners(boxes)
        _check_corners([corners])
        return corners[:, None]
    several = [] if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence) else list(boxes)
    if len(several) != n or not all(isinstance(one, Tensor) and one.shape[1:] == (numbers,) for one in several):
        names = [f"{axis}_{end}" for end in ("min", "max") for axis in "xyz"[: numbers // 2]]
        raise ValueError(
            f"`boxes` must be of shape ({n}, {numbers}): {', '.join(names)} for each heatmap, or a list of {n} tensors "
            f"of shape (k, {numbers}); got {describe(boxes)}. For an image without a box, pass "
            f"`torch.zeros(0, {numbers})` in the list."
        )
    several = [_as_corners(one) for one in several]
    _check_corners(several)
    dtype = functools.reduce(torch.promote_types, [one.dtype for one in several], torch.float32)
    stacked = heatmaps.new_zeros(n, max(map(len, several), default=0), numbers, dtype=dtype)
    for i, one in enumerate(several):
        stacked[i, : len(one)] = one
    return stacked


def _as_corners(boxes: Tensor) -> Tensor:
    """Bring torchvision's boxes, which know their format, to the one of two corners."""
    if not isinstance(boxes, BoundingBoxes):
        return boxes
    corners: Tensor = convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
    return corners.as_subclass(Tensor)


def _check_corners(several: Sequence[Tensor]) -> None:
    """Refuse boxes (k, 2 d) that mark nothing though they are to; on a GPU the values are not looked at."""
    if not several or any(one.device.type != "cpu" for one in several):
        return
    boxes = torch.cat([one.double() for one in several])
    low, high = boxes.chunk(2, dim=1)
    wrong = ~(low <= high).all(dim=1)
    if wrong.any():
        raise ValueError(
            f"`boxes` must be two corners, the lower numbers first; got {boxes[wrong][0].tolist()}. Boxes (x, y, "
            "width, height) become such by `torchvision.ops.box_convert`."
        )
    marking = boxes[(low < high).all(dim=1)]
    within_1 = len(marking) > 0 and bool(((marking >= 0) & (marking <= 1)).all())
    if within_1 and any(one.is_floating_point() for one in several):
        raise ValueError(
            f"`boxes` must be in pixels; got none that reaches further than 1, such as {marking[0].tolist()}. Multiply "
            "shares of an image by its sides: `boxes * torch.tensor([W, H, W, H])`."
        )


def box_masks(boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    """Mark the pixels whose centres lie in any of an image's boxes: (n, k, 2 d) to bool (n, *image_size)."""
    n, k, _ = boxes.shape
    low, high = boxes.flip(2).chunk(2, dim=2)[::-1]  # along each axis, where numbers have the last axis first
    inside = []
    for axis, side in enumerate(image_size):
        centre = torch.arange(side, device=boxes.device, dtype=torch.float32) + 0.5
        inside.append(((low[:, :, axis, None] <= centre) & (centre < high[:, :, axis, None])).float())
    *others, last = inside
    rows = last.new_ones(n, k, 1)
    for along in others:
        rows = (rows[:, :, :, None] * along[:, :, None]).flatten(2)
    # How many boxes hold a pixel, as a product of matrices, which needs no mask of each box.
    return (rows.mT @ last > 0).view(n, *image_size)


def has_object(masks: Tensor) -> Tensor:
    """Tell which masks (n, H, W) mark anything, (n,). What is not a number does: it must show."""
    return ~(masks <= 0).flatten(1).all(dim=1)


def energy_maps(heatmaps: Tensor, size: Sequence[int]) -> Tensor:
    """Return ReLU(g), (n, H, W), of heatmaps that are enlarged to a size; float32 or wider."""
    return enlarge(at_least_float32(heatmaps), size).relu()


def energies(energy: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each heatmap's energy on the object and in all, (n,) both."""
    places = tuple(range(1, energy.ndim))
    return (energy * masks).sum(dim=places), energy.sum(dim=places)


def scaled_to_peak(energy: Tensor) -> Tensor:
    """Divide each map by its highest value, so that sums stay in range; a blank map becomes zeros.

    A blank map gets a gradient of zero, where plain division would have none.
    """
    peak = energy.detach().amax(dim=tuple(range(1, energy.ndim)), keepdim=True)
    return energy / peak.masked_fill(peak < torch.finfo(energy.dtype).tiny, float("inf"))
