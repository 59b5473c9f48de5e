"""How the benchmark measures time and memory."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Work = Callable[[], object]
Seconds = dict[str, list[float]]


def measure(work: Mapping[str, Work], *, repeats: int, warmup: int, device: str) -> Seconds:
    """Return each row's seconds in each round; the rows take turns, every other round in reverse."""
    seconds: Seconds = {name: [] for name in work}
    clock = gpu_seconds if torch.device(device).type == "cuda" else cpu_seconds
    for turn in range(warmup + repeats):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            took = clock(work[name])
            if turn >= warmup:
                seconds[name].append(took)
    return seconds


def cpu_seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gpu_seconds(work: Work) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def measure_memory(work: Work, device: str) -> float:
    """Return the peak memory of two calls in MiB, above that of the process before; a CPU's never falls again."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work(), work()
        return torch.cuda.max_memory_allocated() / 2**20
    before = peak_memory()
    work(), work()
    return peak_memory() - before


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss starts at what the parent process held
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
