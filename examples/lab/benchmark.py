"""Measure what a training step with CGC costs, beside cross-entropy on the same views.

    python -m lab benchmark --compile --json cost.json  # ResNet-18, 224 x 224, batch 32
    python -m lab benchmark --batch-size 8 --image-size 96 --repeats 3 --tables steps --rows '`reg.compute`'

Prints tables in Markdown: the steps, the parts of a step that are not the model, how these grow with sizes and with the
number of processes, and the transforms beside what they replace. The rows of a round run one after the other in one
process, every other round in reverse; a ratio is the median over rounds of a row's time to that of another row in the
same round. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision

from lab.benchmark_processes import measure_processes
from lab.benchmark_profile import profile_step
from lab.benchmark_rows import (
    ALONE,
    BFLOAT16,
    BOTH_VIEWS,
    COMPUTE,
    GATHERED,
    LOSS,
    Row,
    make_model,
    make_parts,
    make_rows,
    make_transforms,
    size_of_images,
)
from lab.benchmark_timing import Seconds, Work, measure, measure_memory
from lab.jobs import lab_command, lab_environment
from lab.options import as_arguments

HERE = Path(__file__).parent
TABLES = ("steps", "parts", "growth", "processes", "transforms")
GROWTH = {
    "batch_size": (8, 32, 128, 512, 1024),
    "image_size": (64, 128, 224, 448),
    "heatmap_size": (4, 7, 14, 28, 56),
}
PROCESSES = (1, 2, 4)
# What the rows depend on.
MODEL_OPTIONS = ("model", "layer", "batch_size", "image_size", "frames", "channels_last", "device", "compile", "amp")


def memory_of(args: argparse.Namespace, what: str) -> float:
    """Return the peak memory of a step, or of the parts at some sizes, in MiB: that of a process of its own."""
    # With glibc's default, freed tensors stay in the heap now and then, and peaks differ by some percent between runs.
    environment = {**lab_environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    options = {name: getattr(args, name) for name in MODEL_OPTIONS} | {"memory_of": what}
    command = [sys.executable, *lab_command("benchmark", *as_arguments(options))]
    return float(subprocess.check_output(command, env=environment))


def be_measured(args: argparse.Namespace) -> float:
    """Be the process of `memory_of`."""
    if not args.memory_of.startswith("{"):
        return measure_memory(all_rows(args)[args.memory_of].work, args.device)
    parts = make_parts(**json.loads(args.memory_of)).values()
    return measure_memory(lambda: [part() for part in parts], args.device)


def all_rows(args: argparse.Namespace) -> dict[str, Row]:
    return make_rows(args, make_model(args))


def chosen_rows(args: argparse.Namespace) -> dict[str, Row]:
    """Leave out the rows that were not asked for, but not those that others are compared with."""
    rows = all_rows(args)
    chosen = {args.rows} & rows.keys() or {name for name in rows if args.rows in name}
    beside = {ALONE, *(rows[name].beside for name in chosen)}
    return {name: row for name, row in rows.items() if name in chosen | beside}


def ratios(seconds: Seconds, name: str, beside: str) -> list[float]:
    """Return a row's times as ratios to another row's, round by round."""
    return [own / other for own, other in zip(seconds[name], seconds[beside], strict=True)]


def milliseconds(seconds: Seconds) -> dict[str, float]:
    return {name: 1000 * statistics.median(own) for name, own in seconds.items()}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps_table(rows: dict[str, Row], seconds: Seconds, memory: dict[str, float]) -> str:
    """Lay out the steps; ratios are medians over rounds, with the middle half of them."""
    lines = []
    for name, row in rows.items():
        low, median, high = statistics.quantiles(ratios(seconds, name, row.beside), n=4, method="inclusive")
        line = [
            name,
            f"{statistics.median(seconds[name]):.3f}",
            f"{statistics.median(ratios(seconds, name, ALONE)):.2f}",
        ]
        line += [row.beside, f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
        if memory:
            line += [f"{memory[name]:.0f}", f"{memory[name] / memory[row.beside]:.3f}"]
        lines.append(line)
    header = ["step", "seconds", "in plain steps", "compared with", "time ratio", "middle half"]
    return table(header + (["peak memory, MiB", "memory ratio"] if memory else []), lines)


def parts_table(seconds: Seconds, step: float, profiled: dict[str, float]) -> str:
    """Lay out the parts: each timed alone, beside a step's seconds, and as the profiler sees it in a step."""
    alone = milliseconds(seconds)
    alone["together"] = sum(alone.values())
    shares = {**profiled, "together": sum(profiled.values())}
    rows = [
        [name, *([f"{alone[name]:.2f}", f"{alone[name] / step / 10:.2f} %"] if name in alone else ["", ""])]
        + ([f"{100 * shares[name]:.2f} %"] if profiled else [])
        for name in (shares if profiled else alone)
    ]
    header = ["part, with its backward", "milliseconds alone", "share of a step"]
    return table(header + (["share in a profiled step"] if profiled else []), rows)


