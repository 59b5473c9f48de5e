"""Gradient checkpointing: which modules the backward will run again."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cgc_reg.model.graph import nodes


@contextmanager
def watch_checkpoints(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Note which of the modules a pass runs inside a checkpoint, for the backward to run again; by a hook on each.

    Yields:
        Those modules, once they have run.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if _inside_checkpoint():
            found.append(module)

    with ExitStack() as stack:
        for module in modules if torch.is_grad_enabled() else ():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(look).remove)
        yield found


def has_reentrant_checkpoint(logits: Tensor) -> bool:
    """Tell whether a part of the pass was checkpointed with ``use_reentrant=True``."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(logits))


def _inside_checkpoint() -> bool:
    """Tell whether PyTorch's checkpointing is among the callers, of either kind."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None
