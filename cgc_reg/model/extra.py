"""A pass that is not the step's own: the model is left as it was found, also by the backward."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakSet

from torch import nn

from cgc_reg.model.checkpoints import watch_checkpoints
from cgc_reg.model.compilation import compiled_exposed_layer, regions
from cgc_reg.model.replica import replicated
from cgc_reg.model.state import BatchNormMode, left_as_found
from cgc_reg.model.turns import in_turn
from cgc_reg.model.wrappers import unwrap, without_broadcast

# Models that checkpoint modules whose settings an extra pass changes: finding that out takes a pass of its own.
_CHECKPOINTED: WeakSet[nn.Module] = WeakSet()
# Whether an extra pass goes on in this thread.
_GOING: ContextVar[bool] = ContextVar("_GOING", default=False)


Seen = TypeVar("Seen")


def extra_pass(
    look: Callable[[nn.Module], Seen],
    model: nn.Module,
    mode: BatchNormMode,
    target_layer: str | nn.Module | None,
) -> Seen:
    """Make a pass that is not the step's own.

    It broadcasts no buffer to other processes, and leaves no trace in any buffer unless the mode is "update".

    Args:
        look: makes the pass with the model that it is given.
        model: wrapped or not.
        mode: what becomes of BatchNorm, see :func:`left_as_found`.
        target_layer: the one layer that is looked at; None where others are.

    Raises:
        RuntimeError: the backward would run modules again in another mode.
    """
    token = _GOING.set(True)
    try:
        with in_turn(model), without_broadcast(model):
            # A hook would break a compiled graph, whose backward runs no module again.
            if mode == "update" or compiled_exposed_layer(model) is not None:
                with left_as_found(unwrap(model), mode):
                    return look(model)
            if unwrap(model) not in _CHECKPOINTED:
                with (
                    left_as_found(unwrap(model), mode) as changed,
                    watch_checkpoints(changed, regions(model, target_layer)) as run_again,
                ):
                    seen = look(model)
                if not run_again:
                    return seen
                _CHECKPOINTED.add(unwrap(model))
            return _pass_of_a_replica(look, model, mode)
    finally:
        _GOING.reset(token)


def is_extra_pass() -> bool:
    """Tell whether an extra pass goes on."""
    return _GOING.get()


def _pass_of_a_replica(look: Callable[[nn.Module], Seen], model: nn.Module, mode: BatchNormMode) -> Seen:
    with (
        left_as_found(unwrap(model), mode) as changed,
        watch_checkpoints(changed) as run_again,
        replicated(model) as replica,
    ):
        seen = look(replica)
    if any(module in changed for module in run_again):
        raise RuntimeError(
            "`bn_mode` must be 'update' for this model, which checkpoints modules that it reaches from outside its "
            f"tree, such as by a list or a patched `forward`; got {mode!r}, which the checkpoint would not heed when "
            "it runs them again in the backward."
        )
    return seen
