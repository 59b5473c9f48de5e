"""Attention in the form that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from torch.nn.attention import SDPBackend, sdpa_kernel

_LOCK = Lock()
_GOING: list[object] = []  # one for each use that goes on
_SWITCHED = ExitStack()


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run attention unfused: fused kernels have no second derivative.

    PyTorch keeps that choice for the whole process. Uses may overlap, in threads or in ``reuse`` blocks, and end in any
    order: the first switches, and the last switches back.
    """
    use = object()
    try:
        with _LOCK:
            _GOING.append(use)
            if [use] == _GOING:
                _SWITCHED.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
    finally:
        with _LOCK:
            if use in _GOING:  # not where an interrupt came first
                _GOING.remove(use)
            if not _GOING:
                _SWITCHED.close()
