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
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

import processes
from cgc_reg import CGCRegularizer, Consistency, RandomResizedCropFlip, content_heatmap, explain, suggest_target_layer
from cgc_reg.visualization import curves, gallery, overlay
from checkpoint import load_checkpoint, save_checkpoint, write_history, write_whole
from data_sets import CHOICES, default_image_size, load_data
from image_data import IMAGENETTE_FOLDERS, Data, DataError, denormalize, split_labeled
from measures import Mean, Recall, accuracy
from models import build_model

PANELS = {
    "cross-entropy": ["train_cross_entropy", "val_cross_entropy"],
    "top-1 accuracy": ["train_top1", "val_top1"],
    "CGC loss": ["train_cgc", "val_cgc"],
    "heatmaps (validation)": ["val_similarity", "val_margin", "val_content_heatmap"],
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    data.add_argument("--workers", type=int, default=2, help="processes that load images")
    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="resnet18", help="small_resnet, or a torchvision classifier")
    model.add_argument("--pretrained", action="store_true", help="start from torchvision's weights")
    model.add_argument("--layer", help="layer of the heatmaps (default: the last one with a map)")
    train = parser.add_argument_group("training")
    train.add_argument("--lam", type=float, default=0.5, help="weight of CGC; 0 trains with cross-entropy alone")
    train.add_argument("--lam-warmup-epochs", type=float, default=0.0, help="epochs in which lam grows from 0")
    train.add_argument("--temperature", type=float, default=0.5, help="tau of CGC")
    train.add_argument("--gather", action="store_true", help="contrast with the images of all processes")
    train.add_argument("--compare", action="store_true", help="train with --lam 0 too, and print both side by side")
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
    for name in ("epochs", "batch_size", "image_size", "temperature", "lr", "view_size", "heatmap_size", "cgc_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(args, name)}.")
    for name in ("lam", "lam_warmup_epochs", "workers", "weight_decay"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative; got {getattr(args, name)}.")
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2: BatchNorm and CGC compare the images of a batch.")
    if not 0 < args.labeled_fraction <= 1:
        parser.error(f"--labeled-fraction must be above 0 and at most 1; got {args.labeled_fraction}.")
    if not 0 < args.crop_scale <= 1:
        parser.error(f"--crop-scale must be above 0 and at most 1; got {args.crop_scale}.")
    if args.compare and args.lam == 0:
        parser.error("--compare needs a --lam above 0 to compare --lam 0 with.")
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
            row |= validate(args, run, data)
            row["seconds"] = time.perf_counter() - began
            run.history.append(row)
            if processes.is_writer():
                state = run_state(args, run, data, lam)
                save_checkpoint(out / "last.pt", state)
                saved = epoch
                if row["val_top1"] >= max(past["val_top1"] for past in run.history):
                    save_checkpoint(out / "best.pt", state)
                write_history(out / "metrics.csv", run.history)
                write_whole(
                    out / "curves.png", lambda path: curves(run.history, PANELS).savefig(path, format="png", dpi=120)
                )
            processes.wait_for_all()
            saved = epoch  # in the others too, since any of them may be the first to be interrupted
            measured = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith("val_"))
            processes.say(f"epoch {epoch}/{args.epochs}  {measured}")
    except KeyboardInterrupt:
        kept = (
            f"{out / 'last.pt'} holds epoch {saved}; continue with --resume" if saved else "there is no checkpoint yet"
        )
        raise SystemExit(f"\nInterrupted: {kept}.") from None
    return run


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


