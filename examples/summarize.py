"""Print mean and range over several runs: `python examples/summarize.py runs/seed-*`, each made with --compare."""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

ROWS = {
    "top-1 accuracy": "val_top1",
    "balanced accuracy": "val_balanced_accuracy",
    "CGC loss": "val_cgc",
    "similarity of T(g(x)) and g(T(x))": "val_similarity",
    "margin over other images": "val_margin",
    "content heatmap": "val_content_heatmap",
    "heatmaps mostly off the object": "val_mostly_off_object",
    "blank heatmaps": "val_blank_share",
    "seconds per epoch": "seconds",
}


def last_epoch(path: Path) -> dict[str, float]:
    """Read the last row of a metrics.csv."""
    with path.open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(value) for name, value in last.items() if value}


def table(runs: list[Path]) -> str:
    """Lay out the last epochs of both trainings in each run, and their difference within a run."""
    rows = ["| validation, last epoch | cross-entropy | cross-entropy + CGC | difference |", "|---|---|---|---|"]
    pairs = [tuple(last_epoch(run / name / "metrics.csv") for name in ("cross-entropy", "cgc")) for run in runs]
    for title, name in ROWS.items():
        if all(name in one for pair in pairs for one in pair):
            without, with_cgc = ([pair[i][name] for pair in pairs] for i in (0, 1))
            difference = [b - a for a, b in zip(without, with_cgc, strict=True)]
            cells = [spread(without), spread(with_cgc), spread(difference, sign="+")]
            rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: list[float], sign: str = "") -> str:
    """Write the mean, and the lowest and highest value."""
    return f"{statistics.mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="--out folders of train_imagenette.py --compare")
    args = parser.parse_args(argv)
    try:
        print(f"Mean (lowest to highest) over {len(args.runs)} runs:\n\n{table(args.runs)}")
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error.filename} is missing; the run must be made with --compare.") from None


if __name__ == "__main__":
    main()
