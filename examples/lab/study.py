"""Make the trainings of a study, each once, and report them.

    python -m lab study lab/experiments/losses.toml            # runs what is missing, then reports
    python -m lab study lab/experiments/losses.toml --report   # reports what there is

A study is a file: options of `python -m lab train` for each setting, repeated over seeds. What a training came to is
one line of results/NAME.jsonl beside that file; a training that has its line is not repeated, one that was interrupted
goes on. Trainings run a few at a time, with one thread each: on two cores that is faster than two threads for one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lab.checkpoint import load_checkpoint, write_figure, write_whole
from lab.evaluate import NOT_INSTALLED
from lab.jobs import lab_command, run_all, run_script
from lab.options import parse_args, settings
from lab.study_config import Setting, Study, read_study
from lab.study_report import draw_study, study_report

HERE = Path(__file__).parent


class Results:
    """The finished trainings of a study, in a file of one JSON object a line, and those of other studies beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_lines(path) if path.exists() else []
        self.others = [
            row for other in sorted(path.parent.glob("*.jsonl")) if other != path for row in read_lines(other)
        ]
        self.lock = threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            lines = "".join(json.dumps(one) + "\n" for one in self.rows)
            write_whole(self.path, lambda partial: partial.write_text(lines))

    def find(self, options: str, seed: int, metrics: list[str]) -> dict[str, float] | None:
        """Return what a training with these options came to, if it has been made and so much was measured of it."""
        wanted = decisive(options)
        rows = (row for row in self.rows + self.others if row["seed"] == seed and set(metrics) <= row["found"].keys())
        return next((row["found"] for row in rows if decisive(row["options"]) == wanted), None)

    def minutes(self) -> float:
        """Return how long the study's own trainings took one after the other, evaluation included."""
        return sum(row["seconds"] for row in self.rows) / 60


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def decisive(options: str) -> dict[str, str]:
    """Return the settings that options come to, whatever their order."""
    args = parse_args(options.split())
    return settings(args, args.lam)


def train(study: Study, setting: Setting, seed: int, folder: Path, on_line: Callable[[str], object]) -> dict[str, Any]:
    """Make one training and evaluate it."""
    options = study.options_of(setting)
    command = lab_command("train", *options.split(), "--seed", str(seed), "--out", folder, "--resume")
    run_script(command, threads=1, on_line=on_line)
    (last,) = folder.glob("*/last.pt")
    trained = sum(epoch["seconds"] for epoch in load_checkpoint(last, device="cpu")["history"])
    began = time.perf_counter()
    found = folder / "found.json"
    command = lab_command("evaluate", last, *study.evaluate.split(), "--json", found)
    run_script([*command, "--out", folder / "evaluation.png"], threads=1)
    (values,) = json.loads(found.read_text()).values()
    if missing := set(study.metrics) - values.keys():
        raise SystemExit(f"error: {last} was evaluated without {', '.join(sorted(missing))}. {NOT_INSTALLED}")
    return {
        "setting": setting.name,
        "seed": seed,
        "options": options,
        "found": {name: round(value, 6) for name, value in values.items()},
        # Of all epochs, also those before an interruption.
        "seconds": round(trained + time.perf_counter() - began, 1),
        "machine": f"one of {os.cpu_count()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def run_study(study: Study, results: Results, folder: Path, *, seeds: list[int], jobs: int) -> None:
    """Make the trainings that have no result yet, seed after seed."""
    todo = [
        (setting, seed)
        for seed, setting in product(seeds, reversed(study.settings))  # the last settings take longest
        if results.find(study.options_of(setting), seed, study.metrics) is None
    ]
    with tqdm(total=len(todo), desc="trainings", unit="training") as bar:

        def make(setting: Setting, seed: int) -> None:
            place = folder / f"{study.settings.index(setting)}-{seed}"
            results.add(train(study, setting, seed, place, lambda line: bar.set_postfix_str(line[:20])))
            shutil.rmtree(place)  # weights are large, and the line says how to make them again

        for _ in run_all([partial(make, setting, seed) for setting, seed in todo], at_a_time=jobs):
            bar.update()


def runs_of(study: Study, results: Results) -> dict[Setting, dict[int, dict[str, float]]]:
    """Sort results by setting and seed."""
    runs: dict[Setting, dict[int, dict[str, float]]] = {setting: {} for setting in study.settings}
    for setting, seed in product(study.settings, study.seeds):
        found = results.find(study.options_of(setting), seed, study.metrics)
        if found is not None:
            runs[setting][seed] = found
    return runs


def main(argv: list[str] | None = None) -> None:
    """Run and report one study."""
    parser = argparse.ArgumentParser(prog="python -m lab study", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a file such as lab/experiments/losses.toml")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="fewer seeds, or others (default: the study's)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of unfinished trainings")
    parser.add_argument("--picture", type=Path, help="draw the results there")
    args = parser.parse_args(argv)
    study = read_study(args.study)
    results = Results(args.study.parent / "results" / f"{args.study.stem}.jsonl")
    if not args.report:
        run_study(study, results, args.out / args.study.stem, seeds=args.seeds or study.seeds, jobs=args.jobs)
    runs = runs_of(study, results)
    print(study_report(study, runs))
    if results.rows:
        print(f"\n{len(results.rows)} trainings of its own, one thread each: {results.minutes():.0f} min in sequence.")
    if args.picture:
        write_figure(args.picture, draw_study(study, runs))
