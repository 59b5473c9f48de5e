"""Run a model that ``torch.compile`` has compiled, or a part of it, as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from cgc_reg._warn import warn_once
from cgc_reg.model.settings import attribute
from cgc_reg.model.wrappers import ExposedLayer, holds_original, inside_data_parallel, unwrap


def warn_if_compiled(model: nn.Module) -> None:
    """Warn, once for each model, that what is compiled of it runs as written."""
    if is_compiled(model):
        warn_once(
            "The model is compiled with torch.compile, which can neither differentiate a gradient nor see a hook "
            "that was added after its first call. Passes for heatmaps run through the original, uncompiled module: "
            "they give the same numbers at the speed of eager mode. For `CAM`, `expose_layer` keeps the compiled "
            "graph.",
            unwrap(model),
        )


def is_compiled(model: nn.Module) -> bool:
    """Tell whether the model or a part of it is compiled."""
    return any(
        module._compiled_call_impl is not None or _original_forward(module) is not None for module in model.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled inside the model as it was written.

    That is by ``torch.compile(module)``, ``module.compile()`` or ``module.forward = torch.compile(module.forward)``.
    """
    with ExitStack() as stack:
        for module in model.modules():
            forward = _original_forward(module)
            if forward is not None:
                stack.enter_context(attribute(module, "forward", forward))
            if module._compiled_call_impl is not None:
                stack.enter_context(attribute(module, "_compiled_call_impl", None))
        yield


def compiled_exposed_layer(model: nn.Module) -> ExposedLayer | None:
    """Return what was compiled if that is an exposed layer, in DistributedDataParallel or not."""
    inner = inside_data_parallel(model)
    compiled = inner._orig_mod if holds_original(inner) else inner
    if isinstance(compiled, ExposedLayer) and (compiled is not inner or inner._compiled_call_impl is not None):
        return compiled
    return None


def _original_forward(module: nn.Module) -> Any:
    return getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
