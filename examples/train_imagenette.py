"""Train a ResNet-18 on Imagenette with Contrastive Grad-CAM Consistency (CGC), in plain PyTorch.

    python examples/train_imagenette.py                            # downloads Imagenette (160 px) into data/
    python examples/train_imagenette.py --data DIR --arch resnet50 --pretrained    # DIR/train/CLASS/, DIR/val/CLASS/
    python examples/train_imagenette.py --labeled-fraction 0.1     # CGC on the images whose labels are not used
    python examples/train_imagenette.py --resume                   # goes on where it was interrupted, bit for bit

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.transforms import v2
from tqdm import tqdm

from cgc_reg import CGCRegularizer, Consistency, explain, suggest_target_layer  # CGC
from cgc_reg.folders import check_images, image_folder  # CGC
from cgc_reg.images import ImageError  # CGC
from cgc_reg.visualization import gallery, pair_columns  # CGC

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHS = torchvision.models.list_models(module=torchvision.models)
IMAGENETTE = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


class InputError(Exception):
    """What the user can mend, in one sentence."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about, layout = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=layout)
    parser.add_argument("--data", default="imagenette", help="imagenette, or a folder with train/ and val/")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that Imagenette is downloaded into")
    parser.add_argument("--size", choices=IMAGENETTE, default="160px", help="which Imagenette")
    parser.add_argument("--image-size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--labeled-fraction", type=float, default=1.0, help="share of each class whose labels are used")
    parser.add_argument("--arch", choices=ARCHS, default="resnet18", metavar="ARCH", help="a torchvision classifier")
    parser.add_argument("--pretrained", action="store_true", help="start from weights trained on ImageNet")
    parser.add_argument("--layer", help="layer of the heatmaps; by default the last one with a map")  # CGC
    parser.add_argument("--lam", type=float, default=0.5, help="weight of CGC; at 0 it is only measured")  # CGC
    parser.add_argument("--lam-warmup-epochs", type=float, default=0.0, help="epochs in which lam grows")  # CGC
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05, help="highest learning rate of the one-cycle schedule")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the run; by default runs/ and the data's name")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if it was started")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.data).name
    for name, least in {"epochs": 1, "batch_size": 2, "image_size": 1, "workers": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}.")
    if not 0 < args.labeled_fraction <= 1:
        parser.error(f"--labeled-fraction must be above 0 and at most 1; got {args.labeled_fraction}.")
    if min(args.lam, args.lam_warmup_epochs) < 0:  # CGC
        parser.error("--lam and --lam-warmup-epochs must not be negative.")  # CGC
    return args


