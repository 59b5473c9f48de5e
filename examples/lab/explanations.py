"""Train with CGC on each explanation in turn, and measure the CGC loss of that explanation before and after.

    python -m lab explanations --epochs 12

Cross-entropy alone is trained once, and measured with each of them. A training that is there is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.utils.data import DataLoader

from lab import train
from lab.benchmark import table
from lab.checkpoint import load_checkpoint
from lab.data_sets import load_data
from lab.measures import measure_model
from lab.models import load_model
from lab.options import parse_args
from lab.rules import RULES

MEASURES = {"cgc": "CGC loss", "content_heatmap": "content heatmap", "top1": "top-1 accuracy"}
TRAINING = (
    "--data shapes --arch small_resnet --cross-entropy-views 2 --crop-scale 0.5 --lr 0.1 --lam-warmup-epochs {half} "
    "--epochs {epochs} --validate-every {epochs} --workers 0 --seed {seed} --resume"
)


def main(argv: list[str] | None = None) -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(prog="python -m lab explanations", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=2048)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="which explanations")
    parser.add_argument("--out", type=Path, default=Path("runs/explanations"), help="folder of the trainings")
    args = parser.parse_args(argv)
    rows = []
    for rule in args.rules:
        before = measured(args, rule, trained(args, "cross-entropy", "--lam", "0"))
        after = measured(args, rule, trained(args, rule, "--lam", "0.5", "--heatmap", rule))
        values = [f"{found[name]:.3f}" for name in MEASURES for found in (before, after)]
        rows.append([f"`{rule}`", *values])
    columns = [f"{title}, {how}" for title in MEASURES.values() for how in ("cross-entropy", "+ CGC")]
    print(table(["explanation", *columns], rows))


def trained(args: argparse.Namespace, name: str, *options: str) -> Path:
    """Make one training and return its checkpoint."""
    common = TRAINING.format(epochs=args.epochs, half=args.epochs / 2, seed=args.seed)
    train.main([*common.split(), "--train-images", str(args.train_images), "--out", str(args.out / name), *options])
    (checkpoint,) = (args.out / name).glob("*/last.pt")
    return checkpoint


def measured(args: argparse.Namespace, rule: str, checkpoint: Path) -> dict[str, float]:
    """Measure a trained model with one explanation."""
    saved = load_checkpoint(checkpoint)
    settings = parse_args(["--data", "shapes"])
    data = load_data("shapes", root=settings.root, size=settings.size, image_size=saved["image_size"], seed=args.seed)
    batches = DataLoader(data.validation, 64)
    explainer = RULES[rule](saved["layer"])
    return measure_model(load_model(saved), explainer, batches, classes=len(data.classes), group=64, device="cpu")
