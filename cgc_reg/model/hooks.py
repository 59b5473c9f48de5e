"""Hooks that copies of a module do without."""

from __future__ import annotations

import copyreg
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# How many of our hooks there are on modules of a class, whose copies are made by `_without_our_hooks` meanwhile.
_HOOKED: Counter[type[nn.Module]] = Counter()
_LOCK = Lock()
_REGISTERS = ("_forward_hooks", "_forward_pre_hooks")


class _Hook:
    """A hook for the calls of the thread that makes it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.thread = get_ident()

    def __call__(self, *args: Any) -> Any:
        return self.run(*args) if get_ident() == self.thread else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)  # for classes that copy their hooks themselves, as those of torch.fx do


def _nothing(*args: Any) -> None:
    """Stand where a hook stood."""


@contextmanager
def forward_hook(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Hook a module; a copy or a file that is made of it meanwhile knows nothing of the hook."""
    with _hooked(module, module.register_forward_hook(_Hook(run))):
        yield


@contextmanager
def forward_pre_hook(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Do the same with a hook that takes a call's positional and keyword arguments."""
    with _hooked(module, module.register_forward_pre_hook(_Hook(run), with_kwargs=True)):
        yield


@contextmanager
def _hooked(module: nn.Module, handle: RemovableHandle) -> Iterator[None]:
    of = type(module)
    with _LOCK:
        _HOOKED[of] += 1
        copyreg.pickle(of, _without_our_hooks)
    try:
        yield
    finally:
        handle.remove()
        with _LOCK:
            _HOOKED[of] -= 1
            if not _HOOKED[of]:
                del _HOOKED[of], copyreg.dispatch_table[of]


def _without_our_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Take a module apart for a copy, as Python does itself, but for our hooks."""
    parts: Any = module.__reduce_ex__(4)
    make, arguments, *rest = parts
    if rest and isinstance(rest[0], dict):  # classes may take themselves apart in their own way
        state = rest[0] = dict(rest[0])
        for register in _REGISTERS:
            ours = {key for key, hook in state.get(register, {}).items() if isinstance(hook, _Hook)}
            for name in (register, f"{register}_with_kwargs"):
                if name in state:
                    state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
    return make, arguments, *rest
