"""Train with cheaper steps on the built-in data, and tell how much of CGC's gain each keeps.

    python examples/budgets.py                        # three seeds, about an hour on two cores
    python examples/budgets.py --out runs/budgets     # again: finished trainings are not repeated

All have cross-entropy on x alone and the same BatchNorm treatment. What a step of each costs, benchmark.py measures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from tqdm import tqdm

from summarize import last_epoch, spread

SETTING = "--data shapes --arch small_resnet --crop-scale 0.5 --lr 0.1 --epochs 24 --lam-warmup-epochs 6 --workers 0"
BUDGETS = {  # title: folder, options
    "cross-entropy": ("ce", "--lam 0"),
    "CGC": ("full", ""),
    "CGC, views of 40 x 40 instead of 64 x 64": ("small", "--view-size 40"),
    "CGC, views of 40 x 40, both heatmaps brought to 8 x 8": ("enlarged", "--view-size 40 --heatmap-size 8"),
    "CGC, views of 40 x 40, lam 1": ("heavy", "--view-size 40 --lam 1"),
    "CGC in every third step, lam 1.5": ("third", "--cgc-every 3 --lam 1.5"),
    "CGC, `detach_key`": ("detach", "--detach-key"),
}
GAINS = ["val_cgc", "val_content_heatmap"]
METRICS = {"top-1 accuracy": "val_top1", "CGC loss": "val_cgc", "content heatmap": "val_content_heatmap"}


def train(out: Path, budget: str, seed: int) -> dict[str, float]:
    """Make one training, unless that has been done, and return its last epoch."""
    name, options = BUDGETS[budget]
    folder = out / f"{name}-{seed}"
    metrics = folder / ("cross-entropy" if budget == "cross-entropy" else "cgc") / "metrics.csv"
    if not (folder / "gallery.png").exists():  # the last thing that a training writes
        script = Path(__file__).with_name("train_imagenette.py")
        command = [sys.executable, script, *SETTING.split(), *options.split(), "--seed", str(seed), "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(f"error: the training in {folder} failed: {ended.stderr.strip().splitlines()[-1]}")
    return last_epoch(metrics)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Lay out the metrics, and the share of CGC's gain over cross-entropy that each budget keeps, seed by seed."""
    titles = [*METRICS, *(f"gain kept, {title}" for title, name in METRICS.items() if name in GAINS)]
    rows = ["| training | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for budget, runs in found.items():
        cells = [spread([run[name] for run in runs]) for name in METRICS.values()]
        for name in GAINS:
            seeds = zip(runs, found["cross-entropy"], found["CGC"], strict=True)
            cells.append(spread([(own[name] - plain[name]) / (full[name] - plain[name]) for own, plain, full in seeds]))
        rows.append(f"| {budget} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of one thread each")
    args = parser.parse_args(argv)
    todo = list(product(args.seeds, BUDGETS))
    with ThreadPoolExecutor(args.jobs) as pool:
        ends = list(tqdm(pool.map(lambda one: train(args.out, one[1], one[0]), todo), "trainings", total=len(todo)))
    found = {budget: [end for (_, other), end in zip(todo, ends, strict=True) if other == budget] for budget in BUDGETS}
    print(f"\nMean (lowest to highest) over {len(args.seeds)} seeds, validation, last epoch:\n\n{table(found)}")


if __name__ == "__main__":
    main()
