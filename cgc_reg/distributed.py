"""What training in several processes needs: the keys of all of them, and a gradient for every parameter."""

from __future__ import annotations

import gc
import warnings
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Models that DistributedDataParallel was looked for around.
_LOOKED_AROUND: WeakSet[nn.Module] = WeakSet()


def gather(local: Tensor) -> tuple[Tensor, int]:
    """Return the rows of every process, (world * n, d), and the position of this process's first one.

    The backward sums the gradients that the processes give to a row.

    Args:
        local: (n, d), of one shape in all processes.

    Raises:
        RuntimeError: there is no process group.
        ValueError: the shapes differ; raised in every process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "`gather_distributed=True` must be used after `torch.distributed.init_process_group`; got no process "
            "group. Start the process group first, or set `gather_distributed=False`."
        )
    _check_shapes(local)
    return _AllGather.apply(local), dist.get_rank() * len(local)


def _check_shapes(local: Tensor) -> None:
    """Refuse shapes that differ between processes: gathering them would hang, or mix up their rows."""
    # Reading the shapes makes a GPU wait, unless a CPU backend can carry them.
    device = torch.device("cpu") if "cpu" in dist.get_backend_config() else local.device
    own = torch.tensor(local.shape, device=device)
    shapes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, own)
    batches, pixels = zip(*(shape.tolist() for shape in shapes), strict=True)
    for what, sizes, repair in (
        ("batches", batches, "In a DataLoader, use `drop_last=True`."),
        ("heatmaps", pixels, "Use views of one size, or set `heatmap_size`."),
    ):
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`gather_distributed=True` must get {what} of one size in every process; got sizes "
                f"{', '.join(map(str, sizes))}. {repair}"
            )


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor over processes; the backward sums the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parts of the model are sharded by ``fully_shard`` (FSDP2)."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # half a second, for those who shard

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "`model` must not be wrapped in FullyShardedDataParallel, which hides its layers; got one that is. Use "
            "`fully_shard` or DistributedDataParallel."
        )
    return any(isinstance(module, FSDPModule) for module in model.modules())


def warn_if_bypassed(model: nn.Module, *, stacklevel: int) -> None:
    """Warn, once for each model, of a pass that goes around the DistributedDataParallel that holds the model.

    A module does not know its wrapper, so wrappers are sought among all of Python's objects.

    Args:
        model: as the user gave it.
        stacklevel: of the warning, as :func:`warnings.warn` counts for the caller.
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
        warnings.warn(
            "`model` is held by a DistributedDataParallel that this pass goes around, so that nothing averages the "
            "gradients of the processes. Give `compute` the wrapper, instead of its `module`.",
            stacklevel=stacklevel + 1,
        )


def reach_all_parameters(loss: Tensor, logits: Tensor) -> Tensor:
    """Return the loss with a gradient of zeros for the logits.

    DistributedDataParallel waits for a gradient of every parameter that its forward used, while a heatmap depends on
    no bias of a linear head; a sharded model begins its backward at its output. Zeros, unlike ``0 * logits``, do not
    turn an infinite score into NaN.
    """
    result: Tensor = _ZeroGradient.apply(loss, logits)
    return result


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.logits = torch.empty_like(logits, device="meta")  # their shape and dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.zeros_like(ctx.logits, device=gradient.device)
