"""Tell the passes of ours from those of the user's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# The pass of ours that goes on in this thread.
_GOING: ContextVar[object] = ContextVar("_GOING", default=None)


@contextmanager
def own_pass() -> Iterator[Callable[[], bool]]:
    """Mark a pass as one of ours, which nobody's loop made.

    Yields:
        A function that tells whether that pass is the one going on, and not one of another thread.
    """
    this = object()
    token = _GOING.set(this)
    try:
        yield lambda: _GOING.get() is this
    finally:
        _GOING.reset(token)


def is_own_pass() -> bool:
    """Tell whether the pass going on is one of ours."""
    return _GOING.get() is not None
