"""Evaluate trained models side by side: accuracy, heatmaps, and whether heatmaps show what a model goes by.

    python -m lab evaluate ../runs/demo/cross-entropy/last.pt ../runs/demo/cgc/last.pt
    python -m lab evaluate CHECKPOINT... --data DIR --json found.json

Insertion and deletion areas are torch-cam's (`pip install ".[evaluation]"`, Python 3.11 or newer; left out without it).
With --quantus, three of Quantus' metrics stand beside them, which the same command installs.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cgc_reg import explain
from cgc_reg.visualization import gallery
from lab.checkpoint import load_checkpoint, write_figure, write_whole
from lab.comparison import draw, examples_of, heatmap_columns, table, with_views, written
from lab.data_sets import load_data
from lab.image_data import Data, DataError, denormalize
from lab.measures import measure_model
from lab.models import load_model
from lab.quantus_measures import quantus_measures

NOT_INSTALLED = 'Insertion and deletion are left out: pip install ".[evaluation]" (Python 3.11 or newer).'


def evaluate(model: nn.Module, layer: str, data: Data, args: argparse.Namespace) -> dict[str, float]:
    """Measure one model on the validation images; what takes many passes an image, on some of them."""
    load = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers)
    group = max(2, min(args.batch_size, len(data.validation)))
    batches = tqdm(load(data.validation), "accuracy and heatmaps", leave=False)
    found = measure_model(model, layer, batches, classes=len(data.classes), group=group, device=args.device)
    count = min(args.images, len(data.validation))
    some = Subset(data.validation, torch.linspace(0, len(data.validation) - 1, count).long().tolist())
    found |= quantus_measures(model, layer, load(some), device=args.device) if args.quantus else {}
    images = [x.to(args.device) for x, *_ in load(some)]
    return found | insertion_and_deletion(model, layer, images) | randomization(model, layer, images)


def insertion_and_deletion(model: nn.Module, layer: str, images: list[Tensor]) -> dict[str, float]:
    """Uncover an image from its heatmap's highest place on, and cover it: how fast does the class's probability change?

    Returns:
        The areas under the probability, over the share of pixels that are uncovered ("insertion", high where the
        heatmap shows what the model goes by) or covered by grey ("deletion", low there). Blank heatmaps do not count.

    References:
        Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models (BMVC 2018), section 4.3.
    """
    try:
        from torchcam.methods import GradCAM
        from torchcam.metrics import DeletionInsertionMetric
    except ModuleNotFoundError:
        return {}
    with GradCAM(model, layer) as extractor:
        metric = DeletionInsertionMetric(extractor, partial(torch.softmax, dim=1), batch_size=64)
        for x in tqdm(images, "insertion and deletion", leave=False):
            shown = explain(model, x, layer).flatten(1).amax(dim=1) > 0
            if shown.any():
                metric.update(x[shown])
    if metric.total == 0:
        return {"insertion": float("nan"), "deletion": float("nan")}
    areas = metric.summary()
    return {"insertion": areas["insertion_auc"], "deletion": areas["deletion_auc"]}


def randomization(model: nn.Module, layer: str, images: list[Tensor]) -> dict[str, float]:
    """Compare heatmaps with those that the model gives for the same class after it has lost what it learned.

    Returns:
        Spearman's rank correlation over the pixels of a heatmap, averaged over images, after randomizing the last
        linear layer ("random_head") and all weights ("random_model"): near 0 if heatmaps show what was learned.

    References:
        Adebayo et al., Sanity Checks for Saliency Maps (NeurIPS 2018), section 3.
    """
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    randomized = {"random_model": randomize(model, model)}
    if heads:
        randomized["random_head"] = randomize(model, model.get_submodule(heads[-1]))
    correlations: dict[str, list[float]] = {name: [] for name in randomized}
    for x in tqdm(images, "random weights", leave=False):
        with torch.no_grad():
            target = model.eval()(x).argmax(dim=1)
        own = explain(model, x, layer, target)
        for name, other in randomized.items():
            correlations[name] += rank_correlations(own, explain(other, x, layer, target))
    return {name: sum(values) / len(values) if values else float("nan") for name, values in correlations.items()}


def randomize(model: nn.Module, part: nn.Module) -> nn.Module:
    """Return a copy of the model, with a part of it as it was before training."""
    names = {id(module): name for name, module in model.named_modules()}
    changed = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in part.modules():
            reset = getattr(changed.get_submodule(names[id(module)]), "reset_parameters", None)
            if reset is not None:
                reset()
    return changed


def rank_correlations(a: Tensor, b: Tensor) -> list[float]:
    """Correlate the ranks of pixels, image by image; heatmaps that are all one value have none."""
    pairs = zip(a.flatten(1).cpu().numpy(), b.flatten(1).cpu().numpy(), strict=True)
    return [
        float(spearmanr(own, other).statistic)
        for own, other in pairs
        if own.max() > own.min() and other.max() > other.min()
    ]


def load_models(args: argparse.Namespace) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Build the models of the checkpoints, each under the shortest name that tells it from the others."""
    saved = [load_checkpoint(path, device=args.device) for path in args.checkpoints]
    for path, one in zip(args.checkpoints, saved, strict=True):
        for name in ("classes", "image_size"):
            if one[name] != saved[0][name]:
                raise SystemExit(f"error: {path} and {args.checkpoints[0]} differ in {name}; evaluate them apart.")
    names = [path.parent.name for path in args.checkpoints]
    if len(set(names)) < len(names):
        names = [str(path) for path in dict.fromkeys(args.checkpoints)]
    models = {}
    for name, one in zip(names, saved, strict=True):
        models[name] = load_model(one).to(args.device)
    return models, saved


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab evaluate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoints", type=Path, nargs="+", help="last.pt or best.pt of `python -m lab train`")
    parser.add_argument("--data", help="as for the training (default: what the first was trained on)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets that come as files")
    parser.add_argument("--layer", help="layer of the heatmaps (default: the one of each training)")
    parser.add_argument("--images", type=int, default=256, help="how many to uncover, cover and explain at random")
    parser.add_argument("--quantus", action="store_true", help="measure these with Quantus too; some minutes")
    parser.add_argument("--batch-size", type=int, default=64, help="and the images that the CGC loss contrasts")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write what was measured there too")
    parser.add_argument("--out", type=Path, default=Path("evaluation.png"), help="the picture")
    args = parser.parse_args(argv)
    if args.images < 1 or args.batch_size < 2:
        parser.error(f"--images must be at least 1, and --batch-size 2; got {args.images} and {args.batch_size}.")
    return args


