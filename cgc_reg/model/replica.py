"""A second tree of a model's modules, which keeps the settings of a pass after the pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cgc_reg.model.settings import attribute


@contextmanager
def replicated(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model to run in this one's place.

    Its modules share parameters and hooks with the original's; settings and buffers are as they are now, and stay so
    when the context has ended. Gradient checkpointing, which runs modules again during the backward, then finds them as
    in its first run. Not for other models: hooks and closures may reach the original, and would miss what the
    replica's forward stores.

    Args:
        model: wrapped or not.
    """
    if isinstance(model, DistributedDataParallel):  # whose own attributes change from pass to pass
        with attribute(model, "module", _replicate(model.module, {})):
            yield model
    else:
        yield _replicate(model, {})


def is_same(module: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules are one, or one is a replica of the other."""
    return module._parameters is other._parameters  # which a copy would have of its own


def _replicate(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules.

    Args:
        module: root of the tree.
        made: replicas so far, so that a module that appears twice has one.
    """
    if isinstance(module, torch.jit.ScriptModule):  # is no tree of Python objects
        return module
    if "_orig_mod" in module._modules:  # what is compiled runs the original's modules
        return _replicate(module.get_submodule("_orig_mod"), made)
    if not module._modules and not module._buffers:  # nothing of its own that a mode would change
        return module
    if module not in made:
        replica = made[module] = object.__new__(type(module))
        replica.__dict__ = {
            **{name: value for name, value in vars(module).items() if not hasattr(value, "_torchdynamo_orig_callable")},
            "_compiled_call_impl": None,
            "_buffers": dict(module._buffers),
            "_modules": {
                name: None if child is None else _replicate(child, made) for name, child in module._modules.items()
            },
        }
    return made[module]
