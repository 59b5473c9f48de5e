"""Train an image classifier with Contrastive Grad-CAM Consistency (CGC), in plain PyTorch.

    python examples/train_imagenette.py                                  # ResNet-18 on Imagenette
    python examples/train_imagenette.py --data shapes --compare          # built-in data, with and without CGC
    python examples/train_imagenette.py --data cub200 --arch resnet50 --pretrained
    python examples/train_imagenette.py --data DIR --labeled-fraction 0.1
    torchrun --nproc_per_node 2 examples/train_imagenette.py             # in two processes

Each epoch goes to metrics.csv, curves.png and checkpoints in --out; the end prints a table and draws gallery.png.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

import processes
from cgc_reg import CGCRegularizer, RandomResizedCropFlip, explain, suggest_target_layer
from cgc_reg.explain import HEATMAPS
from cgc_reg.regularizer import LossName
from cgc_reg.visualization import curves, gallery
from checkpoint import load_checkpoint, save_checkpoint, write_history, write_whole
from comparison import draw, examples_of, heatmap_columns, table, with_views, written
from data_sets import CHOICES, default_image_size, load_data
from image_data import IMAGENETTE_FOLDERS, Data, DataError, denormalize, split_labeled
from jobs import run_all, run_script
from measures import Mean, accuracy, measure_model
from models import build_model

PANELS = {
    "cross-entropy": ["train_cross_entropy", "val_cross_entropy"],
    "top-1 accuracy": ["train_top1", "val_top1"],
    "CGC loss": ["train_cgc", "val_cgc"],
    "heatmaps (validation)": ["val_similarity", "val_margin", "val_content_heatmap"],
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,  # also for options that a study holds
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="imagenette", help=f"{CHOICES}, or a folder with train/ and val/")
    data.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets that come as files")
    data.add_argument("--size", choices=IMAGENETTE_FOLDERS, default="160px", help="which Imagenette")
    data.add_argument(
        "--image-size",
        type=int,
        help="side of the images in pixels (default: 64 for shapes, 128 for 160px and elpv, else 224)",
    )
    data.add_argument(
        "--labeled-fraction",
        type=float,
        default=1.0,
        help="share of each class whose labels are used; CGC then takes the rest",
    )
    data.add_argument("--train-images", type=int, help="how many shapes to train on (default: 2048)")
    data.add_argument("--workers", type=int, default=2, help="processes that load images")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--arch", default="resnet18", help="small_resnet, efficientnet_lite0, or a torchvision classifier"
    )
    model.add_argument("--pretrained", action="store_true", help="start from weights trained on ImageNet")
    model.add_argument("--layer", help="layer of the heatmaps (default: the last one with a map)")
    train = parser.add_argument_group("training")
    train.add_argument("--lam", type=float, default=0.5, help="weight of CGC; 0 trains with cross-entropy alone")
    train.add_argument("--lam-warmup-epochs", type=float, default=0.0, help="epochs in which lam grows from 0")
    train.add_argument("--temperature", type=float, default=0.5, help="tau of CGC")
    train.add_argument("--loss", choices=get_args(LossName), default="info_nce", help="what makes heatmaps consistent")
    train.add_argument("--heatmap", choices=HEATMAPS, default="grad_cam", help="rule of the heatmaps that are trained")
    train.add_argument("--official", action="store_true", help="compute CGC as the authors' code does")
    train.add_argument("--gather", action="store_true", help="contrast with the images of all processes")
    train.add_argument("--compare", action="store_true", help="train with --lam 0 too, and print both side by side")
    train.add_argument(
        "--side-by-side",
        action="store_true",
        help="run the two trainings of --compare at the same time, each with half of the CPU's threads",
    )
    train.add_argument(
        "--cross-entropy-views", type=int, choices=(1, 2), default=1, help="cross-entropy on x, or on x and T(x)"
    )
    train.add_argument(
        "--crop-scale", type=float, default=0.08, help="smallest area of T's crop, as a share of the image"
    )
    train.add_argument(
        "--view-size", type=int, help="side of the views in pixels; smaller ones cost less (default: as x)"
    )
    train.add_argument("--heatmap-size", type=int, help="side that heatmaps are brought to (default: as the view's)")
    train.add_argument("--detach-key", action="store_true", help="make CGC's keys constants, which costs less")
    train.add_argument("--cgc-every", type=int, default=1, help="steps from one with CGC to the next; others cost less")
    train.add_argument("--epochs", type=int, default=20)
    train.add_argument("--validate-every", type=int, default=1, help="epochs from one validation to the next")
    train.add_argument("--batch-size", type=int, default=64, help="images of a step, in each process")
    train.add_argument("--lr", type=float, default=0.05, help="highest learning rate of the one-cycle schedule")
    train.add_argument("--momentum", type=float, default=0.9)
    train.add_argument("--weight-decay", type=float, default=5e-4)
    train.add_argument("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/ and the data's name)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, if it was started")
    args = parser.parse_args(argv)
    if args.image_size is None:
        args.image_size = default_image_size(args.data, args.size)
    if args.out is None:
        args.out = Path("runs") / Path(args.data).name
    positive = ["train_images", "epochs", "batch_size", "image_size", "temperature", "lr", "view_size", "heatmap_size"]
    for name in [*positive, "cgc_every", "validate_every"]:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(args, name)}.")
    for name in ("lam", "lam_warmup_epochs", "workers", "weight_decay"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative; got {getattr(args, name)}.")
    if args.train_images is not None and args.data != "shapes":
        parser.error("--train-images is for --data shapes, whose images are drawn; other data come as they are.")
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2: BatchNorm and CGC compare the images of a batch.")
    if not 0 < args.labeled_fraction <= 1:
        parser.error(f"--labeled-fraction must be above 0 and at most 1; got {args.labeled_fraction}.")
    if not 0 < args.crop_scale <= 1:
        parser.error(f"--crop-scale must be above 0 and at most 1; got {args.crop_scale}.")
    if args.compare and args.lam == 0:
        parser.error("--compare needs a --lam above 0 to compare --lam 0 with.")
    if args.side_by_side and (not args.compare or processes.count() > 1):
        parser.error("--side-by-side is for the two trainings of --compare, without torchrun.")
    if args.official and (args.heatmap != "grad_cam" or args.heatmap_size is not None or args.detach_key):
        parser.error("--official sets what --heatmap, --heatmap-size and --detach-key would; leave these out.")
    if args.detach_key and args.cross_entropy_views == 2:
        parser.error("--detach-key builds no graph for the views; it needs --cross-entropy-views 1.")
    if args.gather and processes.count() == 1:
        parser.error("--gather needs more than one process; start them with torchrun.")
    return args


@dataclass
class Run:
    """What one training needs and changes; all of it but `regularizer` is in the checkpoint."""

    model: nn.Module
    regularizer: CGCRegularizer
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]


def train(args: argparse.Namespace, data: Data, lam: float, out: Path) -> Run:
    """Train one model, or continue its training, and return it."""
    labeled, unlabeled = split_labeled(data, args.labeled_fraction, seed=args.seed)
    steps = steps_per_epoch(args, labeled, unlabeled)
    run = start(args, data, steps)
    if args.resume and (out / "last.pt").exists():
        restore(args, run, data, lam, out / "last.pt")
        processes.say(f"Continuing {out} after epoch {len(run.history)}.")
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
                state = run_state(args, run, data, lam)
                save_checkpoint(out / "last.pt", state)
                saved = epoch
                if validated and row["val_top1"] >= max(past.get("val_top1", 0.0) for past in run.history):
                    save_checkpoint(out / "best.pt", state)
                write_history(out / "metrics.csv", run.history)
                write_whole(
                    out / "curves.png", lambda path: curves(run.history, PANELS).savefig(path, format="png", dpi=120)
                )
            processes.wait_for_all()
            saved = epoch  # in the others too, since any of them may be the first to be interrupted
            part = "val_" if validated else "train_"
            measured = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith(part))
            processes.say(f"epoch {epoch}/{args.epochs}  {measured}")
    except KeyboardInterrupt:
        kept = (
            f"{out / 'last.pt'} holds epoch {saved}; continue with --resume" if saved else "there is no checkpoint yet"
        )
        raise SystemExit(f"\nInterrupted: {kept}.") from None
    return run


def train_side_by_side(args: argparse.Namespace, weights: dict[str, float]) -> None:
    """Make the trainings in processes of their own, at the same time; show their epochs."""
    options = vars(args) | {"compare": False, "side_by_side": False}
    threads = max(1, torch.get_num_threads() // len(weights))
    bars = {name: tqdm(total=args.epochs, desc=name, unit="epoch") for name in weights}

    def show(name: str, line: str) -> None:
        done = re.match(r"epoch (\d+)/|Continuing .* after epoch (\d+)", line)
        if done:
            bars[name].update(int(done[1] or done[2]) - bars[name].n)
            tqdm.write(f"{name}: {line}")

    jobs = [
        partial(
            run_script,
            [__file__, *as_arguments(options | {"lam": lam})],
            threads=threads,
            on_line=partial(show, name),
        )
        for name, lam in weights.items()
    ]
    try:
        for _ in run_all(jobs, at_a_time=len(jobs)):
            pass
    finally:
        for bar in bars.values():
            bar.close()


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Write options as they stand on the command line."""
    arguments = []
    for name, value in options.items():
        if value is not None and value is not False:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return arguments


