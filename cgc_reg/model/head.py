"""Find the linear layer that turns pooled channels into class scores, and the weight that a pass used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn

from cgc_reg.model.layers import CONVOLUTIONS, did_you_mean
from cgc_reg.model.settings import evaluation_flags

Weights = Mapping[nn.Module, Tensor]


@contextmanager
def used_weights(model: nn.Module, used: dict[nn.Module, Tensor], besides: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Keep the weights that linear layers make anew in the pass that is made inside this context.

    Args:
        model: not wrapped, or a part of one.
        used: where to put them.
        besides: parts of it that are compiled, where a hook would have them compiled anew.
    """
    inside = {module for part in besides for module in part.modules()}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        used[module] = weight_in_use(module)

    with ExitStack() as hooks:
        for module in with_weights_of_a_pass(model):
            if module not in inside:
                hooks.callback(module.register_forward_hook(keep).remove)
        yield


def with_weights_of_a_pass(model: nn.Module) -> list[nn.Module]:
    """List the linear layers whose weight is no parameter: pruning, weight and spectral norm make it in each pass."""
    return [module for module in model.modules() if _is_linear(module) and "weight" not in module._parameters]


def weight_in_use(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer that has just run."""
    # In evaluation mode a parametrization such as spectral norm's gives the weight of the pass that was.
    with evaluation_flags(module):
        weight: Any = module.weight
    result: Tensor = weight
    return result


def head_weight(model: nn.Module, name: str | None, *, channels: int, classes: int, used: Weights) -> Tensor:
    """Return the weight (classes, channels) of the model's linear head.

    Args:
        model: not wrapped.
        name: dotted name of the head; None for the only layer that fits.
        channels, classes: what the head must lead from and to.
        used: of :func:`used_weights`; what is not in it is the same after the pass.
    """
    modules = dict(model.named_modules())
    if name is None:
        fitting = [each for each, module in modules.items() if _leads(module, channels, classes)]
        if len(fitting) != 1:
            raise ValueError(
                f"CAM must find one linear layer from {channels} channels to {classes} classes; got "
                f"{', '.join(map(repr, fitting)) or 'none'}. Name it with `head`, or use GradCAM, which works with any "
                "head."
            )
        (name,) = fitting
    if name not in modules:
        raise ValueError(
            f"`head` must be the dotted name of a linear layer of the model; got {name!r}.{did_you_mean(name, modules)}"
        )
    head = modules[name]
    if not _leads(head, channels, classes):
        raise ValueError(
            f"`head` must be a linear layer from the {channels} channels of the target layer to the {classes} "
            f"classes; got {name!r}, {head}. Use GradCAM, which works with any head."
        )
    weight = weight_in_use(head)
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "`head` must not be sharded when CAM reads its weight, after the forward; got a sharded one. Set "
            "`reshard_after_forward=False` in the `fully_shard` of the module that holds it."
        )
    return used.get(head, weight).flatten(1)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    return isinstance(module, nn.Linear) or (
        isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1} and module.groups == 1
    )


def _leads(module: nn.Module, channels: int, classes: int) -> bool:
    if not _is_linear(module):
        return False
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) == (classes, channels)
    return (module.out_channels, module.in_channels) == (classes, channels)
