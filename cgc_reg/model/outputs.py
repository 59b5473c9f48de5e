"""Find the class scores in what a model returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cgc_reg._checks import describe

OutputFunction = Callable[[Any], Tensor]


def find_logits(output: Any, output_fn: OutputFunction | None, batch_size: int) -> Tensor:
    """Return the logits (n, k) in a model's output.

    Without ``output_fn`` these are the output itself, its ``logits`` (attribute or entry) or the only tensor of that
    shape in a tuple or list.
    """
    logits: object = output
    if output_fn is not None:
        logits = output_fn(output)
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)):
        fitting = [
            entry
            for entry in output
            if isinstance(entry, Tensor) and entry.is_floating_point() and entry.shape[:-1] == (batch_size,)
        ]
        if len(fitting) > 1:
            raise ValueError(
                f"The model's output must hold one tensor of shape ({batch_size}, classes); got {len(fitting)}, "
                f"{describe(output)}, of which an embedding may be one. Pass `output_fn`, such as `lambda output: "
                "output[0]`."
            )
        logits = fitting[0] if fitting else output
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size:
        source = "`output_fn` must return" if output_fn is not None else "The model's output must be, or hold,"
        got = describe(logits if isinstance(logits, Tensor) else output)
        raise ValueError(
            f"{source} logits of shape ({batch_size}, classes); got {got}. Pass `output_fn`, a function from the "
            "model's output to those logits."
        )
    return logits