def train_epoch(
    args: argparse.Namespace, run: Run, labeled: Any, unlabeled: Any, lam: float, epoch: int, steps: int
) -> dict[str, float]:
    """Take the optimizer through one epoch."""
    # All randomness of an epoch follows from the seed, its number and the process, so a resumed run repeats it.
    seed_everything(epoch_seed(args, epoch))
    # Wrapped anew for that too: after its first step DistributedDataParallel adds gradients up in another order.
    model, reg = processes.parallel(run.model.train()), run.regularizer
    reg.generator.manual_seed(epoch_seed(args, epoch))
    labeled_batches = cycle_batches(make_loader(args, labeled, epoch, shuffle=True))
    unlabeled_batches = (
        cycle_batches(make_loader(args, unlabeled, epoch, shuffle=True)) if unlabeled is not None else None
    )
    total = Mean()
    bar = progress_bar(range(steps), f"epoch {epoch}/{args.epochs}")
    for step in bar:
        progress = epoch - 1 + step / steps
        weight = lam if progress >= args.lam_warmup_epochs else lam * progress / args.lam_warmup_epochs
        regularized = lam > 0 and step % args.cgc_every == 0
        x, y, *_ = (tensor.to(args.device, non_blocking=True) for tensor in next(labeled_batches))
        with autocast(args):
            if regularized and unlabeled_batches is None:
                # The two lines of CGC: one call in place of model(x), and its loss beside the cross-entropy.
                out = reg.compute(model, x)
                logits, view_logits, cgc = out.logits, out.view_logits, out.loss
            else:
                logits, cgc = model(x), x.new_zeros(())
                # The baseline sees both views too.
                view_logits = model(draw_view(reg, x, reg.view_size)) if args.cross_entropy_views == 2 else logits
            if regularized and unlabeled_batches is not None:
                u, *_ = next(unlabeled_batches)
                cgc = reg(model, u.to(args.device, non_blocking=True))
            cross_entropy = F.cross_entropy(logits, y)
            loss = cross_entropy + weight * cgc
            if args.cross_entropy_views == 2:
                loss = loss + F.cross_entropy(view_logits, y)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
        total.add(len(x), cross_entropy=cross_entropy, top1=accuracy(logits, y, 1), top5=accuracy(logits, y, 5))
        if regularized:
            total.add(len(x), cgc=cgc)
        if step % 10 == 0 and not bar.disable:  # reading the averages makes a GPU wait
            bar.set_postfix({name: f"{value:.3f}" for name, value in total.averages().items()})
    return {f"train_{name}": value for name, value in total.over_processes().averages().items()}


