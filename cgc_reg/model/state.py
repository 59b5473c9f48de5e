"""Keep a pass from leaving anything behind in a model."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from cgc_reg._warn import warn_once
from cgc_reg.model.settings import attribute
from cgc_reg.model.sharded import is_sharded

BatchNormMode = Literal["preserve", "update", "eval"]

# What every module has, and is not set back as a whole: its hooks and its parameters.
_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_modules"}
# Exactly these: classes of their own, such as the outputs of transformers, may refuse to be emptied.
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_LAZY = (UninitializedParameter, UninitializedBuffer)


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
    modules = list(model.modules())
    tensors = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
    parameters = [each for module in modules for each in module._parameters.values() if each is not None]  # see `_name`
    if any(type(tensor) in _LAZY for tensor in tensors):
        raise RuntimeError(
            "`model` must be initialised by a pass of its own before one that leaves it as it was; got one whose lazy "
            "modules have not run. Call `model(x)` once, as before making the optimizer."
        )
    # To gather shards is to write them.
    versions = [] if is_sharded(model) else [_version(parameter) for parameter in parameters]
    changed: list[nn.Module] = []
    copies: dict[Tensor, Tensor] = {}  # a tensor that two modules share has one copy
    with _attributes(modules, with_buffers=mode != "update"), ExitStack() as stack:
        for module in modules:
            buffers = list(module._buffers.items()) if mode != "update" else []
            if not module.training and isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
                buffers = []  # which it does not write
            elif mode == "eval" and "running_mean" in module._buffers:  # also of a scripted one, and of a subclass
                stack.enter_context(attribute(module, "training", False))
            if buffers:
                changed.append(module)
            for name, tensor in (*buffers, *module._parameters.items()):
                if tensor is None or (name in module._parameters and not _can_be_lent(tensor)):
                    continue
                if tensor not in copies:
                    copies[tensor] = _copy(tensor)
                stack.enter_context(attribute(module, name, copies[tensor]))
        yield changed
    for at, was in enumerate(versions):
        if _version(parameters[at]) != was:
            warn_once(
                f"The model's forward writes the parameter {_name(model, at)!r}, and an extra pass has written it once "
                "more than the loop does: it is trained, or the forward reaches it by another way than its module. "
                "That is harmless where a second time changes nothing, as with a limit on norms; else move it out of "
                "the forward, into the loop.",
                model,
            )
            return


def norms_in_training(model: nn.Module) -> int:
    """Count the BatchNorms that normalise with a batch's statistics."""
    return sum(isinstance(module, _BatchNorm) and module.training for module in model.modules())


@contextmanager
def _attributes(modules: list[nn.Module], *, with_buffers: bool) -> Iterator[None]:
    """Set back what a forward stores in attributes of modules, and in the containers and tensors that these hold.

    Among the containers are those of a module's own parts, to which a forward may add some. Parameters that were there
    stay as the forward left them: FSDP puts the gathered ones in place of a process's shares, and knows that it did.

    Args:
        modules: of the model.
        with_buffers: whether buffers that the forward adds go too.
    """
    before = [(vars(module), dict(vars(module))) for module in modules]
    parameters = [(module._parameters, set(module._parameters.keys())) for module in modules]
    own = _OWN if with_buffers else _OWN | {"_buffers"}
    held = [(now, name, value) for now, values in before for name, value in values.items() if name not in own]
    contents = [(value, value.copy()) for _, _, value in held if type(value) in _CONTAINERS]
    try:
        for now, name, value in held:
            if type(value) is Tensor and not value.requires_grad:
                now[name] = value.clone()
        yield
    finally:
        for now, values in before:
            for name in now.keys() - values.keys():
                del now[name]
            now.update(values)
        for made, names in parameters:
            for name in set(made.keys()) - names:
                del made[name]
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _name(model: nn.Module, at: int) -> str:
    """Return the name of the parameter at a place in the order of `left_as_found`."""
    modules = model.named_modules()
    names = [f"{of}.{name}" for of, module in modules for name, each in module._parameters.items() if each is not None]
    return names[at].removeprefix(".")


def _can_be_lent(parameter: Tensor) -> bool:
    """Tell whether a pass may write a copy of a parameter; kinds of their own, such as quantised ones, have none."""
    return type(parameter) is nn.Parameter and not parameter.requires_grad


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _version(parameter: Tensor) -> tuple[int, int]:
    """Return what moves when a parameter is written, but for ``parameter.data.mul_`` and its like."""
    return parameter._version, parameter.data_ptr() if type(parameter) is nn.Parameter else 0
