"""Weights that a model freezes by a `no_grad` block of its own."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor, nn

from cgc_reg.model.compilation import uncompiled
from cgc_reg.model.graph import leaves
from cgc_reg.model.outputs import OutputFunction, find_logits
from cgc_reg.model.own import own_pass
from cgc_reg.model.state import left_as_found

# Models with such a block around a layer, and the weights that a plain pass was seen to train all the same: seeing it
# takes a pass, which is not for every step.
_TRAINED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def check_frozen_block(
    model: nn.Module, x: Tensor, target_layer: str, logits: Tensor, output_fn: OutputFunction | None
) -> None:
    """Refuse a `no_grad` block that holds weights behind the layer, where a pass of ours has put gradients on.

    Args:
        model: not wrapped.
        x, output_fn: as for the pass.
        target_layer: the layer's name.
        logits: of the pass.
    """

    def reached_from(scores: Tensor) -> list[str]:
        reached = {id(leaf) for leaf in leaves(scores)}
        return [name for name, parameter in model.named_parameters() if id(parameter) in reached]

    reached = reached_from(logits)
    if not _TRAINED.get(model, set()).issuperset(reached):
        with own_pass(), uncompiled(model), left_as_found(model):
            _TRAINED[model] = set(reached_from(find_logits(model(x), output_fn, len(x))))
    for name in reached:
        if name not in _TRAINED[model]:
            raise RuntimeError(
                f"`target_layer` must not be followed by weights in a `no_grad` block of the model: heatmaps need "
                f"gradients from the layer on, and would train what the block freezes; got {target_layer!r}, which "
                f"{name!r} follows. Freeze by `requires_grad_(False)` instead of `no_grad`, or name the block's last "
                "layer."
            )
