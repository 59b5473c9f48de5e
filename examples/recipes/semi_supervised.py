"""Semi-supervised: cross-entropy on few labelled images, CGC on many without labels; the numbers go to a CSV file.

python examples/recipes/semi_supervised.py
"""

from __future__ import annotations

import argparse
import csv
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor
from tqdm import tqdm

from cgc_reg import CGCRegularizer  # CGC


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--labeled-fraction", type=float, default=0.125)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.25, help="the paper's, with unlabelled images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/semi_supervised"))
    args = parser.parse_args(argv)

    data = FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor())
    labeled, unlabeled = random_split(data, [args.labeled_fraction, 1 - args.labeled_fraction])
    labeled_loader = DataLoader(labeled, args.batch_size, shuffle=True, drop_last=len(labeled) >= args.batch_size)
    unlabeled_loader = DataLoader(unlabeled, args.batch_size, shuffle=True, drop_last=True)
    model = resnet18(num_classes=10).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reg = CGCRegularizer("layer4")  # CGC

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "steps.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["cross_entropy", "loss", "positive_similarity", "negative_similarity", "margin", "blank_share"])
        for epoch in range(args.epochs):
            # One epoch goes once over the larger set; the smaller one is repeated.
            batches = zip(cycle(labeled_loader), unlabeled_loader, strict=False)
            for (x, y), (u, _) in tqdm(batches, f"epoch {epoch + 1}", total=len(unlabeled_loader)):
                cross_entropy = F.cross_entropy(model(x.to(args.device)), y.to(args.device))
                out = reg.compute(model, u.to(args.device))  # CGC: BatchNorm follows these images too
                loss = cross_entropy + args.lam * out.loss  # CGC
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                log.writerow([float(value.detach()) for value in (cross_entropy, *out.scalars.values())])  # CGC
    return model


if __name__ == "__main__":
    main()
