"""Train an image classifier, with CGC or without it, or both to put them side by side.

    python -m lab train --data shapes --arch small_resnet --compare    # built-in data, with and without CGC
    python -m lab train --data cub200 --arch resnet50 --pretrained
    python -m lab train --data DIR --labeled-fraction 0.1
    python -m lab train --data shapes_context --guidance 0.5           # heatmaps kept on the object by masks of 5 %
    torchrun --nproc_per_node 2 -m lab train                           # in two processes

Each epoch goes to metrics.csv and checkpoints in --out; the end draws curves.png, prints a table and draws gallery.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cgc_reg.visualization import curves, gallery
from lab import processes
from lab.checkpoint import save_checkpoint, write_figure, write_history
from lab.comparison import draw, examples_of, heatmap_columns, table, with_views, written
from lab.data_sets import load_data
from lab.epoch import train_epoch, validate
from lab.image_data import Data, DataError, check_files, denormalize, known_masks, split_labeled
from lab.loaders import steps_per_epoch
from lab.options import parse_args
from lab.run import Run, restore, start, state_of
from lab.side_by_side import train_side_by_side

PANELS = {
    "cross-entropy": ["train_cross_entropy", "val_cross_entropy"],
    "top-1 accuracy": ["train_top1", "val_top1"],
    "CGC loss": ["train_cgc", "val_cgc"],
    "heatmaps (validation)": ["val_similarity", "val_margin", "val_content_heatmap"],
}


class Training(NamedTuple):
    """One of those that are put side by side: CGC's weight, and where its files go."""

    lam: float
    out: Path


@processes.joined()
def main(argv: list[str] | None = None) -> None:
    """Train what the options say, and print and draw what came of it."""
    with processes.writer_first():  # so that it alone says what is wrong with them
        args = parse_args(argv)
    processes.use_own_gpu(args.device)
    trainings = trainings_of(args)
    for _, out in trainings.values():
        if (out / "last.pt").exists() and not args.resume:
            raise SystemExit(f"error: {out} already holds a run; continue it with --resume, or choose another --out.")
    try:
        columns, last = train_all(args, trainings)
    except DataError as error:
        raise SystemExit(f"error: {last_line(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted.") from None
    if processes.is_writer():
        report(args, trainings, columns, last)


def trainings_of(args: argparse.Namespace) -> dict[str, Training]:
    """Name the trainings that are asked for."""
    with_cgc, without = Training(args.lam, args.out / "cgc"), Training(0.0, args.out / "cross-entropy")
    if args.compare:
        return {"cross-entropy": without, "cross-entropy + CGC": with_cgc}
    return {"cross-entropy + CGC": with_cgc} if args.lam else {"cross-entropy": without}


def train_all(
    args: argparse.Namespace, trainings: dict[str, Training]
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Make the trainings; return the columns of a picture, and what each measured in its last epoch."""
    data = load_data(
        args.data,
        root=args.root,
        size=args.size,
        image_size=args.image_size,
        seed=args.seed,
        train_images=args.train_images,
        train_masks=args.guidance > 0,
    )
    if args.guidance:
        data = known_masks(data, args.guided_fraction, seed=args.seed)
    started = all((out / "last.pt").exists() for _, out in trainings.values())
    if not started and not args.say_steps:  # one that says its steps was started by another, which has read them
        check_files(data)
    before = start(args, data, steps_per_epoch(args, *split_labeled(data, args.labeled_fraction, seed=args.seed)))
    images = examples_of(data.validation, 6).to(args.device)
    pairs = with_views(images, draw(images))
    columns = {"image": denormalize(pairs), **heatmap_columns(before.model, before.layer, pairs, "before")}
    if args.side_by_side:
        train_side_by_side(args, {name: lam for name, (lam, _) in trainings.items()})
        args.resume = True  # they are finished, and only have to be read
    last = {}
    for name, (lam, out) in trainings.items():
        if not args.side_by_side:
            processes.say(f"Training with {name} (lam = {lam:g}) in {out}")
        run = train(args, data, lam, out)
        columns |= heatmap_columns(run.model, run.layer, pairs, name)
        last[name] = {key.removeprefix("val_"): value for key, value in run.history[-1].items()}
    return columns, last


def train(args: argparse.Namespace, data: Data, lam: float, out: Path) -> Run:
    """Train one model, or continue its training, and return it."""
    labeled, unlabeled = split_labeled(data, args.labeled_fraction, seed=args.seed)
    steps = steps_per_epoch(args, labeled, unlabeled)
    run = start(args, data, steps)
    if args.resume and (out / "last.pt").exists():
        restore(args, run, data, lam, out / "last.pt")
        if not args.side_by_side:
            say_resumed(out, len(run.history), args.epochs)
    out.mkdir(parents=True, exist_ok=True)
    saved = len(run.history)
    try:
        for epoch in range(saved + 1, args.epochs + 1):
            began = time.perf_counter()
            row = {"epoch": epoch, "lam": lam, "lr": run.schedule.get_last_lr()[0]}
            row |= train_epoch(args, run, labeled, unlabeled, lam, epoch, steps)
            processes.average_buffers(run.model)
            validated = epoch % args.validate_every == 0 or epoch == args.epochs
            if validated:
                row |= validate(args, run, data)
            row["seconds"] = time.perf_counter() - began
            run.history.append(row)
            if processes.is_writer():
                state = state_of(args, run, data, lam)
                save_checkpoint(out / "last.pt", state)
                saved = epoch
                write_epoch(out, run.history, state)
            processes.wait_for_all()
            saved = epoch  # in the others too, since any of them may be the first to be interrupted
            say_epoch(row, args.epochs, part="val_" if validated else "train_")
    except KeyboardInterrupt:
        kept = (
            f"{out / 'last.pt'} holds epoch {saved}; continue with --resume" if saved else "there is no checkpoint yet"
        )
        raise SystemExit(f"\nInterrupted: {kept}.") from None
    finally:
        if run.history and processes.is_writer():
            write_figure(out / "curves.png", curves(run.history, PANELS))
    return run


def write_epoch(out: Path, history: list[dict[str, float]], state: dict[str, Any]) -> None:
    """Write what an epoch leaves beside its checkpoint; best.pt if no earlier one was better."""
    best = max(row.get("val_top1", 0.0) for row in history)
    if history[-1].get("val_top1", -1.0) >= best:
        save_checkpoint(out / "best.pt", state)
    write_history(out / "metrics.csv", history)


def say_resumed(out: Path, made: int, epochs: int) -> None:
    if made < epochs:
        processes.say(f"Continuing {out} after epoch {made}.")
    else:
        processes.say(f"Finished before: {out} holds all {epochs} epochs.")


def say_epoch(row: dict[str, float], epochs: int, part: str) -> None:
    measured = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith(part))
    processes.say(f"epoch {row['epoch']}/{epochs}  {measured}")


def report(
    args: argparse.Namespace,
    trainings: dict[str, Training],
    columns: dict[str, Tensor],
    last: dict[str, dict[str, float]],
) -> None:
    """Print the table, draw the picture, and say where things are."""
    print("\n" + table("validation, last epoch", {name: written(values) for name, values in last.items()}))
    picture = args.out / "gallery.png"
    write_figure(picture, gallery(columns, title="Each image x, and below it T(x)"))
    print(f"\nHeatmaps: {picture}")
    for _, out in trainings.values():
        print(f"Checkpoints, metrics.csv, curves.png: {out}")


def last_line(error: Exception) -> str:
    """Return an error's own words: one raised in a worker carries that worker's traceback in front."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
