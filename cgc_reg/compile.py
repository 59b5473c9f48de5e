"""Compile of a model what can stay compiled where heatmaps are trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._checks import check_images
from cgc_reg.model.capture import not_called
from cgc_reg.model.compilation import enclosing, is_compiled
from cgc_reg.model.given import ordinary
from cgc_reg.model.hooks import forward_hook
from cgc_reg.model.layers import check_layer, find_layer, telling_dimensions
from cgc_reg.model.sharded import is_sharded, sharded_after
from cgc_reg.model.state import left_as_found
from cgc_reg.model.wrappers import unwrap

_NUMBERS = itertools.count()  # of the parts that this process has compiled


class CompiledParts:
    """The parts of a model that :func:`compile_below` has compiled.

    Attributes:
        names: of these modules, in the order in which they run.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.names = list(parts)
        self._parts = list(parts.values())

    def remove(self) -> None:
        """Let these parts run as written again."""
        for part in self._parts:
            vars(part).pop("_compiled_call_impl", None)  # which a copy has not
        self._parts = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"


def compile_below(model: nn.Module, x: Tensor, target_layer: str | nn.Module, **options: Any) -> CompiledParts:
    """Compile, in place, what a model runs before the output of the layer that heatmaps are made of is complete.

    PyTorch has no second derivative of a compiled graph, and heatmaps that are trained on need one from the layer's
    output on. Everything before is differentiated once and may be compiled: in passes for heatmaps, of each explainer
    of one layer, these parts stay so. They are as few and as large as can be: the children of the modules that hold
    the layer, and the layer itself, where they multiply matrices or convolve. What is around them, such as a norm on
    its own, and the head, runs as written.

    The model itself changes: ``model(x)`` runs these parts compiled too. Parameters, buffers and the keys of a
    ``state_dict`` stay what they are. A copy of the model, or one from a file, runs as written, since compiled code
    belongs to its modules: call this for the copy.

    Args:
        model: wrapped or not, and not compiled.
        x: images (n, c, h, w), for one pass in which to see what runs when; it leaves no trace.
        target_layer: dotted name of the layer, or the layer itself.
        options: of :func:`torch.compile`.

    Returns:
        What was compiled; its ``remove()`` undoes that.

    Raises:
        ValueError: the model has no such layer, or is compiled already, or has nothing to compile, or parts that
            ``fully_shard`` has sharded; or ``target_layer`` names none.
        RuntimeError: the layer is not called.

    Example:
        >>> model, x = torchvision.models.resnet18(num_classes=10), torch.rand(2, 3, 64, 64)
        >>> parts = compile_below(model, x, "layer4", backend="eager")
        >>> parts
        CompiledParts(conv1, layer1, layer2, layer3, layer4)
        >>> heatmap = GradCAM("layer4")(model, x).heatmap
        >>> parts.remove()
    """
    check_images("x", x)
    check_layer(target_layer)
    inner = unwrap(model)
    name, layer = find_layer(inner, target_layer)
    if is_compiled(model, layer):
        raise ValueError(
            "`model` must not be compiled yet, since `compile_below` chooses what can be; got a model of which parts "
            "are. Leave out `torch.compile`, or call `remove()` on what an earlier call returned."
        )
    finished = _finished_before(inner, ordinary(x), name, layer)
    largest = set(_largest(inner, set(enclosing(inner, layer)), finished))
    inside = {module for part in largest for module in part.modules() if module is not part}
    names = {module: name for name, module in inner.named_modules()}
    parts = {names[module]: module for module in finished if module in largest - inside}
    if not parts:
        raise ValueError(
            f"`model` must run modules that convolve or multiply matrices before the output of {name!r} is complete; "
            "got one that runs none. What it computes by functions is compiled by `torch.compile` of these."
        )
    sharded = [name for name, part in parts.items() if is_sharded(part)]
    if sharded:
        raise ValueError(
            f"`model` must have parts that are not sharded on their own; got {', '.join(map(repr, sharded))}, whose "
            "hooks the compiler stops at. Compile what they hook: `part.forward = torch.compile(part.forward)`."
        )
    for part in parts.values():
        part._compiled_call_impl = torch.compile(_with_code_of_its_own(part._call_impl), **options)
    return CompiledParts(parts)


def _finished_before(model: nn.Module, x: Tensor, name: str, layer: nn.Module) -> dict[nn.Module, bool]:
    """Run the model; tell of each module that ran whether it had done so for good when the layer's output was there."""
    finished: dict[nn.Module, bool] = {}
    past = False

    def end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal past
        finished[module] = not past
        past = past or module is layer

    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hook, and is compiled in a way of its own
                stack.enter_context(forward_hook(module, end))
        stack.enter_context(sharded_after(model))
        stack.enter_context(left_as_found(model))
        stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(telling_dimensions(model, x))
        model(x.clone())  # which it may change in place
    if layer not in finished:
        raise not_called(name, layer)
    return finished


def _largest(model: nn.Module, around: Collection[nn.Module], finished: dict[nn.Module, bool]) -> Iterable[nn.Module]:
    """Give the outermost modules with a product inside that run before the layer's output is there, but not around it.

    A module with two names may be given by one of them, and be inside another by the other.

    A norm or an activation on its own is one kernel as written too, and each part's borders cost a change of layout.
    """
    for child in model.children():
        if child in around or child not in finished:
            yield from _largest(child, around, finished)
        elif finished[child] and any(weight.ndim > 1 for weight in child.parameters()):
            yield child


def _with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in one whose code is no other's, and has a name that is no other's.

    The compiler counts what it compiles anew by code. What sizes change from call to call it remembers by name, and
    would take each part for the one before it with images of another size.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return call