@torch.no_grad()
def validate(args: argparse.Namespace, run: Run, data: Data) -> dict[str, float]:
    """Measure accuracy and heatmaps on the validation images; the views are the same in every epoch."""
    model = run.model.eval()
    generator = torch.Generator().manual_seed(processes.rank())
    # For the pairs alone: a loss without negatives takes a last batch of one image too.
    reg = CGCRegularizer(run.regularizer.target_layer, loss="mse_consistency", generator=generator)
    total, recall = Mean(), Recall(len(data.classes), args.device)
    # The contrastive loss depends on the number of negatives: it is taken over groups of one size in all processes.
    smallest_share = len(data.validation) // processes.count()
    pairs = Consistency(batch_size=max(2, min(args.batch_size, smallest_share)))
    # Each image in one process; a DistributedSampler would make the shares equal by taking some twice.
    share = Subset(data.validation, range(processes.rank(), len(data.validation), processes.count()))
    loader = make_loader(args, share, epoch=0, shuffle=False)
    for x, y, *mask in progress_bar(loader, "validation"):
        x, y = x.to(args.device), y.to(args.device)
        with autocast(args):
            out = reg.compute(model, x)
            pairs.update(out.query, out.key)
            total.add(
                len(x),
                cross_entropy=F.cross_entropy(out.logits, y),
                top1=accuracy(out.logits, y, 1),
                top5=accuracy(out.logits, y, 5),
            )
            recall.add(out.logits, y)
            if mask:
                on_object = content_heatmap(explain(model, x, reg.target_layer), mask[0].to(args.device))
                total.add(int((~on_object.isnan()).sum()), content_heatmap=on_object.nanmean())
                total.add(len(x), mostly_off_object=(~(on_object >= 0.5)).float().mean())
    found = pairs.compute()
    measured = {
        "cgc": found["loss"],
        "similarity": found["positive_similarity"],
        "margin": found["margin"],
        "blank_share": found["blank_share"],
        **total.over_processes().averages(),
        "balanced_accuracy": recall.over_processes().mean(),
    }
    return {f"val_{name}": round(value, 6) for name, value in measured.items()}


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
    regularizer = CGCRegularizer(
        layer,
        temperature=args.temperature,
        transform=RandomResizedCropFlip(scale=(args.crop_scale, 1.0)),
        view_size=args.view_size and (args.view_size, args.view_size),
        heatmap_size=args.heatmap_size and (args.heatmap_size, args.heatmap_size),
        detach_key=args.detach_key,
        # As in the baseline, running statistics follow the images that cross-entropy is taken on.
        bn_mode="update" if args.cross_entropy_views == 2 and args.labeled_fraction == 1 else "preserve",
        gather_distributed=args.gather,
        generator=torch.Generator(args.device),
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
    free = {"out", "resume", "root", "device", "workers", "compare"}
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


# What the end shows.

Pictures = dict[str, Tensor]


def show_heatmaps(run: Run, images: Tensor, views: Tensor, name: str) -> Pictures:
    """Return heatmaps and overlays of images and their views, in turns: x_1, T(x_1), x_2, ..."""
    model, layer = run.model, run.regularizer.target_layer
    with torch.no_grad():
        target = model.eval()(images).argmax(dim=1)
    heatmaps = interleave(explain(model, images, layer, target), explain(model, views, layer, target))
    return {f"{name}\nheatmap": heatmaps, f"{name}\noverlay": overlay(denormalize(interleave(images, views)), heatmaps)}


def interleave(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=1).flatten(0, 1)


def print_table(runs: dict[str, Run]) -> None:
    """Print the last epoch of each run, side by side."""
    rows = {
        "top-1 accuracy": "val_top1",
        "top-5 accuracy": "val_top5",
        "balanced accuracy": "val_balanced_accuracy",
        "CGC loss": "val_cgc",
        "similarity of T(g(x)) and g(T(x))": "val_similarity",
        "margin over other images": "val_margin",
        "content heatmap": "val_content_heatmap",
        "heatmaps mostly off the object": "val_mostly_off_object",
        "seconds per epoch": "seconds",
    }
    print("\n| validation, last epoch | " + " | ".join(runs) + " |")
    print("|---|" + "---|" * len(runs))
    for title, name in rows.items():
        if all(name in run.history[-1] for run in runs.values()):
            print(f"| {title} | " + " | ".join(f"{run.history[-1][name]:.3f}" for run in runs.values()) + " |")


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
        data = load_data(args.data, root=args.root, size=args.size, image_size=args.image_size, seed=args.seed)
        pick = torch.linspace(0, len(data.validation) - 1, min(6, len(data.validation))).long().tolist()
        images = torch.stack([data.validation[i][0] for i in pick]).to(args.device)
        steps = steps_per_epoch(args, *split_labeled(data, args.labeled_fraction, seed=args.seed))
        before = start(args, data, steps)
        views = draw_view(before.regularizer, images)
        pictures = {"image": denormalize(interleave(images, views)), **show_heatmaps(before, images, views, "before")}
        runs = {}
        for name, lam in weights.items():
            processes.say(f"Training with {name} (lam = {lam:g}) in {folders[name]}")
            runs[name] = train(args, data, lam, folders[name])
            pictures |= show_heatmaps(runs[name], images, views, name)
    except DataError as error:
        raise SystemExit(f"error: {last_line(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted.") from None
    if not processes.is_writer():
        return
    print_table(runs)
    picture = args.out / "gallery.png"
    figure = gallery(pictures, title="Each image x, and below it T(x)")
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
