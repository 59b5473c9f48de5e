"""Keep a model's running statistics, and all its other buffers, out of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cgc_reg.model.settings import attribute

BatchNormMode = Literal["preserve", "update", "eval"]


@contextmanager
def statistics_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[list[nn.Module]]:
    """Run a pass without a trace in any buffer, unless the mode is "update".

    Buffers are lent as copies: writing them back afterwards would be seen by autograd as a change to what it saved.

    Args:
        model: wrapped or not.
        mode: ``"update"`` changes nothing; ``"preserve"`` lends copies of the buffers; ``"eval"`` does that, and lets
            norms that keep statistics normalise with those.

    Yields:
        The modules whose settings or buffers are other ones now.
    """
    changed: list[nn.Module] = []
    copies: dict[Tensor, Tensor] = {}  # a buffer that two modules share has one copy
    with ExitStack() as stack:
        for module in model.modules() if mode != "update" else ():
            if "running_mean" in module._buffers:  # also of a scripted one, which has no class of its own
                if not module.training:
                    continue  # which writes nothing
                if mode == "eval":
                    stack.enter_context(attribute(module, "training", False))
            buffers = list(module.named_buffers(recurse=False))
            for name, buffer in buffers:
                if buffer not in copies:
                    copies[buffer] = buffer.clone()
                stack.enter_context(attribute(module, name, copies[buffer]))
            if buffers:
                changed.append(module)
        yield changed


def norms_in_training(model: nn.Module) -> int:
    """Count the BatchNorms that normalise with a batch's statistics."""
    return sum(isinstance(module, _BatchNorm) and module.training for module in model.modules())
