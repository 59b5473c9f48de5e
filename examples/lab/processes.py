"""Several processes that train one model, as torchrun starts them; one alone is the writer and waits for nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, and part from them at the end.

    Of those that fail, only the first says why: the others may have met the same, or fail because it has gone. torchrun
    then ends those that still run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield
    except BaseException:
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this is the one process that writes files and prints."""
    return rank() == 0


def say(text: str) -> None:
    """Print what one process is enough to say."""
    if is_writer():
        print(text)


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    total({})


@contextmanager
def writer_first() -> Iterator[None]:
    """Let the writer go ahead with what all do: where it fails, or fetches a file, the others need not."""
    if not is_writer():
        wait_for_all()
    yield
    if is_writer():
        wait_for_all()


def use_own_gpu(device: str) -> None:
    """Let "cuda" mean another GPU in each process."""
    if count() == 1 or torch.device(device).type != "cuda":
        return
    if device != "cuda" or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise SystemExit(
            f"error: each process needs a GPU of its own, and there are {torch.cuda.device_count()}; start fewer with "
            "--device cuda, or pass --device cpu."
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def parallel(model: nn.Module) -> nn.Module:
    """Wrap a model so that a backward averages its gradients over all processes."""
    if count() == 1:
        return model
    # GoogLeNet and Inception hold heads that `build_model` switched off.
    wrapped = DistributedDataParallel(model, find_unused_parameters=hasattr(model, "aux_logits"))
    # By default every pass first takes over the writer's buffers, BatchNorm's running statistics among them. Where a
    # step runs the model twice before its backward, this changes what the first pass's graph keeps; autograd refuses
    # (https://github.com/pytorch/pytorch/issues/175024). Training does not read them: see `average_buffers`.
    wrapped.broadcast_buffers = False
    return wrapped


def total_tensor(values: Tensor) -> Tensor:
    """Add up a tensor over all processes."""
    if count() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics, so that the model they validate is the one saved."""
    if count() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= count()


def total(values: dict[str, Any]) -> dict[str, Any]:
    """Add up, name by name, the values of all processes; one that lacks a name adds nothing."""
    if count() == 1:
        return values
    shares: list[Any] = [None] * count()
    dist.all_gather_object(shares, {name: float(value) for name, value in values.items()})
    sums: dict[str, Any] = {}
    for share in shares:
        for name, value in share.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
