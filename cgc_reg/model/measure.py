"""A pass that the user makes without gradients, though a heatmap needs them inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# What a tensor in a graph refuses, and one without gives.
_GIVEN_WITHOUT = frozenset({Tensor.numpy, Tensor.__array__, Tensor.__deepcopy__, Tensor.__dlpack__})


class _Detached(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _GIVEN_WITHOUT:
            args = (args[0].detach(), *args[1:])
        return function(*args, **(kwargs or {}))


@contextmanager
def as_without_gradients() -> Iterator[None]:
    """Let the model's code take values out of its tensors, such as by ``numpy``, as it may under ``torch.no_grad``."""
    with _Detached():
        yield
