"""Measure what a training step with CGC costs beside cross-entropy on the same two views.

    python examples/benchmark.py                      # ResNet-18, 224 x 224, batch 32
    python examples/benchmark.py --batch-size 8 --image-size 96 --repeats 3

The rows of a round run one after the other in one process, every other round in reverse, and a ratio is the median
over rounds of a row's time to that of the first row in the same round. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from cgc_reg import CGCRegularizer, RandomResizedCropFlip


def make_steps(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return one training step for each row, all on one model."""
    torch.manual_seed(0)
    device = args.device
    model = torchvision.models.get_model(args.model, weights=None, num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)
    sampler = RandomResizedCropFlip()
    reg = CGCRegularizer(args.layer)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def both_views() -> None:
        view = sampler.sample(len(x), (args.image_size, args.image_size), device=device)(x)
        update(F.cross_entropy(model(x), y) + F.cross_entropy(model(view), y))

    def one_view() -> None:
        update(F.cross_entropy(model(x), y))

    def compute() -> None:
        out = reg.compute(model, x)
        update(F.cross_entropy(out.logits, y) + 0.5 * out.loss)

    def drop_in() -> None:
        update(F.cross_entropy(model(x), y) + 0.5 * reg(model, x))

    return {
        "cross-entropy on both views, no CGC": both_views,
        "cross-entropy on x, no CGC": one_view,
        "`reg.compute`: cross-entropy on x + CGC": compute,
        "`reg(model, x)`: cross-entropy on x + CGC": drop_in,
    }


def measure_times(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return each row's seconds in each round."""
    steps = make_steps(args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.warmup + args.repeats):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            synchronize(args.device)
            began = time.perf_counter()
            steps[name]()
            synchronize(args.device)
            if turn >= args.warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize(device: str) -> None:
    """Wait for a GPU to finish."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def measure_memory(args: argparse.Namespace, row: int) -> float:
    """Return the peak memory of a row in MiB, above that of the process before its first step."""
    step = list(make_steps(args).values())[row]
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = peak_memory()
    step(), step()
    return peak_memory() - before


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss starts at what the parent process held
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def table(seconds: dict[str, list[float]], memory: list[float]) -> str:
    """Lay out the rows; ratios are to the first one."""
    rows = [
        "| step | seconds | time ratio | middle half | peak memory, MiB | memory ratio |",
        "|---|---|---|---|---|---|",
    ]
    reference = next(iter(seconds.values()))
    for (name, own), peak in zip(seconds.items(), memory, strict=True):
        ratios = [a / b for a, b in zip(own, reference, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            f"| {name} | {statistics.median(own):.3f} | {median:.3f} | {low:.3f} to {high:.3f} "
            f"| {peak:.0f} | {peak / memory[0]:.3f} |"
        )
    return "\n".join(rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of-row", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Print the table."""
    args = parse_args(None)
    if args.memory_of_row is not None:
        print(json.dumps(measure_memory(args, args.memory_of_row)))
        return
    seconds = measure_times(args)
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of-row"]
    # With glibc's default, freed tensors stay in the heap now and then, and peaks differ by some percent between runs.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    memory = [float(subprocess.check_output([*command, str(row)], env=environment)) for row in range(len(seconds))]
    gpu = torch.device(args.device).type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    setting = f"{args.model}, {args.image_size} x {args.image_size}, batch {args.batch_size}"
    print(f"{setting}, {machine}, torch {torch.__version__}, {platform.machine()}\n\n{table(seconds, memory)}")


if __name__ == "__main__":
    main()
