"""What a model needs that is trained in several processes: a gradient for every parameter, and the right wrapper."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cgc_reg._warn import warn

# Models that DistributedDataParallel was looked for around: looking goes through all of Python's objects.
_LOOKED_AROUND: WeakSet[nn.Module] = WeakSet()


def warn_if_wrapper_is_bypassed(model: nn.Module) -> None:
    """Warn, once for each model, of a pass that goes around the DistributedDataParallel that holds the model.

    A module does not know its wrapper, so wrappers are sought among all of Python's objects.

    Args:
        model: not wrapped.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and torch.is_grad_enabled()):
        return
    # Inside the wrapper's own forward, as in Lightning's training step, the model itself is what to take.
    if model in _LOOKED_AROUND or DistributedDataParallel._active_ddp_module is not None:
        return
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    holding = [wrapper for wrapper in wrappers if model in wrapper.module.modules()]
    if any(not wrapper.require_backward_grad_sync for wrapper in holding):
        return  # in `no_sync`, where gradients accumulate and are averaged later
    _LOOKED_AROUND.add(model)
    if holding:
        warn(
            "`model` is held by a DistributedDataParallel that this pass goes around, so that nothing averages the "
            "gradients of the processes. Pass the wrapper, instead of its `module`."
        )


def reach_all_parameters(heatmap: Tensor, logits: Tensor) -> Tensor:
    """Return the heatmap with a gradient of zeros for the logits.

    DistributedDataParallel waits for a gradient of every parameter that its forward used, while a heatmap depends on
    no bias of a linear head; a sharded model begins its backward at its output. Zeros, unlike ``0 * logits``, do not
    turn an infinite score into NaN.
    """
    result: Tensor = _ZeroGradient.apply(heatmap, logits)
    return result


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heatmap: Tensor, logits: Tensor) -> Tensor:
        ctx.logits = torch.empty_like(logits, device="meta")  # their shape and dtype
        return heatmap.view_as(heatmap)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.zeros_like(ctx.logits, device=gradient.device)
