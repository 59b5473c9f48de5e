"""What one training needs and changes, from the first step on or from a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cgc_reg import CGCRegularizer, RandomResizedCropFlip, explain, suggest_target_layer
from lab import processes
from lab.checkpoint import load_checkpoint
from lab.image_data import Data
from lab.loaders import seed_everything
from lab.losses import LOSSES
from lab.models import build_model
from lab.options import settings
from lab.rules import RULES


@dataclass
class Run:
    """One training; all of it but `regularizer` is in the checkpoint."""

    model: nn.Module
    layer: str  # of the heatmaps
    regularizer: CGCRegularizer
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]


def start(args: argparse.Namespace, data: Data, steps: int) -> Run:
    """Build everything as it is before the first of so many steps an epoch."""
    seed_everything(1000 * args.seed)
    try:
        model = build_model(args.arch, len(data.classes), pretrained=args.pretrained)
        model = model.to(args.device, memory_format=torch.channels_last)
        example = data.validation[0][0][None].to(args.device)
        layer = args.layer or suggest_target_layer(model, example)
        explain(model, example, layer)  # an unknown layer is an error now, not after the first epoch
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.momentum > 0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps + 1)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp and torch.device(args.device).type == "cuda")
    return Run(model, layer, make_regularizer(args, layer), optimizer, schedule, scaler, [])


def make_regularizer(args: argparse.Namespace, layer: str) -> CGCRegularizer:
    options: dict[str, Any] = {
        "loss": LOSSES[args.loss],
        "temperature": args.temperature,
        "transform": RandomResizedCropFlip(scale=(args.crop_scale, 1.0)),
        "view_size": args.view_size and (args.view_size, args.view_size),
        # As in the baseline, running statistics follow the images that cross-entropy is taken on.
        "bn_mode": "update" if args.cross_entropy_views == 2 and args.labeled_fraction == 1 else "preserve",
        "gather_distributed": args.gather,
        "generator": torch.Generator(args.device),
    }
    if args.official:
        return CGCRegularizer.official(layer, **options)
    size = args.heatmap_size and (args.heatmap_size, args.heatmap_size)
    explainer = RULES[args.heatmap](layer)
    return CGCRegularizer(explainer, heatmap_size=size, detach_key=args.detach_key, weighting=args.weighting, **options)


def state_of(args: argparse.Namespace, run: Run, data: Data, lam: float) -> dict[str, Any]:
    """Return all that a checkpoint holds."""
    return {
        "arch": args.arch,
        "classes": data.classes,
        "layer": run.layer,
        "image_size": args.image_size,
        "settings": settings(args, lam),
        "processes": processes.count(),
        "history": run.history,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
    }


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