def draw_view(reg: CGCRegularizer, x: Tensor, view_size: tuple[int, int] | None = None) -> Tensor:
    """Draw T as the regularizer does and return T(x)."""
    size = (x.shape[2], x.shape[3])
    return reg.transform.sample(len(x), size, device=x.device, generator=reg.generator)(x, view_size)


def validate(args: argparse.Namespace, run: Run, data: Data) -> dict[str, float]:
    """Measure accuracy and heatmaps on the validation images; the views are the same in every epoch."""
    # Each image in one process; a DistributedSampler would make the shares equal by taking some twice.
    share = Subset(data.validation, range(processes.rank(), len(data.validation), processes.count()))
    loader = make_loader(args, share, epoch=0, shuffle=False)
    measured = measure_model(
        run.model,
        run.regularizer.target_layer,
        progress_bar(loader, "validation"),
        classes=len(data.classes),
        group=max(2, min(args.batch_size, len(data.validation) // processes.count())),  # which every process can fill
        device=args.device,
        autocast=lambda: autocast(args),
    )
    return {f"val_{name}": value for name, value in measured.items()}


def start(args: argparse.Namespace, data: Data, steps: int) -> Run:
    """Build everything as it is before the first step."""
    seed_everything(1000 * args.seed)
    try:
        model = build_model(args.arch, len(data.classes), pretrained=args.pretrained)
        model = model.to(args.device, memory_format=torch.channels_last)
        example = data.validation[0][0][None].to(args.device)
        layer = args.layer or suggest_target_layer(model, example)
        explain(model, example, layer)  # an unknown layer is an error now, not after the first epoch
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    options: dict[str, Any] = {
        "loss": args.loss,
        "temperature": args.temperature,
        "transform": RandomResizedCropFlip(scale=(args.crop_scale, 1.0)),
        "view_size": args.view_size and (args.view_size, args.view_size),
        # As in the baseline, running statistics follow the images that cross-entropy is taken on.
        "bn_mode": "update" if args.cross_entropy_views == 2 and args.labeled_fraction == 1 else "preserve",
        "gather_distributed": args.gather,
        "generator": torch.Generator(args.device),
    }
    if args.official:
        regularizer = CGCRegularizer.official(layer, **options)
    else:
        size = args.heatmap_size and (args.heatmap_size, args.heatmap_size)
        regularizer = CGCRegularizer(
            layer, heatmap=args.heatmap, heatmap_size=size, detach_key=args.detach_key, **options
        )
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.momentum > 0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps + 1)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp and torch.device(args.device).type == "cuda")
    return Run(model, regularizer, optimizer, schedule, scaler, [])


