"""One epoch of a training, and its validation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from cgc_reg import CGCRegularizer, energy_loss
from lab import processes
from lab.image_data import Data
from lab.loaders import cycle_batches, epoch_seed, make_loader, seed_everything
from lab.measures import Mean, accuracy, measure_model
from lab.run import Run


def train_epoch(
    args: argparse.Namespace, run: Run, labeled: Any, unlabeled: Any, lam: float, epoch: int, steps: int
) -> dict[str, float]:
    """Take the optimizer through one epoch."""
    # All randomness of an epoch follows from the seed, its number and the process, so a resumed run repeats it.
    seed_everything(epoch_seed(args, epoch))
    # Wrapped anew for that too: after its first step DistributedDataParallel adds gradients up in another order.
    model = processes.parallel(run.model.train())
    run.regularizer.generator.manual_seed(epoch_seed(args, epoch))
    batches = cycle_batches(make_loader(args, labeled, epoch, shuffle=True))
    others = cycle_batches(make_loader(args, unlabeled, epoch, shuffle=True)) if unlabeled is not None else None
    total = Mean()
    bar = progress_bar(range(steps), f"epoch {epoch}/{args.epochs}")
    for step in bar:
        regularized = lam > 0 and step % args.cgc_every == 0
        batch = next(batches)
        x, y, *mask = (tensor.to(args.device, non_blocking=True) for tensor in batch)
        with autocast(args):
            target = y if args.guided_class == "label" else None
            seen = passes(args, run.regularizer, model, x, target, others, regularized)
            cross_entropy = F.cross_entropy(seen.logits, y)
            loss = cross_entropy + weight_at(args, lam, epoch - 1 + step / steps) * seen.cgc
            if args.cross_entropy_views == 2:
                loss = loss + F.cross_entropy(seen.view_logits, y)
            if seen.heatmap is not None:
                energy = energy_loss(seen.heatmap, mask[0])  # most masks are zeros, and count for nothing
                loss = loss + args.guidance * energy
                total.add(int(batch[2].flatten(1).any(dim=1).sum()), energy=energy)
        update(run, loss)
        logits = seen.logits
        total.add(len(x), cross_entropy=cross_entropy, top1=accuracy(logits, y, 1), top5=accuracy(logits, y, 5))
        if regularized:
            total.add(len(x), cgc=seen.cgc)
        if step % 10 == 0 and not bar.disable:  # reading the averages makes a GPU wait
            bar.set_postfix({name: f"{value:.3f}" for name, value in total.averages().items()})
        if args.say_steps:
            print(f"step {(epoch - 1) * steps + step + 1}/{args.epochs * steps}")
    return {f"train_{name}": value for name, value in total.over_processes().averages().items()}


class Seen(NamedTuple):
    """What the passes of a step showed."""

    logits: Tensor
    view_logits: Tensor
    cgc: Tensor  # its loss, on the other images where there are any
    heatmap: Tensor | None  # of x, where guidance asks for it


def passes(
    args: argparse.Namespace,
    reg: CGCRegularizer,
    model: nn.Module,
    x: Tensor,
    target: Tensor | None,
    others: Iterator[Any] | None,
    regularized: bool,
) -> Seen:
    """Run the model on x, on its views and on the other images, as far as the step needs them."""
    if regularized and others is None:
        # The two lines of CGC: one call in place of model(x), and its loss beside the cross-entropy.
        out = reg.compute(model, x, target)
        return Seen(out.logits, out.view_logits, out.loss, out.heatmap if args.guidance else None)
    explained = reg.explainer(model, x, target) if args.guidance else None  # in place of model(x), too
    logits, cgc = model(x) if explained is None else explained.logits, x.new_zeros(())
    # The baseline sees both views too.
    view_logits = model(draw_view(reg, x, reg.view_size)) if args.cross_entropy_views == 2 else logits
    if regularized and others is not None:
        u, *_ = next(others)
        cgc = reg(model, u.to(args.device, non_blocking=True))
    return Seen(logits, view_logits, cgc, None if explained is None else explained.heatmap)


def draw_view(reg: CGCRegularizer, x: Tensor, view_size: tuple[int, int] | None = None) -> Tensor:
    """Draw T as the regularizer does and return T(x)."""
    size = (x.shape[2], x.shape[3])
    return reg.transform.sample(len(x), size, device=x.device, generator=reg.generator)(x, view_size)


def weight_at(args: argparse.Namespace, lam: float, epochs: float) -> float:
    """Return CGC's weight after so many epochs."""
    return lam if epochs >= args.lam_warmup_epochs else lam * epochs / args.lam_warmup_epochs


def update(run: Run, loss: Tensor) -> None:
    """Take one step of the optimizer."""
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()


def validate(args: argparse.Namespace, run: Run, data: Data) -> dict[str, float]:
    """Measure accuracy and heatmaps on the validation images; the views are the same in every epoch."""
    # Each image in one process; a DistributedSampler would make the shares equal by taking some twice.
    share = Subset(data.validation, range(processes.rank(), len(data.validation), processes.count()))
    loader = make_loader(args, share, epoch=0, shuffle=False)
    measured = measure_model(
        run.model,
        run.layer,
        progress_bar(loader, "validation"),
        classes=len(data.classes),
        group=max(2, min(args.batch_size, len(data.validation) // processes.count())),  # which every process can fill
        device=args.device,
        autocast=lambda: autocast(args),
    )
    return {f"val_{name}": value for name, value in measured.items()}


def autocast(args: argparse.Namespace) -> Any:
    """Mixed precision where it is asked for."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16) if args.amp else nullcontext()


def progress_bar(steps: Any, title: str) -> Any:
    """Show how far the writer is, in a terminal."""
    return tqdm(steps, title, leave=False, mininterval=0.5, disable=None if processes.is_writer() else True)
