"""Batches whose order follows from the seed, the epoch and the process, so that a resumed run repeats them."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lab import processes


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
