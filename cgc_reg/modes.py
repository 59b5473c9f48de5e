"""Ways to run a user's model for one pass, each left as it was entered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel

BatchNormMode = Literal["preserve", "update", "eval"]


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Keep an extra pass through DistributedDataParallel from broadcasting buffers, which would overwrite them."""
    with attribute(model, "broadcast_buffers", False) if isinstance(model, DistributedDataParallel) else nullcontext():
        yield


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Change what normalisation layers in training do with their running statistics, and change it back.

    The statistics are kept by never being written: copying them back afterwards would be seen by autograd as a
    change to what it saved.
    """
    with ExitStack() as stack:
        for module in model.modules() if mode != "update" else ():
            if not isinstance(module, _NormBase) or not module.training or not module.track_running_stats:
                continue
            if mode == "eval":
                stack.enter_context(attribute(module, "training", False))
                # Autograd keeps these by reference, and a later pass may overwrite them before the backward.
                for name in ("running_mean", "running_var"):
                    stack.enter_context(attribute(module, name, getattr(module, name).clone()))
            elif isinstance(module, _BatchNorm):
                stack.enter_context(attribute(module, "track_running_stats", False))
            else:  # InstanceNorm writes to whatever running statistics it holds.
                stack.enter_context(attribute(module, "running_mean", None))
                stack.enter_context(attribute(module, "running_var", None))
        yield


@contextmanager
def extra_pass(model: nn.Module, mode: BatchNormMode) -> Iterator[nn.Module]:
    """Yield what to run instead of the model in a pass that is not the step's own.

    Gradient checkpointing calls parts of the model again during the backward, when this context has ended. So that it
    finds them as they are now, the pass goes through a replica, which keeps its settings.
    """
    with batch_norm_mode(model, mode), ExitStack() as stack:
        if mode == "update":
            yield model
        elif isinstance(model, DistributedDataParallel):  # whose own attributes change from pass to pass
            stack.enter_context(attribute(model, "module", _replicate(model.module, {})))
            yield model
        else:
            yield _replicate(model, {})


def _replicate(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules, which shares parameters and hooks with the original; settings and buffers are its own.

    Args:
        module: root of the tree.
        made: replicas so far, so that a module that appears twice has one.
    """
    if not module._modules and not module._buffers:  # nothing of its own that a mode would change
        return module
    if isinstance(module, torch.jit.ScriptModule):  # is no tree of Python objects
        return module
    if module not in made:
        replica = made[module] = object.__new__(type(module))
        replica.__dict__ = {
            **vars(module),
            # Normalisation layers have been taken care of; copying hundreds of their buffers would cost something.
            "_buffers": {
                name: buffer if isinstance(module, _NormBase) or buffer is None else buffer.clone()
                for name, buffer in module._buffers.items()
            },
            "_modules": {
                name: None if child is None else _replicate(child, made) for name, child in module._modules.items()
            },
        }
    return made[module]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into evaluation mode, and each back into its own."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(attribute(module, "training", False))
        yield


@contextmanager
def attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a module, and set it back."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for ``torch.no_grad``: its tensors cannot take part in any graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: Any) -> Any:
    """Return a copy of a tensor that was made in inference mode, and anything else as it is."""
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor
