"""What `target` says: which score of each image a heatmap explains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from cgc_reg._checks import describe

Target: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[float]] | int

_REPAIR = (
    "Pass class indices (n,), an index for all images, or weights of the scores (n, classes); for labels of shape "
    "(n, 1) `target[:, 0]`."
)


def as_target(target: object, batch_size: int, device: torch.device) -> Tensor | None:
    """Return classes (n,) as integers, weights (n, k) as floating-point numbers, or None for the predicted classes.

    Args:
        target: as the user gave it.
        batch_size: n.
        device: of a target that is no tensor yet.
    """
    if target is None:
        return None
    if isinstance(target, Integral) and not isinstance(target, bool):
        target = torch.tensor(target, device=device)
    if isinstance(target, (list, tuple)):
        with suppress(TypeError, ValueError):  # of entries that are no numbers, or of unequal lengths
            target = torch.tensor(target, device=device)
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a tensor, a list or an integer; got {describe(target)}. {_REPAIR}")
    if target.ndim == 0:
        target = target.expand(batch_size)
    whole = not target.is_floating_point()
    if target.ndim == 2 and len(target) == batch_size:
        return target.to(torch.get_default_dtype()) if whole else target
    if target.shape != (batch_size,):
        raise ValueError(
            f"`target` must be of shape ({batch_size},), or ({batch_size}, classes) for weights; got "
            f"{describe(target)}. {_REPAIR}"
        )
    if not whole or target.dtype is torch.bool:
        raise TypeError(
            f"`target` must hold integer class indices where it is of shape (n,); got {describe(target)}. Convert with "
            "`.long()`, or pass weights of shape (n, classes)."
        )
    return target.long()


def target_of(target: Tensor | None, logits: Tensor) -> Tensor:
    """Return a target that fits the logits (n, k): the one given, or the predicted classes."""
    if target is None:
        return logits.argmax(dim=1)
    classes = logits.shape[1]
    if target.ndim == 2:
        if target.shape != logits.shape:
            raise ValueError(
                f"`target` must hold a weight for each of the {classes} scores, shape {tuple(logits.shape)}; got shape "
                f"{tuple(target.shape)}. {_REPAIR}"
            )
        return target
    if target.device.type == "cpu" and len(target):  # reading it on a GPU would make that wait
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"`target` must hold classes from 0 to {classes - 1}, as many as the logits; got {low} to {high}."
            )
    return target
