"""Change a setting of a user's module, and set it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

from torch import nn


@contextmanager
def attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a module, and set it back."""
    before = getattr(module, name)
    try:
        setattr(module, name, value)
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def own_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give a module a method of its own, in place of that of its class or of another one of its own."""
    before = vars(module).get(name)
    try:
        vars(module)[name] = method
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before


@contextmanager
def evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Set the flag of evaluation mode in every module of the model, and each back."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(attribute(module, "training", False))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into evaluation mode, and each back into its own."""
    own = [module for module in model.modules() if module.training and _has_train_of_its_own(module)]
    with evaluation_flags(model):
        # A `train` of their own may prepare what evaluation needs, or merge weights, and undo that, as LeViT's does.
        try:
            for module in own:
                module.train(False)
            yield
        finally:
            for module in own:
                module.train()


def _has_train_of_its_own(module: nn.Module) -> bool:
    """Tell whether a module does more than set flags in `train(mode)`; some use that name for another thing."""
    own = type(module).train
    return own is not nn.Module.train and "mode" in signature(own).parameters
