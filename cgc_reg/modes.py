"""Ways to run a user's model for one pass, each left as it was entered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

BatchNormMode = Literal["preserve", "update", "eval"]


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Keep an extra pass through DistributedDataParallel from broadcasting buffers, which would overwrite them."""
    with attribute(model, "broadcast_buffers", False) if isinstance(model, DistributedDataParallel) else nullcontext():
        yield


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[list[nn.Module]]:
    """Run a pass that is not the step's own: without a trace in any buffer, unless the mode is "update".

    Running statistics are kept by never being written, and other buffers by lending copies: writing them back
    afterwards would be seen by autograd as a change to what it saved.

    Yields:
        The modules whose settings or buffers are other ones now.
    """
    changed: list[nn.Module] = []
    copies: dict[Tensor, Tensor] = {}  # a buffer that two modules share has one copy
    with ExitStack() as stack:
        for module in model.modules() if mode != "update" else ():
            norm = "running_mean" in module._buffers  # also of a scripted one, which has no class of its own
            keeps_statistics = norm and module.training and module.running_mean is not None
            if keeps_statistics and mode == "eval":
                stack.enter_context(attribute(module, "training", False))
            if norm and not keeps_statistics:
                continue
            if keeps_statistics and mode == "preserve" and _is_torchs_batch_norm(module):
                stack.enter_context(attribute(module, "track_running_stats", False))
                changed.append(module)
                continue
            buffers = list(module.named_buffers(recurse=False))
            for name, buffer in buffers:
                if buffer not in copies:
                    copies[buffer] = buffer.clone()
                stack.enter_context(_buffer(module, name, copies[buffer]))
            if buffers:
                changed.append(module)
        yield changed


def norms_in_training(model: nn.Module) -> int:
    """Count the BatchNorms that normalise with a batch's statistics."""
    return sum(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def _is_torchs_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module heeds `track_running_stats`, which a forward of somebody's own need not."""
    return isinstance(module, _BatchNorm) and getattr(module.forward, "__module__", "").startswith("torch.")


@contextmanager
def _buffer(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    if isinstance(module, torch.jit.ScriptModule):  # whose buffers live elsewhere
        with attribute(module, name, value):
            yield
        return
    before = module._buffers[name]
    module._buffers[name] = value
    try:
        yield
    finally:
        module._buffers[name] = before


def take_buffers_out_of_graph(model: nn.Module) -> None:
    """Detach each buffer that has a gradient to hand on, which no buffer should."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.grad_fn is not None and buffer._is_view():  # cannot be detached in place
                setattr(module, name, buffer.detach())
            elif buffer.grad_fn is not None:
                buffer.detach_()


@dataclass
class ExtraPass:
    """What to run in a pass that is not the step's own, and what it showed about gradient checkpointing."""

    running: nn.Module
    changed: list[nn.Module]
    checkpointed: list[nn.Module] = field(default_factory=list)  # changed modules that a checkpoint will run again
    without_gradients: list[nn.Module] = field(default_factory=list)  # and those that a reentrant one may


@contextmanager
def extra_pass(model: nn.Module, mode: BatchNormMode, *, replica: bool) -> Iterator[ExtraPass]:
    """Prepare a pass in a mode of its own.

    Args:
        model: wrapped or not.
        mode: see :func:`batch_norm_mode`.
        replica: run a copy of the tree of modules, which keeps the settings when this context has ended. Gradient
            checkpointing, which runs modules again during the backward, then finds them as they are now. Not for other
            models: hooks and closures may reach the original, and would miss what the replica's forward stores.
    """
    grad_enabled = torch.is_grad_enabled()
    with batch_norm_mode(model, mode) as changed, ExitStack() as stack:
        extra = ExtraPass(model, changed)

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if _inside_checkpoint():
                extra.checkpointed.append(module)
            elif grad_enabled and not torch.is_grad_enabled():
                extra.without_gradients.append(module)

        for module in changed:
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(look).remove)
        if replica and isinstance(model, DistributedDataParallel):  # whose own attributes change from pass to pass
            stack.enter_context(attribute(model, "module", _replicate(model.module, {})))
        elif replica:
            extra.running = _replicate(model, {})
        yield extra


def _inside_checkpoint() -> bool:
    """Tell whether a non-reentrant checkpoint is being recorded; torch 2.6 cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)(False)
    return top is not None and "checkpoint" in getattr(top[0], "__qualname__", "")


def _replicate(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules, which shares parameters and hooks with the original; settings and buffers are its own.

    Args:
        module: root of the tree.
        made: replicas so far, so that a module that appears twice has one.
    """
    if isinstance(module, torch.jit.ScriptModule):  # is no tree of Python objects
        return module
    if not module._modules and not module._buffers:  # nothing of its own that a mode would change
        return module
    if module not in made:
        replica = made[module] = object.__new__(type(module))
        replica.__dict__ = {
            **vars(module),
            "_buffers": dict(module._buffers),
            "_modules": {
                name: None if child is None else _replicate(child, made) for name, child in module._modules.items()
            },
        }
    return made[module]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into evaluation mode, and each back into its own."""
    before = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module in before:
            stack.enter_context(attribute(module, "training", False))
        try:
            yield
        finally:
            # A `train` of their own may forget what a forward has stored for evaluation, as LeViT's does.
            for module, was in before.items():
                if was and _has_train_of_its_own(module):
                    module.train()


def _has_train_of_its_own(module: nn.Module) -> bool:
    """Tell whether a module does more than set flags in `train(mode)`; some use that name for another thing."""
    own = type(module).train
    return own is not nn.Module.train and "mode" in signature(own).parameters


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
