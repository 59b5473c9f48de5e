"""One pass of ours at a time on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

from cgc_reg.model.wrappers import unwrap

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_FINDING = Lock()


@contextmanager
def in_turn(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread makes a pass of ours over this model.

    A pass changes settings of the model and sets them back. Two at a time would see each other's, and set back what is
    not their own. A plain pass of another thread does not wait.

    Args:
        model: wrapped or not.
    """
    with _FINDING:
        lock = _LOCKS.setdefault(unwrap(model), RLock())
    with lock:
        yield