def open_data(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """Open the training and the validation images, normalised; download Imagenette if it is missing."""
    folder = args.root / IMAGENETTE[args.size] if args.data == "imagenette" else Path(args.data)
    if args.data == "imagenette" and not folder.is_dir():
        args.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.root) as scratch:  # an interrupted download is not the data set
            try:
                Imagenette(scratch, size=args.size, download=True)
            except (OSError, RuntimeError) as error:
                raise InputError(f"Imagenette cannot be downloaded ({error}); pass --data DIR instead.") from None
            os.replace(Path(scratch) / folder.name, folder)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    side = args.image_size
    augment = v2.Compose([v2.RandomResizedCrop(side, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), *to_tensor])
    centre = v2.Compose([v2.Resize(side * 8 // 7), v2.CenterCrop(side), *to_tensor])
    try:
        train = image_folder(folder / "train", augment)  # CGC, was: train = ImageFolder(folder / "train", augment)
        validation = image_folder(folder / "val", centre)  # CGC, was: validation = ImageFolder(folder / "val", centre)
    except OSError as error:
        raise InputError(f"{folder} must hold train/CLASS/ and val/CLASS/ with images ({error}).") from None
    if train.classes != validation.classes:
        raise InputError(f"{folder}/train and {folder}/val must hold the same classes.")
    return train, validation


def split_labeled(images: ImageFolder, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Keep the labels of a share of each class, at least one; return the labelled and the other images."""
    labeled: set[int] = set()
    generator, targets = torch.Generator().manual_seed(seed), torch.tensor(images.targets)
    for label in range(len(images.classes)):
        own = (targets == label).nonzero().flatten()
        count = max(1, round(fraction * len(own)))
        labeled |= set(own[torch.randperm(len(own), generator=generator)[:count]].tolist())
    return Subset(images, sorted(labeled)), Subset(images, sorted(set(range(len(images))) - labeled))


def build_model(arch: str, classes: int, pretrained: bool) -> nn.Module:
    if pretrained:  # with a linear layer for these classes in place of the last one
        model = torchvision.models.get_model(arch, weights="DEFAULT")
        name, head = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)][-1]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Linear(head.in_features, classes))
    else:
        model = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    if hasattr(model, "aux_logits"):
        model.aux_logits = False  # GoogLeNet and Inception then put out logits in training too
    return model


def batches(images: Any, args: argparse.Namespace) -> Iterator[list[Tensor]]:
    """Give full batches of shuffled images on the device, without end."""
    size = min(args.batch_size, len(images))
    loader = DataLoader(images, size, shuffle=True, drop_last=True, num_workers=args.workers)
    while True:
        for batch in loader:
            yield [tensor.to(args.device) for tensor in batch]


@torch.no_grad()
def validate(
    model: nn.Module,
    images: ImageFolder,
    args: argparse.Namespace,
    reg: CGCRegularizer,  # CGC
) -> dict[str, float]:
    """Measure a model on images; where views are drawn, they are the same each time."""
    model.eval()
    right = 0
    reg.generator.manual_seed(args.seed)  # CGC
    pairs = Consistency(batch_size=min(args.batch_size, len(images)))  # CGC
    for x, y in DataLoader(images, args.batch_size, num_workers=args.workers):
        x, y = x.to(args.device), y.to(args.device)
        out = reg.compute(model, x)  # CGC
        logits = out.logits  # CGC, was: logits = model(x)
        pairs.update(out.query, out.key)  # CGC
        right += (logits.argmax(dim=1) == y).sum()
    row = {"val_accuracy": float(right) / len(images)}
    row |= {f"val_{name}": pairs.compute()[name] for name in ("positive_similarity", "margin")}  # CGC
    return row


def settings(args: argparse.Namespace, images: ImageFolder) -> dict[str, Any]:
    """Return what decides the result; a resumed run must have it all."""
    free = ("root", "workers", "device", "out", "resume")
    return {name: value for name, value in vars(args).items() if name not in free} | {"classes": images.classes}


def restore(path: Path, now: dict[str, Any], parts: dict[str, Any]) -> list[dict[str, float]]:
    """Bring all parts of a training back to where its checkpoint was written, and return its history."""
    if not zipfile.is_zipfile(path):  # torch.save writes one
        raise InputError(f"{path} is not a checkpoint; remove it or choose another --out.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, then in saved["settings"].items():
        if now[name] != then:
            raise InputError(f"{path} is of another run: {name} was {then} and is {now[name]}; choose another --out.")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    print(f"{path} holds {len(saved['history'])} of {now['epochs']} epochs.")
    return saved["history"]


def save(out: Path, content: dict[str, Any]) -> None:
    """Write checkpoint and metrics.csv; a crash while the checkpoint is written leaves the previous one."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save(content, out / "partial.pt")
    os.replace(out / "partial.pt", out / "last.pt")
    with open(out / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, content["history"][0])
        table.writeheader()
        table.writerows(content["history"])


def train(args: argparse.Namespace) -> nn.Module:
    """Train a model, or continue its training, and return it."""
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise InputError(f"{args.out} already holds a run; continue it with --resume, or choose another --out.")
    images, validation = open_data(args)
    labeled, unlabeled = split_labeled(images, args.labeled_fraction, args.seed)
    if min(len(labeled), len(validation)) < 2:
        raise InputError("training needs at least two labelled images, and validation two; change --labeled-fraction.")
    steps = max(1, len(images) // args.batch_size)  # of an epoch

    torch.manual_seed(args.seed)
    try:
        if not last.exists():  # CGC - a file that cannot be read is an error now
            paths = [path for path, _ in images.samples + validation.samples]  # CGC
            check_images(tqdm(paths, "reading every image once", leave=False, disable=None))  # CGC
        device = torch.device(args.device)
        model = build_model(args.arch, len(images.classes), args.pretrained).to(device)
        example = validation[0][0][None].to(device)
        layer = args.layer or suggest_target_layer(model, example)  # CGC
        explain(model, example, layer)  # CGC - an unknown layer is an error now
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from None
    # T is drawn apart, so that cross-entropy sees the same images in the same order whatever lam is.
    reg = CGCRegularizer(layer, generator=torch.Generator(device))  # CGC
    measure = CGCRegularizer(layer, loss="mse_consistency", generator=reg.generator)  # CGC - takes a single image too
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = restore(last, settings(args, images), parts) if last.exists() else []

    for epoch in range(len(history) + 1, args.epochs + 1):
        began = time.perf_counter()
        # All randomness of an epoch follows from the seed and its number, so that a resumed run repeats it.
        torch.manual_seed(1000 * args.seed + epoch)
        reg.generator.manual_seed(1000 * args.seed + epoch)  # CGC
        labeled_batches = batches(labeled, args)
        unlabeled_batches = batches(unlabeled, args) if len(unlabeled) > 1 else None  # CGC
        model.train()
        sums: dict[str, Any] = defaultdict(float)
        bar = tqdm(range(steps), f"epoch {epoch}/{args.epochs}", leave=False, disable=None)
        for step in bar:
            x, y = next(labeled_batches)
            with torch.autocast(device.type, dtype, enabled=args.amp):
                out = reg.compute(model, x) if unlabeled_batches is None else None  # CGC - within the step's own pass
                logits = out.logits if out else model(x)  # CGC, was: logits = model(x)
                loss = F.cross_entropy(logits, y)
                sums["train_cross_entropy"] += loss.detach()
                cgc = out.loss if out else reg(model, next(unlabeled_batches)[0])  # CGC - needs no labels
                sums["train_cgc"] += cgc.detach()  # CGC
                grown = (epoch - 1 + step / steps) / args.lam_warmup_epochs if args.lam_warmup_epochs else 1.0  # CGC
                loss = loss + args.lam * min(1.0, grown) * cgc  # CGC
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if step % 10 == 0 and not bar.disable:  # reading a value makes a GPU wait
                bar.set_postfix({name: f"{float(total) / (step + 1):.3f}" for name, total in sums.items()})

        row = {name: float(total) / steps for name, total in sums.items()}
        row |= validate(model, validation, args, measure)  # CGC, was: row |= validate(model, validation, args)
        history.append({"epoch": epoch} | row | {"seconds": time.perf_counter() - began})
        print(f"epoch {epoch}/{args.epochs}  " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
        content = {"arch": args.arch, "image_size": args.image_size, "classes": images.classes, "history": history}
        content["layer"] = layer  # CGC
        states = {name: part.state_dict() for name, part in parts.items()}
        save(args.out, content | states | {"settings": settings(args, images)})

    places = torch.linspace(0, len(validation) - 1, min(6, len(validation))).long().tolist()  # CGC
    x = torch.stack([validation[i][0] for i in places]).to(device)  # CGC
    with torch.no_grad():  # CGC
        out = measure.compute(model.eval(), x)  # CGC
    gallery(pair_columns(x, out, mean=MEAN, std=STD)).savefig(args.out / "heatmaps.png", dpi=120)  # CGC
    print(f"Checkpoint, metrics.csv and pictures: {args.out}")
    return model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        train(args)
    except (InputError, ImageError) as error:  # CGC, was: except InputError as error:
        # One from a loader's worker comes after its traceback.
        raise SystemExit(f"error: {str(error).strip().rpartition('Error: ')[2]}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted: {args.out} keeps all finished epochs; continue with --resume.") from None


if __name__ == "__main__":
    main()
