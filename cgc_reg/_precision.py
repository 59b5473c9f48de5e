"""Arithmetic in at least float32, whatever the model runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return float16 and bfloat16 tensors as float32, and leave wider ones as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def precision_of(x: Tensor) -> torch.dtype:
    """Return the type that a model given x computes in: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the tensor's device, so that a product of float32 tensors stays float32."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


@contextmanager
def without_autocast_cache(x: Tensor) -> Iterator[None]:
    """Keep weights that autocast casts here, where the tensor is, out of its cache.

    Older versions of PyTorch cache a cast made under ``no_grad`` without its graph (pull request 165068 mended that);
    a later training pass that took it would cut its weight off from the loss without a word. Without autocast the
    setting stays, since a compiled part that finds another one is compiled anew.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled and not _autocasts(x))
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
