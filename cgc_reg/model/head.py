"""Find the linear layer that turns pooled channels into class scores."""

from __future__ import annotations

from torch import Tensor, nn

from cgc_reg.model.layers import did_you_mean
from cgc_reg.model.settings import evaluation_mode


def head_weight(model: nn.Module, name: str | None, *, channels: int, classes: int) -> Tensor:
    """Return the weight (classes, channels) of the model's linear head.

    Args:
        model: not wrapped.
        name: dotted name of the head; None for the only layer that fits.
        channels, classes: what the head must lead from and to.
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
    # In evaluation mode a parametrization such as spectral norm's gives the weight of the pass that was.
    with evaluation_mode(head):
        weight = head.weight
    assert isinstance(weight, Tensor)  # says so to the type checker
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "`head` must not be sharded when CAM reads its weight, after the forward; got a sharded one. Set "
            "`reshard_after_forward=False` in the `fully_shard` of the module that holds it."
        )
    return weight.flatten(1)


def _leads(module: nn.Module, channels: int, classes: int) -> bool:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) == (classes, channels)
    return (
        isinstance(module, nn.Conv2d)
        and (module.out_channels, module.in_channels) == (classes, channels)
        and module.kernel_size == (1, 1)
        and module.groups == 1
    )
