"""Measure what a training step with CGC costs, beside cross-entropy on the same two views.

    python examples/benchmark.py                      # ResNet-18, 224 x 224, batch 32
    python examples/benchmark.py --compile --json cost.json
    python examples/benchmark.py --batch-size 8 --image-size 96 --repeats 3 --rows '`reg.compute`'

Prints tables in Markdown: the steps, the parts of a step that are not the model, how these grow, and the transforms
beside what they replace. The rows of a round run one after the other in one process, every other round in reverse; a
ratio is the median over rounds of a row's time to that of the first row in the same round. Peak memory is that of a
process of its own.
"""

from __future__ import annotations

import argparse
import datetime
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
from typing import Any

import torch
import torchvision

from benchmark_rows import Work, make_parts, make_steps, make_transforms

Seconds = dict[str, list[float]]


def measure(work: dict[str, Work], *, repeats: int, warmup: int, device: str) -> Seconds:
    """Return each row's seconds in each round."""
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


def measure_memory(args: argparse.Namespace) -> float:
    """Return the peak memory of one row in MiB, above that of the process before its first step."""
    step = make_steps(args)[args.memory_of_row]
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


def memory_of_rows(rows: list[str]) -> dict[str, float]:
    """Measure each row in a process of its own."""
    # With glibc's default, freed tensors stay in the heap now and then, and peaks differ by some percent between runs.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of-row"]
    return {row: float(subprocess.check_output([*command, row], env=environment)) for row in rows}


def ratios(seconds: Seconds, name: str) -> list[float]:
    """Return a row's times as ratios to the first row's, round by round."""
    return [own / first for own, first in zip(seconds[name], next(iter(seconds.values())), strict=True)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps_table(seconds: Seconds, memory: dict[str, float]) -> str:
    """Lay out the steps; ratios are to the first one."""
    rows = []
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(ratios(seconds, name), n=4, method="inclusive")
        row = [name, f"{statistics.median(own):.3f}", f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
        if memory:
            row += [f"{memory[name]:.0f}", f"{memory[name] / next(iter(memory.values())):.3f}"]
        rows.append(row)
    header = ["step", "seconds", "time ratio", "middle half"]
    return table(header + (["peak memory, MiB", "memory ratio"] if memory else []), rows)


def parts_table(seconds: Seconds, step: float) -> str:
    """Lay out the parts as shares of a step's seconds."""
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    medians["together"] = sum(medians.values())
    rows = [[name, f"{1000 * own:.2f}", f"{100 * own / step:.2f} %"] for name, own in medians.items()]
    return table(["part, with its backward", "milliseconds", "share of a step"], rows)


def growth_table(timed: Callable[[dict[str, Work], int], Seconds], base: dict[str, Any]) -> str:
    """Lay out the milliseconds of the parts as one size after the other grows."""
    rows = []
    for name, sizes in (
        ("batch_size", (8, 32, 128, 512, 1024)),
        ("image_size", (64, 128, 224, 448)),
        ("heatmap_size", (4, 7, 14, 28, 56)),
    ):
        for size in sizes:
            seconds = timed(make_parts(**{**base, name: size}), 3)
            cells = [f"{1000 * statistics.median(own):.2f}" for own in seconds.values()]
            rows.append([f"{name.replace('_', ' ')} {size}", *cells])
    return table(["milliseconds", *seconds], rows)


def transforms_table(seconds: Seconds) -> str:
    rows = [[name, f"{1000 * statistics.median(own):.2f}"] for name, own in seconds.items()]
    return table(["256 transforms", "milliseconds"], rows)


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that the parts of a step work on."""
    model = torchvision.models.get_model(args.model, weights=None, num_classes=10).to(args.device).eval()
    x = torch.rand(1, 3, args.image_size, args.image_size, device=args.device)
    shapes: list[torch.Size] = []
    model.get_submodule(args.layer).register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(x)
    return {
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "heatmap_size": shapes[0][2],
        "channels": shapes[0][1],
        "device": args.device,
    }


def describe(args: argparse.Namespace) -> dict[str, str]:
    """Say what was measured, on what."""
    gpu = torch.device(args.device).type == "cuda"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=sys.path[0])
    return {
        "setting": f"{args.model}, {args.image_size} x {args.image_size}, batch {args.batch_size}"
        + (", bfloat16 autocast" if args.amp else ""),
        "machine": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="add compiled rows; on a CPU this needs a C++ compiler")
    parser.add_argument(
        "--rows", default="", help="only the step of this name, or those whose names hold it, beside the first"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--steps-only", action="store_true", help="print the first table alone")
    parser.add_argument("--json", type=Path, help="write all times there too")
    parser.add_argument("--memory-of-row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, to show a spread; got {args.repeats}.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    args = parse_args(argv)
    if args.memory_of_row is not None:
        print(json.dumps(measure_memory(args)))
        return
    steps = make_steps(args)
    first = next(iter(steps))
    chosen = {args.rows} & steps.keys() or {name for name in steps if args.rows in name}
    steps = {name: step for name, step in steps.items() if name in {first, *chosen}}

    def timed(work: dict[str, Work], repeats: int = args.repeats) -> Seconds:
        return measure(work, repeats=repeats, warmup=args.warmup, device=args.device)

    seconds = timed(steps)
    memory = {} if args.no_memory else memory_of_rows(list(steps))
    found = {**describe(args), "seconds": seconds, "memory_mib": memory}
    print(", ".join(list(found.values())[:4]) + f"\n\n{steps_table(seconds, memory)}")
    if not args.steps_only:
        base = sizes_of(args)
        parts = timed(make_parts(**base), 5 * args.repeats)
        found["parts"] = parts
        print(f"\n{parts_table(parts, statistics.median(seconds.get('`reg.compute`', seconds[first])))}")
        print(f"\n{growth_table(timed, base)}")
        transforms = timed(make_transforms(256, args.device))
        found["transforms"] = transforms
        print(f"\n{transforms_table(transforms)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
