"""Keep what the layers of a pass add to their results: their biases, and where in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cgc_reg._precision import at_least_float32


@dataclass(frozen=True)
class Bias:
    """What one operation of a pass added to its result.

    Attributes:
        value: makes it, in a shape that fits the result, such as (c, 1, 1). It is called after the pass: what is
            computed inside a checkpoint must be what its second run computes.
        place: zeros in the shape of the result, which were added too: the gradient of a score by them is that by the
            result, also where something changes the result in place.
        channels_last: whether the channels that it goes by are the result's last dimension, as for a linear layer, and
            not dimension 1.
    """

    value: Callable[[], Tensor]
    place: Tensor
    channels_last: bool


# The operations that add a bias: where it stands among their arguments, and whether it runs along channels, dimension
# 1, or along the last dimensions.
_ADDING: dict[Callable[..., Any], tuple[int, bool]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (2, True)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (2, True)),
    F.linear: (2, False),
    F.group_norm: (3, True),
    F.layer_norm: (3, False),
    F.instance_norm: (4, True),
}


@contextmanager
def kept_biases() -> Iterator[list[Bias]]:
    r"""Keep the biases of the pass that is made inside this context, in its order.

    They are found at the operations, whatever module calls them: convolutions, linear layers and norms. BatchNorm has
    an implicit bias, :math:`\beta - \gamma \mu / \sigma`, with the statistics that it normalises with. What a model
    adds by another operation, such as ``x + self.bias``, is not found. Weights that are normalised add nothing.
    """
    found: list[Bias] = []
    with _Watch(found):
        yield found


class _Watch(TorchFunctionMode):
    def __init__(self, found: list[Bias]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.batch_norm and not _is_weight(args[0] if args else kwargs["input"]):
            return self._keep(result, _by_channel(_implicit_bias(*args, **kwargs), result.ndim))
        if function in _ADDING:
            at, by_channel = _ADDING[function]
            bias = kwargs.get("bias", args[at] if len(args) > at else None)
            if bias is not None and by_channel:
                return self._keep(result, _by_channel(lambda: bias, result.ndim))
            if bias is not None:
                return self._keep(result, lambda: bias, channels_last=bias.ndim == 1)
        return result

    def _keep(self, result: Tensor, value: Callable[[], Tensor], channels_last: bool = False) -> Tensor:
        place = result.new_zeros(()).expand(result.shape).requires_grad_()
        self.found.append(Bias(value, place, channels_last))
        return result + place


def _is_weight(x: Tensor) -> bool:
    """Tell whether a tensor is a parameter in another shape, as in a convolution that normalises its weight.

    A frozen one has no gradient in this pass, where images have one.
    """
    node = x.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return not x.requires_grad or isinstance(getattr(node, "variable", x), nn.Parameter)


def _by_channel(bias: Callable[[], Tensor], ndim: int) -> Callable[[], Tensor]:
    return lambda: bias().view(-1, *[1] * (ndim - 2))


def _implicit_bias(
    input: Tensor,  # noqa: A002  # as F.batch_norm has it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Callable[[], Tensor]:
    """Return what makes a BatchNorm's bias: its result where its input is 0. Statistics of a batch count as given."""
    mean, variance = running_mean, running_var
    if training or mean is None or variance is None:
        with torch.no_grad():
            variance, mean = torch.var_mean(at_least_float32(input), dim=[0, *range(2, input.ndim)], correction=0)

    def make() -> Tensor:
        shift = -mean * (variance + eps).rsqrt()
        shift = shift if weight is None else shift * weight
        return shift if bias is None else shift + bias

    return make
