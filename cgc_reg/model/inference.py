"""Leave inference mode, whose tensors cannot take part in any graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for ``torch.no_grad``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(value: Any) -> Any:
    """Return a copy of a tensor that was made in inference mode, and anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
