"""Gradient checkpointing: which modules the backward will run again, and how it does not."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cgc_reg.model.graph import nodes


@dataclass(frozen=True)
class _Watch:
    """A pass whose checkpoints are watched."""

    modules: frozenset[nn.Module]  # which ones
    found: list[nn.Module]  # those of them that ran inside a checkpoint

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        if _inside_checkpoint():
            self.found.append(module)

    @contextmanager
    def hooked(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for module in modules if torch.is_grad_enabled() else ():
                if module in self.modules and not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_hook(self.look).remove)
            yield


_WATCH: ContextVar[_Watch | None] = ContextVar("_WATCH", default=None)


@contextmanager
def watch_checkpoints(modules: Collection[nn.Module], compiled: Iterable[nn.Module] = ()) -> Iterator[list[nn.Module]]:
    """Note which of the modules a pass runs inside a checkpoint, for the backward to run again; by a hook on each.

    Args:
        modules: which ones.
        compiled: compiled parts of the model. A hook inside would have them compiled anew, so they tell by
            :func:`note_if_run_again` when they begin, and by :func:`watched_as_written` where they run as written.

    Yields:
        Those modules, once they have run.
    """
    watch = _Watch(frozenset(modules), [])
    inside = {module for part in compiled for module in part.modules()}
    token = _WATCH.set(watch)
    try:
        with watch.hooked(module for module in modules if module not in inside):
            yield watch.found
    finally:
        _WATCH.reset(token)


def note_if_run_again(part: nn.Module) -> None:
    """Let :func:`watch_checkpoints` know that a compiled part of the model begins."""
    watch = _WATCH.get()
    if watch is not None and _inside_checkpoint():
        watch.found.extend(module for module in part.modules() if module in watch.modules)


@contextmanager
def watched_as_written(part: nn.Module) -> Iterator[None]:
    """Let :func:`watch_checkpoints` look into a compiled part of the model while it runs as written."""
    watch = _WATCH.get()
    with nullcontext() if watch is None else watch.hooked(part.modules()):
        yield


@contextmanager
def stored() -> Iterator[None]:
    """Have what runs here store what its backward needs, where a checkpoint would run it again, and compiled then."""
    inside = torch.is_grad_enabled() and _inside_checkpoint()
    with saved_tensors_hooks(_same, _same) if inside else nullcontext():
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def has_reentrant_checkpoint(logits: Tensor) -> bool:
    """Tell whether a part of the pass was checkpointed with ``use_reentrant=True``."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(logits))


def _inside_checkpoint() -> bool:
    """Tell whether PyTorch's checkpointing is among the callers, of either kind."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None