def evaluate_all(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Return the columns of a picture, and what was measured of each model."""
    models, saved = load_models(args)
    first, settings = saved[0], saved[0]["settings"]
    data = load_data(
        args.data or settings["data"],
        root=args.root,
        size=settings["size"],
        image_size=first["image_size"],
        seed=int(settings["seed"]),
    )
    if data.classes != first["classes"]:
        raise DataError(f"the models know {len(first['classes'])} classes, and these are others; check --data.")
    images = examples_of(data.validation, 6).to(args.device)
    pairs = with_views(images, draw(images))
    columns, found = {"image": denormalize(pairs)}, {}
    for (name, model), one in zip(models.items(), saved, strict=True):
        layer = args.layer or one["layer"]
        columns |= heatmap_columns(model, layer, pairs, name)
        found[name] = evaluate(model, layer, data, args)
    return columns, found


def main(argv: list[str] | None = None) -> None:
    """Print the table and draw the picture."""
    args = parse_args(argv)
    try:
        columns, found = evaluate_all(args)
    except (DataError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table("validation", {name: written(values) for name, values in found.items()}))
    if not any("insertion" in values for values in found.values()):
        print(NOT_INSTALLED)
    write_figure(args.out, gallery(columns, title="Each image x, and below it T(x)"))
    print(f"\nHeatmaps: {args.out}")
    if args.json:
        write_whole(args.json, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
