"""Ways to run a user's model for one pass, each left as it was entered."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cgc_reg._checks import describe

BatchNormMode = Literal["preserve", "update", "eval"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {describe(model)}.")
    inner: nn.Module = model
    while True:
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = cast(nn.Module, inner.module)
        elif _is_compiled(inner):
            inner = cast(nn.Module, inner._orig_mod)
        else:
            return inner


def without_compilation(model: nn.Module, *, stacklevel: int) -> nn.Module:
    """Return the module to run in place of a compiled one; DistributedDataParallel stays around it.

    Args:
        model: wrapped or not.
        stacklevel: of the warning that a compiled model gets, as :func:`warnings.warn` counts for the caller.
    """
    inner = unwrap(model)
    if any(_is_compiled(module) or module._compiled_call_impl is not None for module in model.modules()):
        warnings.warn(
            "The model is compiled with torch.compile, which can neither differentiate a gradient nor see a hook "
            "that was added after its first call. CGC's passes run through the original, uncompiled module: they "
            "give the same numbers at the speed of eager mode.",
            stacklevel=stacklevel + 1,
        )
    while model is not inner and not isinstance(model, DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if _is_compiled(model) else model.module)
    return model


def _is_compiled(model: nn.Module) -> bool:
    # By the name of its submodule: importing OptimizedModule would load the compiler, which takes seconds.
    return "_orig_mod" in model._modules


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled inside the model, by `torch.compile(module)` or `module.compile()`, as it was written."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            if module._compiled_call_impl is not None:
                stack.enter_context(_attribute(module, "_compiled_call_impl", None))
            for name, child in module.named_children():
                if _is_compiled(child) and not _is_compiled(module):
                    stack.enter_context(_attribute(module, name, child._orig_mod))
        yield


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Keep an extra pass through DistributedDataParallel from broadcasting buffers, which would overwrite them."""
    with _attribute(model, "broadcast_buffers", False) if isinstance(model, DistributedDataParallel) else nullcontext():
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
                stack.enter_context(_attribute(module, "training", False))
                # Autograd keeps these by reference, and a later pass may overwrite them before the backward.
                for name in ("running_mean", "running_var"):
                    stack.enter_context(_attribute(module, name, getattr(module, name).clone()))
            elif isinstance(module, _BatchNorm):
                stack.enter_context(_attribute(module, "track_running_stats", False))
            else:  # InstanceNorm writes to whatever running statistics it holds.
                stack.enter_context(_attribute(module, "running_mean", None))
                stack.enter_context(_attribute(module, "running_var", None))
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
            stack.enter_context(_attribute(model, "module", _replicate(model.module, {})))
            yield model
        else:
            yield _replicate(model, {})


def _replicate(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules, which shares parameters and hooks with the original; settings and buffers are its own.

    Args:
        module: root of the tree.
        made: replicas so far, so that a module that appears twice has one.
    """
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
            stack.enter_context(_attribute(module, "training", False))
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
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
