"""The options of a training: what they are called, which go together, and which decide its result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from cgc_reg.regularizer import WeightingName
from lab import processes
from lab.data_sets import CHOICES, DRAWN, default_image_size
from lab.image_data import IMAGENETTE_FOLDERS
from lab.losses import LOSSES
from lab.rules import RULES

# Options that change where and how a training runs, but nothing that it comes to.
FREE = {"out", "resume", "root", "device", "workers", "compare", "side_by_side", "say_steps", "validate_every"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, fill in what depends on others, and refuse what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m lab train",  # also for options that a study holds
        description="Train an image classifier, with CGC or without it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_options(parser.add_argument_group("data"))
    add_model_options(parser.add_argument_group("model"))
    add_cgc_options(parser.add_argument_group("CGC"))
    add_guidance_options(parser.add_argument_group("guidance"))
    add_training_options(parser.add_argument_group("training"))
    add_run_options(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    if args.image_size is None:
        args.image_size = default_image_size(args.data, args.size)
    if args.out is None:
        args.out = Path("runs") / Path(args.data).name
    check_values(args, parser.error)
    check_combinations(args, parser.error)
    return args


def add_data_options(group: Any) -> None:
    group.add_argument("--data", default="imagenette", help=f"{CHOICES}, or a folder with train/ and val/")
    group.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets that come as files")
    group.add_argument("--size", choices=IMAGENETTE_FOLDERS, default="160px", help="which Imagenette")
    group.add_argument(
        "--image-size",
        type=int,
        help="side of the images in pixels (default: 64 for shapes, with or without context, 128 for 160px and elpv, "
        "else 224)",
    )
    group.add_argument(
        "--labeled-fraction",
        type=float,
        default=1.0,
        help="share of each class whose labels are used; CGC then takes the rest",
    )
    group.add_argument("--train-images", type=int, help="how many shapes to train on (default: 2048)")
    group.add_argument("--workers", type=int, default=2, help="processes that load images")


def add_model_options(group: Any) -> None:
    group.add_argument(
        "--arch", default="resnet18", help="small_resnet, efficientnet_lite0, or a torchvision classifier"
    )
    group.add_argument("--pretrained", action="store_true", help="start from weights trained on ImageNet")
    group.add_argument("--layer", help="layer of the heatmaps (default: the last one with a map)")


def add_cgc_options(group: Any) -> None:
    group.add_argument("--lam", type=float, default=0.5, help="weight of CGC; 0 trains with cross-entropy alone")
    group.add_argument("--lam-warmup-epochs", type=float, default=0.0, help="epochs in which lam grows from 0")
    group.add_argument("--temperature", type=float, default=0.5, help="tau of CGC")
    group.add_argument("--loss", choices=LOSSES, default="info_nce", help="what makes heatmaps consistent")
    group.add_argument("--heatmap", choices=RULES, default="grad_cam", help="rule of the heatmaps that are trained")
    group.add_argument("--weighting", choices=get_args(WeightingName), default="uniform", help="weight of each image")
    group.add_argument("--official", action="store_true", help="compute CGC as the authors' code does")
    group.add_argument("--gather", action="store_true", help="contrast with the images of all processes")
    group.add_argument(
        "--crop-scale", type=float, default=0.08, help="smallest area of T's crop, as a share of the image"
    )
    group.add_argument(
        "--view-size", type=int, help="side of the views in pixels; smaller ones cost less (default: as x)"
    )
    group.add_argument("--heatmap-size", type=int, help="side that heatmaps are brought to (default: as the view's)")
    group.add_argument("--detach-key", action="store_true", help="make CGC's keys constants, which costs less")
    group.add_argument("--cgc-every", type=int, default=1, help="steps from one with CGC to the next; others cost less")


def add_guidance_options(group: Any) -> None:
    group.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="weight of the energy loss, which keeps the heatmaps of x on the object",
    )
    group.add_argument(
        "--guided-class",
        choices=("predicted", "label"),
        default="predicted",
        help="class that the heatmaps of x are of, for the energy loss and for CGC",
    )
    group.add_argument(
        "--guided-fraction",
        type=float,
        default=0.05,
        help="share of each class whose masks are known to the energy loss",
    )


def add_training_options(group: Any) -> None:
    group.add_argument(
        "--cross-entropy-views", type=int, choices=(1, 2), default=1, help="cross-entropy on x, or on x and T(x)"
    )
    group.add_argument("--epochs", type=int, default=20)
    group.add_argument("--batch-size", type=int, default=64, help="images of a step, in each process")
    group.add_argument("--lr", type=float, default=0.05, help="highest learning rate of the one-cycle schedule")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=5e-4)
    group.add_argument("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    group.add_argument("--seed", type=int, default=0)


def add_run_options(group: Any) -> None:
    group.add_argument("--compare", action="store_true", help="train with --lam 0 too, and print both side by side")
    group.add_argument(
        "--side-by-side",
        action="store_true",
        help="run the two trainings of --compare at the same time, each with half of the CPU's threads",
    )
    group.add_argument("--validate-every", type=int, default=1, help="epochs from one validation to the next")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--out", type=Path, help="folder of the run (default: runs/ and the data's name)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out, if it was started")
    group.add_argument("--say-steps", action="store_true", help=argparse.SUPPRESS)  # for the bars of --side-by-side


def check_values(args: argparse.Namespace, error: Callable[[str], object]) -> None:
    """Refuse a number that is out of its range."""
    positive = ["train_images", "epochs", "batch_size", "image_size", "temperature", "lr", "view_size", "heatmap_size"]
    for name in [*positive, "cgc_every", "validate_every"]:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            error(f"--{name.replace('_', '-')} must be positive; got {getattr(args, name)}.")
    for name in ("lam", "lam_warmup_epochs", "guidance", "workers", "weight_decay"):
        if getattr(args, name) < 0:
            error(f"--{name.replace('_', '-')} must not be negative; got {getattr(args, name)}.")
    for name in ("labeled_fraction", "guided_fraction", "crop_scale"):
        if not 0 < getattr(args, name) <= 1:
            error(f"--{name.replace('_', '-')} must be above 0 and at most 1; got {getattr(args, name)}.")
    if args.batch_size < 2:
        error("--batch-size must be at least 2: BatchNorm and CGC compare the images of a batch.")


def check_combinations(args: argparse.Namespace, error: Callable[[str], object]) -> None:
    """Refuse options that do not go together."""
    if args.train_images is not None and args.data not in DRAWN:
        error(
            f"--train-images is for --data {' or '.join(DRAWN)}, whose images are drawn; other data come as they are."
        )
    if args.guidance and args.data not in DRAWN:
        error(f"--guidance is for --data {' or '.join(DRAWN)}; no others have masks of their training images here.")
    if args.guidance and args.labeled_fraction < 1:
        error(
            "--guidance is on images with labels, of which --guided-fraction is a share; leave --labeled-fraction out."
        )
    if args.compare and args.lam == 0:
        error("--compare needs a --lam above 0 to compare --lam 0 with.")
    if args.side_by_side and (not args.compare or processes.count() > 1):
        error("--side-by-side is for the two trainings of --compare, without torchrun.")
    own = args.heatmap != "grad_cam" or args.heatmap_size is not None or args.detach_key or args.weighting != "uniform"
    if args.official and own:
        error("--official sets what --heatmap, --heatmap-size, --detach-key and --weighting would; leave these out.")
    if args.detach_key and args.cross_entropy_views == 2:
        error("--detach-key builds no graph for the views; it needs --cross-entropy-views 1.")
    if args.gather and processes.count() == 1:
        error("--gather needs more than one process; start them with torchrun.")


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Write options as they stand on the command line."""
    arguments = []
    for name, value in options.items():
        if value is not None and value is not False:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return arguments


def settings(args: argparse.Namespace, lam: float) -> dict[str, str]:
    """Return the options that decide the result; a resumed run must have them all."""
    return {name: str(value) for name, value in vars(args).items() if name not in FREE} | {"lam": str(lam)}
