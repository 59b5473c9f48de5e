"""Train the recipes for volumes, clips and signals with CGC and without it, and put the networks side by side.

    python -m lab dimensions --seeds 0 1 2

Each network is measured on data of its own, of a seed that no training has.
"""

from __future__ import annotations

import argparse
import importlib

import torch
from torch.utils.data import DataLoader

from lab.measures import measure_model
from lab.study_report import interval, spread, table

RECIPES = {
    "volumes": {"cross-entropy": {"lam": 0.0, "mu": 0.0}, "+ CGC": {"mu": 0.0}, "+ CGC and guidance": {}},
    "clips": {"cross-entropy": {"lam": 0.0}, "+ CGC": {}},
    "signals": {"cross-entropy": {"lam": 0.0}, "+ CGC": {}},
}
MEASURES = {
    "top1": "accuracy",
    "cgc": "CGC loss",
    "margin": "margin",
    "content_heatmap": "content heatmap",
    "object_coverage": "object coverage",
}


def main(argv: list[str] | None = None) -> None:
    """Train and print a table for each recipe."""
    parser = argparse.ArgumentParser(prog="python -m lab dimensions", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--images", type=int, help="of a training, in place of the recipe's own number")
    args = parser.parse_args(argv)
    for recipe in args.recipes:
        found: dict[str, list[dict[str, float]]] = {
            name: [measured(recipe, seed, args.images, options) for seed in args.seeds]
            for name, options in RECIPES[recipe].items()
        }
        baseline, *others = found
        rows = [[name, *(spread([one[measure] for one in of]) for measure in MEASURES)] for name, of in found.items()]
        for name in others:
            pairs = list(zip(found[baseline], found[name], strict=True))
            changes = ([after[measure] - before[measure] for before, after in pairs] for measure in MEASURES)
            rows.append([f"{name}, difference", *map(interval, changes)])
        print(f"\n{recipe}\n\n{table(['training', *MEASURES.values()], rows)}")


def measured(recipe: str, seed: int, images: int | None, options: dict[str, float]) -> dict[str, float]:
    """Train by a recipe, and measure the network on the CPU."""
    program = importlib.import_module(f"recipes.{recipe}")
    torch.manual_seed(seed)
    model = program.main(**options, **({} if images is None else {"images": images})).cpu()
    torch.manual_seed(2**31 + seed)
    data = program.toy_data(512)
    batches = DataLoader(data, 64)
    classes = int(data.tensors[1].max()) + 1
    return measure_model(model, "2", batches, transform=program.T, classes=classes, group=64, device="cpu")