def run_state(args: argparse.Namespace, run: Run, data: Data, lam: float) -> dict[str, Any]:
    """Return all that a checkpoint holds."""
    return {
        "arch": args.arch,
        "classes": data.classes,
        "layer": run.regularizer.target_layer,
        "image_size": args.image_size,
        "settings": settings(args, lam),
        "processes": processes.count(),
        "history": run.history,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
    }


def settings(args: argparse.Namespace, lam: float) -> dict[str, str]:
    """Return the options that decide the result; a resumed run must have them all."""
    free = {"out", "resume", "root", "device", "workers", "compare", "side_by_side", "validate_every"}
    return {name: str(value) for name, value in vars(args).items() if name not in free} | {"lam": str(lam)}


def restore(args: argparse.Namespace, run: Run, data: Data, lam: float, path: Path) -> None:
    """Bring a run back to where its checkpoint was written."""
    saved = load_checkpoint(path, device=args.device)
    now = settings(args, lam)
    differences = [
        f"--{name.replace('_', '-')} was {then} and is {now.get(name)}"
        for name, then in saved["settings"].items()
        if now.get(name) != then
    ]
    if saved["classes"] != data.classes:
        differences.append("the classes have changed")
    if saved.get("processes", 1) != processes.count():
        differences.append(f"it ran in {saved.get('processes', 1)} processes and this one runs in {processes.count()}")
    if differences:
        why = "; ".join(differences)
        raise SystemExit(f"error: {path} is of another run ({why}); undo that, or choose another --out.")
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.schedule.load_state_dict(saved["schedule"])
    run.scaler.load_state_dict(saved["scaler"])
    run.history.extend(saved["history"])


