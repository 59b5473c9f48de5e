"""What ``torch.compile`` has compiled of a model: which parts of it a pass keeps so, and which it runs as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from cgc_reg._warn import warn_once
from cgc_reg.model.checkpoints import note_if_run_again, stored, watched_as_written
from cgc_reg.model.layers import find_layer
from cgc_reg.model.settings import attribute, own_method
from cgc_reg.model.wrappers import ExposedLayer, holds_original, inside_data_parallel, unwrap


def warn_if_compiled(model: nn.Module) -> None:
    """Warn, once for each model, that all that is compiled of it runs as written."""
    if is_compiled(model):
        warn_once(
            "What is compiled of the model runs as written, since the explainer may look at all layers, and PyTorch "
            "has no second derivative of a compiled graph. Explainers of one layer keep what is compiled before it.",
            unwrap(model),
        )


def is_compiled(model: nn.Module, target_layer: str | nn.Module | None = None) -> bool:
    """Tell whether a module of the model is compiled, or a method: of what holds the layer, or without one of any."""
    anything = any(_is_compiled(module) or _compiled_methods(module) for module in model.modules())
    if not anything or target_layer is None:
        return anything
    _, layer = find_layer(unwrap(model), target_layer)
    return bool(regions(model, target_layer) or _compiled_around(model, layer))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled inside the model as it was written.

    That is by ``torch.compile(module)``, ``module.compile()`` or ``method = torch.compile(method)``; in the module's
    class the forward alone.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_as_written(module))
        yield


@contextmanager
def compiled_below(
    model: nn.Module,
    target_layer: str | nn.Module,
    is_past: Callable[[], bool],
    as_written: Callable[[nn.Module], AbstractContextManager[None]],
) -> Iterator[None]:
    """Keep what is compiled of the model up to a layer's output, and run the rest as written.

    PyTorch has no second derivative of a compiled graph, and the heatmap's inner gradient ends at the layer: what a
    pass has completed before needs none. What encloses the layer, and what follows it, does.

    Args:
        model: wrapped or not.
        target_layer: dotted name in the unwrapped model, or the layer itself.
        is_past: tells whether the pass going on has come past the layer's output.
        as_written: a context for each part behind the layer, while it runs as written.
    """
    if not is_compiled(model):
        yield
        return
    _, layer = find_layer(unwrap(model), target_layer)
    around = _compiled_around(model, layer)
    trains, lost = torch.is_grad_enabled(), bool(around)  # training is what the time counts for

    def lose() -> None:
        nonlocal lost
        lost = True

    with ExitStack() as stack:
        for module in around:
            stack.enter_context(_as_written(module))
        for region in regions(model, target_layer):
            # Where the layer itself is called again, what looks at its output refuses that.
            ends = is_past if region is not layer else _never
            stack.enter_context(_until(region, ends, lose, as_written))
        yield
    if trains and lost:  # now, and not from inside the model's code, so that the warning names the user's line
        _warn_of_loss(model)


def _never() -> bool:
    return False


def enclosing(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """List the modules that hold the layer, from the model on."""
    return [module for module in model.modules() if module is not layer and layer in module.modules()]


def _compiled_around(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """List those of them that are compiled, or have a compiled method, as timm's ``forward_features``."""
    return [module for module in enclosing(model, layer) if _is_compiled(module) or _compiled_methods(module)]


def regions(model: nn.Module, target_layer: str | nn.Module | None) -> list[nn.Module]:
    """List the outermost compiled modules that do not enclose the layer; none without one, when all runs as written."""
    if target_layer is None or not is_compiled(model):
        return []
    _, layer = find_layer(unwrap(model), target_layer)
    return list(dict.fromkeys(_outermost(model, around=set(enclosing(model, layer)))))  # in order, each once


def _outermost(module: nn.Module, around: set[nn.Module]) -> Iterator[nn.Module]:
    if _is_compiled(module) and module not in around:
        yield module
    else:
        for child in module.children():
            yield from _outermost(child, around)


@contextmanager
def _until(
    region: nn.Module,
    is_past: Callable[[], bool],
    lose: Callable[[], None],
    as_written: Callable[[nn.Module], AbstractContextManager[None]],
) -> Iterator[None]:
    """Run a compiled module compiled until the pass is past the layer, and as written from then on."""

    def choose(compiled: Callable[..., Any], written: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            note_if_run_again(region)
            if not is_past():
                return compiled(*args, **kwargs)
            lose()
            with uncompiled(region), as_written(region), watched_as_written(region), stored():
                return written(*args, **kwargs)

        return run

    compiled_call, original = region._compiled_call_impl, _compiled_methods(region).get("forward")
    with ExitStack() as stack:
        if compiled_call is not None:
            stack.enter_context(attribute(region, "_compiled_call_impl", choose(compiled_call, region._call_impl)))
        elif original is not None:
            stack.enter_context(own_method(region, "forward", choose(region.forward, original)))
        yield


def compiled_exposed_layer(model: nn.Module) -> ExposedLayer | None:
    """Return what was compiled if that is an exposed layer, in DistributedDataParallel or not."""
    inner = inside_data_parallel(model)
    compiled = inner._orig_mod if holds_original(inner) else inner
    if isinstance(compiled, ExposedLayer) and (compiled is not inner or inner._compiled_call_impl is not None):
        return compiled
    return None


@contextmanager
def _as_written(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for name, original in _compiled_methods(module).items():
            stack.enter_context(own_method(module, name, _storing(original)))
        if module._compiled_call_impl is not None:
            stack.enter_context(attribute(module, "_compiled_call_impl", _storing(module._call_impl)))
        yield


def _storing(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with stored():
            return call(*args, **kwargs)

    return run


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "forward" in _compiled_methods(module)


def _compiled_methods(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return what was compiled of its methods, by name: any in the module, and the forward in its class."""
    own = vars(module)
    found = {name: original for name, value in own.items() if (original := _original(value)) is not None}
    found.pop("_compiled_call_impl", None)
    for holder in type(module).__mro__ if "forward" not in own else ():
        if "forward" in vars(holder):  # not by `getattr`, which a scripted class does not stand
            original = _original(vars(holder)["forward"])
            return found if original is None else {**found, "forward": MethodType(original, module)}
    return found


def _original(value: object) -> Callable[..., Any] | None:
    """Return the function that ``torch.compile`` made this one of; None of any other, also of one around that."""
    if isinstance(value, MethodType):
        function = _original(value.__func__)
        return None if function is None else MethodType(function, value.__self__)
    if not isinstance(value, FunctionType) or getattr(value, "_torchdynamo_disable", False):
        return None
    original: Callable[..., Any] | None = vars(value).get("_torchdynamo_orig_callable")
    return original if vars(value).get("__wrapped__") is original else None


def _warn_of_loss(model: nn.Module) -> None:
    warn_once(
        "What is compiled of the model around the layer of the heatmaps, or behind it, runs as written, since PyTorch "
        "has no second derivative of a compiled graph. The numbers are the same, at the speed of eager mode. Compile "
        "what comes before the layer's output: `compile_below(model, x, target_layer)` in place of "
        "`torch.compile(model)`.",
        unwrap(model),
    )
