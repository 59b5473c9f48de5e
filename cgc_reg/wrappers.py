"""What may stand around a user's model, and how to look through it: data parallelism, compilation, an exposed layer."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cgc_reg._checks import describe
from cgc_reg.modes import attribute


class ExposedLayer(nn.Module):
    """A model with a layer's output beside its own; made by :func:`expose_layer`."""

    def __init__(self, model: nn.Module, target_layer: str) -> None:
        super().__init__()
        self.model = model
        self.target_layer = target_layer

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return the model's output, and the layer's."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            kept.append(output)
            return output.clone()  # an in-place layer behind it leaves the kept one alone

        # The compiler traces the hook's whole life and puts the layer's output among those of the graph.
        handle = find_layer(self.model, self.target_layer).register_forward_hook(keep)
        try:
            output = self.model(x)
        finally:
            handle.remove()
        if len(kept) != 1:
            raise RuntimeError(
                f"`target_layer` must be a layer that the model calls once in a pass; got {self.target_layer!r}, which "
                f"it called {len(kept)} times. Name another. If this model, or one of its class, has run compiled "
                "without `expose_layer`, torch.compile took that graph for this one: call `torch.compiler.reset()` and "
                "compile only what `expose_layer` returns."
            )
        return output, kept[0]


def expose_layer(model: nn.Module, target_layer: str) -> ExposedLayer:
    """Wrap a model so that it can be compiled and still show the layer that its heatmaps are made of.

    PyTorch cannot differentiate twice through a compiled graph, so a compiled model is otherwise run uncompiled. The
    rule ``"class_activation"`` needs no inner gradient: with it, both passes use the compiled graph. The wrapped model
    returns its output and the layer's; it shares the original's parameters, and the original stays usable.

    Args:
        model: a CNN that ends in global average pooling and one linear layer, see :func:`check_closed_form`.
        target_layer: dotted name of the layer before the pooling.

    Returns:
        The module to compile, and to put into DistributedDataParallel after that.

    Raises:
        TypeError, ValueError: the model is no module, or has no such layer.

    Example:
        >>> resnet = torchvision.models.resnet18(num_classes=10)
        >>> model = torch.compile(expose_layer(resnet, "layer4"), backend="eager")
        >>> reg = CGCRegularizer("layer4", heatmap="class_activation")
        >>> out = reg.compute(model, torch.rand(4, 3, 64, 64))
        >>> out.loss.backward()
    """
    find_layer(unwrap(model), target_layer)
    return ExposedLayer(model, target_layer)


def compiled_exposed_layer(model: nn.Module) -> ExposedLayer | None:
    """Return what was compiled if that is an exposed layer, in DistributedDataParallel or not."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    compiled = inner._orig_mod if _is_compiled(inner) else inner
    if isinstance(compiled, ExposedLayer) and (compiled is not inner or inner._compiled_call_impl is not None):
        return compiled
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {describe(model)}.")
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def without_compilation(model: nn.Module, *, stacklevel: int) -> nn.Module:
    """Return the module to run in place of a compiled one; DistributedDataParallel stays around it.

    Args:
        model: wrapped or not.
        stacklevel: of the warning that a compiled model gets, as :func:`warnings.warn` counts for the caller.
    """
    unwrap(model)  # refuses what is no module
    if is_compiled(model):
        warnings.warn(
            "The model is compiled with torch.compile, which can neither differentiate a gradient nor see a hook "
            "that was added after its first call. CGC's passes run through the original, uncompiled module: they "
            "give the same numbers at the speed of eager mode. For the rule 'class_activation', `expose_layer` keeps "
            "the compiled graph.",
            stacklevel=stacklevel + 1,
        )
    while not isinstance(model, DistributedDataParallel) and (inner := _inside(model)) is not None:
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Tell whether the model or a part of it is compiled."""
    return any(
        _is_compiled(module) or module._compiled_call_impl is not None or _original_forward(module) is not None
        for module in model.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled inside the model as it was written.

    That is by ``torch.compile(module)``, ``module.compile()`` or ``module.forward = torch.compile(module.forward)``.
    """
    with ExitStack() as stack:
        for module in list(model.modules()):
            forward = _original_forward(module)
            if forward is not None:
                stack.enter_context(attribute(module, "forward", forward))
            if module._compiled_call_impl is not None:
                stack.enter_context(attribute(module, "_compiled_call_impl", None))
            for name, child in module.named_children():
                if (_is_compiled(child) or isinstance(child, ExposedLayer)) and not _is_compiled(module):
                    stack.enter_context(attribute(module, name, unwrap(child)))
        yield


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule of an unwrapped model by its dotted name."""
    modules: dict[str, nn.Module] = {
        without_compilers(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    name = without_compilers(name)
    while name.startswith("module.") and name not in modules:
        name = name.partition(".")[2]
    # An average of weights, such as torch's AveragedModel, holds the model as its `module`.
    for known in (name, f"module.{name}"):
        if name and known in modules:
            return modules[known]
    close = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [top for top, _ in model.named_children()]
    raise ValueError(
        f"`target_layer` must be the dotted name of a layer of {type(model).__name__}; got {name!r}. Do you mean "
        f"{' or '.join(repr(match) for match in close)}? All names: `dict(model.named_modules())`."
    )


def without_compilers(name: str) -> str:
    """Return a module's dotted name as it was before it, or what holds it, was compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return cast(nn.Module, model.module)
    if isinstance(model, ExposedLayer):
        return model.model
    return cast(nn.Module, model._orig_mod) if _is_compiled(model) else None


def _is_compiled(model: nn.Module) -> bool:
    # By the name of its submodule: importing OptimizedModule would load the compiler, which takes seconds.
    return "_orig_mod" in model._modules


def _original_forward(module: nn.Module) -> Any:
    return getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
