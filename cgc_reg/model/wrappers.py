"""What may stand around a user's model, and how to look through it: data parallelism, compilation, an exposed layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cgc_reg._checks import describe
from cgc_reg._warn import warn_once
from cgc_reg.model.layers import find_layer
from cgc_reg.model.settings import attribute


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
        _, layer = find_layer(self.model, self.target_layer)
        handle = layer.register_forward_hook(keep)
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

    PyTorch cannot differentiate twice through a compiled graph, so that a model that is compiled as a whole runs as
    written. :class:`CAM` needs no inner gradient: with it, both passes of a step use the compiled graph. The wrapped
    model returns its output and the layer's; it shares the original's parameters, and the original stays usable.

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
        >>> reg = CGCRegularizer(CAM("layer4"))
        >>> out = reg.compute(model, torch.rand(4, 3, 64, 64))
        >>> out.loss.backward()
    """
    find_layer(unwrap(model), target_layer)
    return ExposedLayer(model, target_layer)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {describe(model)}.")
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around the user's own module; None without one."""
    unwrap(model)  # refuses what is no module
    around: nn.Module | None = model
    while around is not None and not isinstance(around, DistributedDataParallel):
        around = _inside(around)
    return around


def inside_data_parallel(model: nn.Module) -> nn.Module:
    """Return what DistributedDataParallel runs; a model that is not in one as it is."""
    parallel = data_parallel(model)
    return model if parallel is None else cast(nn.Module, parallel.module)


def warn_if_one_device(model: nn.Module) -> None:
    """Warn, once for each model, that DataParallel's other devices have nothing to do."""
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        warn_once(
            f"The model is in DataParallel over {len(model.device_ids)} devices, and passes for heatmaps run on one: "
            "its copies of a model last for one pass, and heatmaps need a graph in the model itself. Take "
            "DistributedDataParallel, which uses all.",
            model,
        )


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Keep an extra pass through DistributedDataParallel from broadcasting buffers, which would overwrite them."""
    parallel = data_parallel(model)
    with ExitStack() as stack:
        if parallel is not None:
            stack.enter_context(attribute(parallel, "broadcast_buffers", False))
        yield


def holds_original(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile`` makes of another."""
    # By the name of its submodule: importing OptimizedModule would load the compiler, which takes seconds.
    return "_orig_mod" in module._modules


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return cast(nn.Module, model.module)
    if isinstance(model, ExposedLayer):
        return model.model
    return cast(nn.Module, model._orig_mod) if holds_original(model) else None
