"""Gradient checkpointing: which modules the backward will run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg.model.graph import nodes


@dataclass
class RunAgain:
    """Which of the watched modules a pass ran inside a checkpoint."""

    surely: list[nn.Module] = field(default_factory=list)  # in one that is not reentrant
    maybe: list[nn.Module] = field(default_factory=list)  # without gradients, as a reentrant one does

    def of(self, logits: Tensor) -> list[nn.Module]:
        """Return the modules that the backward from the pass's logits will run again."""
        return self.surely + self.maybe if self.surely or (self.maybe and has_reentrant_checkpoint(logits)) else []


@contextmanager
def watch_checkpoints(modules: Iterable[nn.Module]) -> Iterator[RunAgain]:
    """Note which of the modules run inside a checkpoint, by a hook on each."""
    grad_enabled = torch.is_grad_enabled()
    found = RunAgain()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if _inside_checkpoint():
            found.surely.append(module)
        elif grad_enabled and not torch.is_grad_enabled():
            found.maybe.append(module)

    with ExitStack() as stack:
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(look).remove)
        yield found


def has_reentrant_checkpoint(logits: Tensor) -> bool:
    """Tell whether a part of the pass was checkpointed with ``use_reentrant=True``."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(logits))


def _inside_checkpoint() -> bool:
    """Tell whether a non-reentrant checkpoint is being recorded; torch 2.6 cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)(False)
    return top is not None and "checkpoint" in getattr(top[0], "__qualname__", "")
