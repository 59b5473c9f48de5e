"""Attention in the form that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock

from torch.nn.attention import SDPBackend, sdpa_kernel

_LOCK = Lock()
_GOING: list[AbstractContextManager[None]] = []  # one for each use that goes on; the first to begin switched


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run attention unfused: fused kernels have no second derivative.

    PyTorch keeps that choice for the whole process. Uses may overlap, in threads or in ``reuse`` blocks, and end in any
    order: the first switches, and the last switches back.
    """
    switched: AbstractContextManager[None]
    with _LOCK:
        if not _GOING:
            switched = sdpa_kernel(SDPBackend.MATH)
            switched.__enter__()
        else:
            switched = _GOING[0]
        _GOING.append(switched)
    try:
        yield
    finally:
        with _LOCK:
            _GOING.pop()
            if not _GOING:
                switched.__exit__(None, None, None)
