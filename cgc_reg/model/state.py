"""Keep a pass from leaving anything behind in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from cgc_reg._warn import warn
from cgc_reg.model.settings import attribute

BatchNormMode = Literal["preserve", "update", "eval"]

# What every module has, and no forward sets.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Models that were warned of.
_WARNED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def left_as_found(model: nn.Module, mode: BatchNormMode = "preserve") -> Iterator[list[nn.Module]]:
    """Make a pass whose writes are gone after it.

    Buffers, and parameters that are frozen, such as those of a momentum teacher that the forward moves, are lent as
    copies: writing them back would be seen by autograd as a change to what it saved. Attributes, such as an auxiliary
    loss for the loop to read, are set back. A parameter that is trained cannot be lent, since the copy would get its
    gradient; a forward that writes it is warned of.

    Args:
        model: not wrapped.
        mode: of BatchNorm. ``"preserve"`` is as above; ``"eval"`` lets norms in training that keep running statistics
            normalise with those; ``"update"`` lends no buffers, of any module.

    Yields:
        The modules whose settings or buffers are other ones now.

    Raises:
        RuntimeError: no pass has initialised the model's lazy modules.
    """
    parameters = dict(model.named_parameters())
    if any(is_lazy(tensor) for tensor in (*parameters.values(), *model.buffers())):
        raise RuntimeError(
            "`model` must be initialised by a pass of its own before one that leaves it as it was; got one whose lazy "
            "modules have not run. Call `model(x)` once, as before making the optimizer."
        )
    before = {name: _version(parameter) for name, parameter in parameters.items()}
    changed: list[nn.Module] = []
    copies: dict[Tensor, Tensor] = {}  # a tensor that two modules share has one copy
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_attributes(module))
            buffers = list(module.named_buffers(recurse=False)) if mode != "update" else []
            if "running_mean" in module._buffers:  # also of a scripted one, which has no class of its own
                if not module.training:
                    buffers = []  # which it does not write
                elif mode == "eval":
                    stack.enter_context(attribute(module, "training", False))
            if buffers:
                changed.append(module)
            for name, tensor in (*buffers, *_frozen(module)):
                if tensor not in copies:
                    copies[tensor] = _copy(tensor)
                stack.enter_context(attribute(module, name, copies[tensor]))
        yield changed
    written = [name for name, parameter in parameters.items() if _version(parameter) != before[name]]
    if written and model not in _WARNED:
        _WARNED.add(model)
        warn(
            f"The model's forward writes {written[0]!r}, a parameter that is trained, and an extra pass has written it "
            "once more than the loop does. That is harmless where a second time changes nothing, as with a limit on "
            "norms; else move it out of the forward, into the loop."
        )


def norms_in_training(model: nn.Module) -> int:
    """Count the BatchNorms that normalise with a batch's statistics."""
    return sum(isinstance(module, _BatchNorm) and module.training for module in model.modules())


@contextmanager
def _attributes(module: nn.Module) -> Iterator[None]:
    """Set back what a forward stores in attributes of a module, and in dictionaries and lists that these hold."""
    before = dict(vars(module))
    contents = [
        (value, value.copy())
        for name, value in before.items()
        if name not in _OF_EVERY_MODULE and type(value) in (dict, list)
    ]
    try:
        yield
    finally:
        for name in [name for name in vars(module) if name not in before]:
            del vars(module)[name]
        vars(module).update(before)
        for value, content in contents:
            value.clear()
            (value.update if isinstance(value, dict) else value.extend)(content)


def _frozen(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """List a module's frozen parameters; kinds of their own, such as sharded or quantised ones, cannot be copied."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if type(parameter) is nn.Parameter and not parameter.requires_grad
    ]


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _version(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Return what moves when a parameter is written, but for ``parameter.data.mul_`` and its like."""
    return (parameter._version, parameter.data_ptr()) if type(parameter) is nn.Parameter else ()