def growth_table(args: argparse.Namespace, base: dict[str, Any], found: dict[str, Any]) -> str:
    """Measure the parts as one size after the other grows, and lay out what was found."""
    lines = []
    for name, sizes in GROWTH.items():
        for size in sizes:
            what = {**base, name: size}
            alone = milliseconds(measure(make_parts(**what), repeats=3, warmup=args.warmup, device=args.device))
            memory = {} if args.no_memory else {"peak memory, MiB": memory_of(args, json.dumps(what))}
            title = f"{name.replace('_', ' ')} {size}"
            found[title] = alone | memory
            lines.append([title, *(f"{value:.2f}" for value in alone.values()), *(f"{m:.0f}" for m in memory.values())])
    return table(["milliseconds", *alone, *memory], lines)


def processes_table(found: dict[int, dict[str, float]]) -> str:
    """Lay out steps and loss by the number of processes."""
    lines = []
    for count, one in found.items():
        ratio = one[GATHERED] / one[BOTH_VIEWS]
        seconds = [f"{one[BOTH_VIEWS]:.3f}", f"{one[GATHERED]:.3f}", f"{ratio:.3f}"]
        lines.append([str(count), *seconds, f"{1000 * one[LOSS]:.2f}", f"{one['memory']:.0f}"])
    header = ["processes", f"{BOTH_VIEWS}, seconds", f"{GATHERED}, seconds", "ratio"]
    return table([*header, f"{LOSS}, milliseconds", "peak memory of one, MiB"], lines)


def transforms_table(seconds: Seconds) -> str:
    return table(["256 transforms", "milliseconds"], ([name, f"{t:.2f}"] for name, t in milliseconds(seconds).items()))


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that the parts of a step work on."""
    model = make_model(args).eval()
    shapes: list[torch.Size] = []
    model.get_submodule(args.layer).register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(torch.rand(1, 3, args.image_size, args.image_size, device=args.device))
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
    size = " x ".join(map(str, size_of_images(args, args.image_size)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "setting": f"{args.model}, {size}, batch {args.batch_size}",
        "machine": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--frames", type=int, help="of a clip, for a video model; the steps alone are measured")
    parser.add_argument("--channels-last", action="store_true", help="have model and images in this memory format")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--rows", default="", help="only the step of this name, or those whose names hold it, and what they go beside"
    )
    parser.add_argument("--compile", action="store_true", help="add compiled rows; on a CPU this needs a C++ compiler")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast: rows of it, and the parts of its step")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all that was measured there too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, to show a spread; got {args.repeats}.")
    if args.frames is not None and args.memory_of is None and list(args.tables) != ["steps"]:
        parser.error("--frames must go with --tables steps; the other tables are of images.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    args = parse_args(argv)
    if args.memory_of is not None:
        print(be_measured(args))
        return
    found: dict[str, Any] = describe(args)

    def timed(work: dict[str, Work], repeats: int = args.repeats) -> Seconds:
        return measure(work, repeats=repeats, warmup=args.warmup, device=args.device)

    print(", ".join(list(found.values())[:4]))
    if "steps" in args.tables:
        rows = chosen_rows(args)
        seconds = timed({name: row.work for name, row in rows.items()})
        seconds = {name: [own / rows[name].steps for own in several] for name, several in seconds.items()}
        memory = {} if args.no_memory else {name: memory_of(args, name) for name in rows}
        found |= {"seconds": seconds, "memory_mib": memory}
        print(f"\n{steps_table(rows, seconds, memory)}", flush=True)
    if "parts" in args.tables:
        model = make_model(args)
        step = make_rows(args, model)[BFLOAT16 if args.amp else COMPUTE].work
        profiled = profile_step(step, model) if torch.device(args.device).type == "cpu" else {}
        parts = timed(make_parts(**sizes_of(args)), 5 * args.repeats)
        found |= {"parts": parts, "profiled": profiled}
        print(f"\n{parts_table(parts, statistics.median(timed({COMPUTE: step})[COMPUTE]), profiled)}", flush=True)
    if "growth" in args.tables:
        found["growth"] = {}
        print(f"\n{growth_table(args, sizes_of(args), found['growth'])}", flush=True)
    if "processes" in args.tables and torch.device(args.device).type == "cpu":
        found["processes"] = measure_processes(args, PROCESSES)
        print(f"\n{processes_table(found['processes'])}", flush=True)
    if "transforms" in args.tables:
        found["transforms"] = timed(make_transforms(256, args.device))
        print(f"\n{transforms_table(found['transforms'])}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
