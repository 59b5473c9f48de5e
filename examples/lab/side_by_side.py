"""Trainings at the same time, each in a process of its own, with bars that tell how long they will take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from functools import partial

import torch
from tqdm import tqdm

from lab.jobs import lab_command, run_all, run_script
from lab.options import as_arguments


def train_side_by_side(args: argparse.Namespace, weights: Mapping[str, float]) -> None:
    """Make a training for each weight of CGC, and show their epochs."""
    options = vars(args) | {"compare": False, "side_by_side": False, "say_steps": True}
    threads = max(1, torch.get_num_threads() // len(weights))
    # Averages over all steps, since validation would make the time that remains jump.
    bars = {name: tqdm(desc=name, unit="step", smoothing=0, disable=None) for name in weights}
    jobs = [
        partial(
            run_script,
            lab_command("train", *as_arguments(options | {"lam": lam})),
            threads=threads,
            on_line=partial(show, name, bars[name]),
        )
        for name, lam in weights.items()
    ]
    try:
        for _ in run_all(jobs, at_a_time=len(jobs)):
            pass
    finally:
        for bar in bars.values():
            bar.close()


def show(name: str, bar: tqdm, line: str) -> None:
    """Show what a training says: its steps as the bar, its epochs as lines."""
    step = re.fullmatch(r"step (\d+)/(\d+)", line)
    if step is not None:
        done, total = int(step[1]), int(step[2])
        if bar.total is None:  # its clock starts now: what was made before, and the start of Python, tell no speed
            bar.reset(total)
            bar.initial = bar.n = done
        bar.update(done - bar.n)
    elif re.match(r"epoch \d+/|Continuing |Finished", line):
        tqdm.write(f"{name}: {line}")
