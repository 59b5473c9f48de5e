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
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the tensor's device, so that a product of float32 tensors stays float32."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Keep weights that autocast casts here out of its cache.

    A cast made under ``no_grad`` has no graph; taken from the cache by a later training pass, it would cut its weight
    off from the loss without a word.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
