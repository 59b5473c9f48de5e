"""Inner gradients of models that are sharded by ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cgc_reg.model.settings import attribute


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parts of the model are sharded by ``fully_shard``."""
    return bool(_states(model))


@contextmanager
def through_shards(model: nn.Module, *, trains: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let an inner gradient go through a model that may be sharded.

    FSDP's hooks take any gradient for the step's own backward, which gathers weights, and sums the gradients of the
    processes and frees the weights as soon as a module's inputs have theirs. Inside this context they only gather.

    In the step's backward the second derivatives come before or after that, as autograd likes, and no hook knows of
    them. So the weights that the inner gradient went through are gathered before the first of them, and freed, with
    their gradients summed, when the whole backward is over. That is what the function does which this context gives:
    pass each tensor through it on which a loss may come to depend on the inner gradient.

    Args:
        model: wrapped or not.
        trains: whether the inner gradient is to be differentiated again; if not, the weights that it went through are
            freed when the context ends.
    """
    states = _states(model)
    groups = [group for state in states for group in _groups(state)]
    used: dict[Any, None] = {}  # in order, each once

    def note(group: Any) -> None:
        if group._training_state.name == "PRE_BACKWARD":
            used[group] = None

    def hold(tensor: Tensor) -> Tensor:
        if used and tensor.requires_grad:
            hook = partial(_hold, states[0], list(used))
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]  # torch gives it no types
        return tensor

    def free() -> None:
        for group in used:
            group.reshard()

    with ExitStack() as stack:
        if not trains:
            stack.callback(free)
        for group in groups:
            stack.enter_context(_no_end(group, note))
        if states:  # which also keeps the order in which weights are gathered ahead
            stack.enter_context(attribute(states[0]._state_ctx, "is_last_backward", False))
        yield hold


@contextmanager
def sharded_after(model: nn.Module) -> Iterator[None]:
    """Free what a pass gathers, which no backward follows.

    FSDP leaves the weights of the outermost module gathered for the backward. An optimizer made now would take those,
    and train what no later pass reads.
    """
    groups = [group for state in _states(model) for group in _groups(state)]
    sharded = [group for group in groups if group.is_sharded]
    try:
        yield
    finally:
        for group in sharded:
            group.reshard()


def _hold(state: Any, groups: list[Any], gradient: Tensor) -> None:
    """Gather groups of weights, and keep them until the backward that goes on is over."""
    backward = torch._C._current_graph_task_id()

    def begin(group: Any, *args: Any) -> None:
        if torch._C._current_graph_task_id() != backward:  # an error ended it, whose gradients nobody wants
            release(group)
            for parameter in group.fsdp_params:
                parameter.unsharded_param.grad = None
        type(group).pre_backward(group, *args)

    def release(group: Any) -> None:
        for name in ("pre_backward", "post_backward"):
            vars(group).pop(name, None)  # which another heatmap of this step may have done

    def end() -> None:
        for group in groups:
            release(group)
        state._root_post_backward_final_callback()

    for group in groups:
        group.pre_backward(False)
        group.pre_backward = partial(begin, group)
        group.post_backward = lambda *unused: None
    torch.autograd.Variable._execution_engine.queue_callback(end)


@contextmanager
def _no_end(group: Any, instead: Callable[[Any], None]) -> Iterator[None]:
    """Let a group of weights neither sum its gradients nor free them, but do something else, when FSDP says so."""
    before = vars(group).get("post_backward")
    group.post_backward = lambda *unused: instead(group)
    try:
        yield
    finally:
        if before is None:
            del group.post_backward
        else:
            group.post_backward = before


def _states(model: nn.Module) -> list[Any]:
    """Return what FSDP keeps of each module that is sharded."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # half a second, for those who shard

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "`model` must not be wrapped in FullyShardedDataParallel, which hides its layers; got one that is. Use "
            "`fully_shard` or DistributedDataParallel."
        )
    return [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(state: Any) -> list[Any]:
    """Return the groups of weights that a sharded module gathers: older versions of torch know one at most."""
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
