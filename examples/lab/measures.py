"""What is measured of a model, over an epoch and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgc_reg import (
    CGCRegularizer,
    Consistency,
    Explainer,
    TransformSampler,
    content_heatmap,
    object_coverage,
    pointing_game,
)
from lab import processes

TOLERANCE = 15 / 224  # of the pointing game, as a share of the image's side


@torch.no_grad()
def measure_model(
    model: nn.Module,
    explainer: Explainer | str,
    batches: Iterable[Any],
    *,
    classes: int,
    group: int,
    device: str,
    transform: TransformSampler | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Measure accuracy and heatmaps; with one order of images the views are the same each time.

    Args:
        model: in evaluation mode afterwards.
        explainer: of the heatmaps; a layer's name is short for its Grad-CAM.
        batches: images, classes and, where they are known, masks of the objects.
        classes: their number.
        group: the contrastive loss depends on the number of negatives; it is taken over groups of this size.
        device: of the model.
        transform: draws the views; that of CGC's defaults if None.
        autocast: makes the precision to run in.
    """
    model.eval()
    generator = torch.Generator().manual_seed(processes.rank())
    # For the pairs alone: a loss without negatives takes a last batch of one image too.
    reg = CGCRegularizer(explainer, transform=transform, loss="mse_consistency", generator=generator)
    total, recall, pairs = Mean(), Recall(classes, device), Consistency(batch_size=group)
    for x, y, *mask in batches:
        x, y = x.to(device), y.to(device)
        with autocast():
            out = reg.compute(model, x)
        pairs.update(out.query, out.key)
        total.add(
            len(x),
            cross_entropy=F.cross_entropy(out.logits.float(), y),
            top1=accuracy(out.logits, y, 1),
            top5=accuracy(out.logits, y, 5),
        )
        recall.add(out.logits, y)
        if mask:
            add_on_object(total, out.heatmap, mask[0].to(device))
    found = pairs.compute()
    measured = {
        "cgc": found["loss"],
        "similarity": found["positive_similarity"],
        "margin": found["margin"],
        "blank_share": found["blank_share"],
        **total.over_processes().averages(),
        "balanced_accuracy": recall.over_processes().mean(),
    }
    return {name: round(value, 6) for name, value in measured.items()}


def add_on_object(total: Mean, heatmaps: Tensor, masks: Tensor) -> None:
    """Add how far a batch's heatmaps lie on the objects."""
    on_object = content_heatmap(heatmaps, masks)
    hits = pointing_game(heatmaps, masks, tolerance=TOLERANCE * masks.shape[-1])
    total.add(
        int((~on_object.isnan()).sum()),
        content_heatmap=on_object.nanmean(),
        object_coverage=object_coverage(heatmaps, masks).nanmean(),
        pointing_game=hits.nanmean(),
    )
    total.add(len(heatmaps), mostly_off_object=(~(on_object >= 0.5)).float().mean())


def accuracy(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """Share of images whose class is among the k highest scores."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == y[:, None]).any(dim=1).float().mean()


class Mean:
    """Averages of several values, each over the images it was measured on, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, count: int, **values: Tensor) -> None:
        for name, value in values.items():
            if count:
                self.sums[name] = self.sums.get(name, 0) + value.detach() * count
                self.counts[name] = self.counts.get(name, 0) + count

    def over_processes(self) -> Mean:
        """Take in what the other processes measured."""
        self.sums, self.counts = processes.total(self.sums), processes.total(self.counts)
        return self

    def averages(self) -> dict[str, float]:
        return {name: round(float(total) / self.counts[name], 6) for name, total in self.sums.items()}


class Recall:
    """Of the images of each class, the share that is given that class."""

    def __init__(self, classes: int, device: str) -> None:
        self.hits = torch.zeros(classes, dtype=torch.long, device=device)
        self.counts = torch.zeros_like(self.hits)

    def add(self, logits: Tensor, y: Tensor) -> None:
        of_class = F.one_hot(y, len(self.counts))
        self.counts += of_class.sum(dim=0)
        self.hits += (of_class * (logits.argmax(dim=1) == y)[:, None]).sum(dim=0)

    def over_processes(self) -> Recall:
        """Take in what the other processes measured."""
        self.hits, self.counts = (processes.total_tensor(values) for values in (self.hits, self.counts))
        return self

    def mean(self) -> float:
        """Return the balanced accuracy: the mean over the classes that there were images of."""
        there = self.counts > 0
        return round(float((self.hits[there] / self.counts[there]).mean()), 6)
