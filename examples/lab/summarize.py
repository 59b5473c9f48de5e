"""Print mean and range over several runs: `python -m lab summarize runs/seed-*`, each made with --compare."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from lab.comparison import table


def last_epoch(path: Path) -> dict[str, float]:
    """Read the last row of a metrics.csv."""
    with path.open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(value) for name, value in last.items() if value}


def side_by_side(runs: list[Path]) -> str:
    """Lay out the last epochs of both trainings in each run, and their difference within a run."""
    pairs = [[last_epoch(run / name / "metrics.csv") for name in ("cross-entropy", "cgc")] for run in runs]
    shared = [name for name in pairs[0][0] if all(name in one for pair in pairs for one in pair)]
    columns: dict[str, dict[str, str]] = {"cross-entropy": {}, "cross-entropy + CGC": {}, "difference": {}}
    for name in shared:
        without, with_cgc = zip(*[[one[name] for one in pair] for pair in pairs], strict=True)
        difference = [b - a for a, b in zip(without, with_cgc, strict=True)]
        cells = [spread(without), spread(with_cgc), spread(difference, sign="+")]
        for column, cell in zip(columns.values(), cells, strict=True):
            column[name.removeprefix("val_")] = cell
    return table("validation, last epoch", columns)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Write the mean, and the lowest and highest value."""
    return f"{statistics.mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab summarize", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="--out folders of `python -m lab train --compare`")
    args = parser.parse_args(argv)
    try:
        print(f"Mean (lowest to highest) over {len(args.runs)} runs:\n\n{side_by_side(args.runs)}")
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error.filename} is missing; the run must be made with --compare.") from None
