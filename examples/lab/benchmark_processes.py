"""How a step's cost grows with the number of processes, on CPUs: each of one thread, joined through gloo."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab import processes
from lab.benchmark_rows import BOTH_VIEWS, GATHERED, LOSS, make_loss, make_model, make_rows
from lab.benchmark_timing import measure, measure_memory


def measure_processes(args: argparse.Namespace, counts: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return, for each number of processes, the seconds of two steps and of the loss, and a process's MiB."""
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_process, (args, count, folder), nprocs=count)
            found[count] = torch.load(Path(folder, "found.pt"))
    return found


def _process(rank: int, args: argparse.Namespace, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's host name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    rows = make_rows(args, processes.parallel(make_model(args)))
    work: dict[str, Any] = {name: rows[name].work for name in (BOTH_VIEWS, GATHERED)}
    work[LOSS] = make_loss(*torch.rand(2, args.batch_size, 7, 7, requires_grad=True), gather_distributed=True)
    memory = measure_memory(work[GATHERED], "cpu")
    seconds = measure(work, repeats=max(2, args.repeats // 2), warmup=1, device="cpu")
    if rank == 0:
        found = {name: statistics.median(own) for name, own in seconds.items()}
        torch.save(found | {"memory": memory}, Path(folder, "found.pt"))
    dist.barrier()
    # Destroying the group holds the interpreter's lock, which gloo's threads may need to let go of the last tensors: a
    # deadlock with torch 2.6. This ends the process without.
    os._exit(0)
