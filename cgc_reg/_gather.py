"""The heatmaps of all processes, in the graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
