"""Gradient checkpointing: which modules the backward will run again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cgc_reg.model.graph import nodes

# Takes a compiled part of the model, whose modules have no hooks, as it begins in a pass that is watched.
_LOOK: ContextVar[Callable[[nn.Module], None] | None] = ContextVar("_LOOK", default=None)


@contextmanager
def watch_checkpoints(modules: Collection[nn.Module], compiled: Iterable[nn.Module] = ()) -> Iterator[list[nn.Module]]:
    """Note which of the modules a pass runs inside a checkpoint, for the backward to run again; by a hook on each.

    Args:
        modules: which ones.
        compiled: parts of the model that stay compiled. A hook inside would have them compiled anew, so they tell by
            :func:`note_if_run_again` when they begin.

    Yields:
        Those modules, once they have run.
    """
    found: list[nn.Module] = []
    inside = {module for part in compiled for module in part.modules()}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if _inside_checkpoint():
            found.append(module)

    def look_at_part(part: nn.Module) -> None:
        if _inside_checkpoint():
            found.extend(module for module in part.modules() if module in modules)

    token = _LOOK.set(look_at_part)
    try:
        with ExitStack() as stack:
            for module in modules if torch.is_grad_enabled() else ():
                if module not in inside and not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_hook(look).remove)
            yield found
    finally:
        _LOOK.reset(token)


def note_if_run_again(part: nn.Module) -> None:
    """Let :func:`watch_checkpoints` know that a compiled part of the model begins."""
    look = _LOOK.get()
    if look is not None:
        look(part)


def has_reentrant_checkpoint(logits: Tensor) -> bool:
    """Tell whether a part of the pass was checkpointed with ``use_reentrant=True``."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(logits))


def _inside_checkpoint() -> bool:
    """Tell whether PyTorch's checkpointing is among the callers, of either kind."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None