def autocast(args: argparse.Namespace) -> Any:
    """Mixed precision where it is asked for."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16) if args.amp else nullcontext()


def progress_bar(steps: Any, title: str) -> Any:
    """Show how far the writer is."""
    return tqdm(steps, title, leave=False, mininterval=0.5, disable=not processes.is_writer())


def seed_everything(seed: int) -> None:
    """Set every source of randomness."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def epoch_seed(args: argparse.Namespace, epoch: int) -> int:
    """Return a seed for an epoch; each process has one of its own, and so augmentations, dropout and T of its own."""
    return 1000 * args.seed + epoch + 2**20 * processes.rank()


def make_loader(args: argparse.Namespace, dataset: Any, epoch: int, *, shuffle: bool) -> DataLoader[Any]:
    sampler = None
    if shuffle and processes.count() > 1:  # equal shares of one shuffle, which follows from the seed and the epoch
        sampler = DistributedSampler(dataset, seed=1000 * args.seed + epoch, drop_last=True)
    return DataLoader(
        dataset,
        args.batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        drop_last=shuffle and len(dataset) // processes.count() >= args.batch_size,
        num_workers=args.workers,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(epoch_seed(args, epoch)),
    )


def cycle_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Repeat a loader without end, shuffled anew each time."""
    for repeat in itertools.count():
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(1000 * repeat)  # added to the sampler's seed, in which epochs differ by 1
        yield from loader


def steps_per_epoch(args: argparse.Namespace, labeled: Any, unlabeled: Any) -> int:
    """One epoch goes once over the larger of the two sets, in equal shares for all processes."""
    shares = [len(images) // processes.count() for images in (labeled, unlabeled) if images is not None]
    if min(shares) < 2:
        raise SystemExit(
            "error: training needs at least two labelled and two unlabelled images for each process; change "
            "--labeled-fraction."
        )
    return max(1, max(shares) // args.batch_size)


@processes.joined()
def main(argv: list[str] | None = None) -> None:
    with processes.writer_first():  # so that it alone says what is wrong with them
        args = parse_args(argv)
    processes.use_own_gpu(args.device)
    weights = (
        {"cross-entropy": 0.0, "cross-entropy + CGC": args.lam}
        if args.compare
        else {"cross-entropy + CGC" if args.lam else "cross-entropy": args.lam}
    )
    folders = {name: args.out / ("cgc" if lam else "cross-entropy") for name, lam in weights.items()}
    for folder in folders.values():
        if (folder / "last.pt").exists() and not args.resume:
            raise SystemExit(
                f"error: {folder} already holds a run; continue it with --resume, or choose another --out."
            )
    try:
        data = load_data(
            args.data,
            root=args.root,
            size=args.size,
            image_size=args.image_size,
            seed=args.seed,
            train_images=args.train_images,
        )
        before = start(args, data, steps_per_epoch(args, *split_labeled(data, args.labeled_fraction, seed=args.seed)))
        images = examples_of(data.validation, 6).to(args.device)
        pairs = with_views(images, draw(images))
        layer = before.regularizer.target_layer
        columns = {"image": denormalize(pairs), **heatmap_columns(before.model, layer, pairs, "before")}
        if args.side_by_side:
            train_side_by_side(args, weights)
            args.resume = True  # they are finished, and only have to be read
        last = {}
        for name, lam in weights.items():
            processes.say(f"Training with {name} (lam = {lam:g}) in {folders[name]}")
            run = train(args, data, lam, folders[name])
            columns |= heatmap_columns(run.model, layer, pairs, name)
            last[name] = {key.removeprefix("val_"): value for key, value in run.history[-1].items()}
    except DataError as error:
        raise SystemExit(f"error: {last_line(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted.") from None
    if not processes.is_writer():
        return
    print("\n" + table("validation, last epoch", {name: written(values) for name, values in last.items()}))
    picture = args.out / "gallery.png"
    figure = gallery(columns, title="Each image x, and below it T(x)")
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))
    print(
        f"\nHeatmaps: {picture}\n"
        + "\n".join(f"Checkpoints, metrics.csv, curves.png: {folder}" for folder in folders.values())
    )


def last_line(error: Exception) -> str:
    """Return an error's own words: one raised in a worker carries that worker's traceback in front."""
    return str(error).strip().splitlines()[-1].removeprefix("image_data.DataError: ")


if __name__ == "__main__":
    main()
