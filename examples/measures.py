"""What a training measures beside its heatmaps, over an epoch and over all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import processes


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
