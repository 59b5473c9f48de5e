"""torchvision v2 transforms in the loader's workers, and CGC's views on the device.

The workers crop, colour and normalise as ever. T is drawn for each image on the device, of the images that come out.

    python examples/recipes/torchvision_v2_loader.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import v2
from tqdm import tqdm

from cgc_reg import CGCRegularizer, RandomResizedCropFlip  # CGC


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    augment = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(args.image_size, scale=(0.35, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    data = FakeData(args.images, (3, 2 * args.image_size, 2 * args.image_size), num_classes=10, transform=augment)
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    model = resnet18(num_classes=10).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Milder crops than the default, since the workers have cropped already.
    reg = CGCRegularizer("layer4", transform=RandomResizedCropFlip(scale=(0.3, 1.0)))  # CGC

    for epoch in range(args.epochs):
        bar = tqdm(loader, f"epoch {epoch + 1}")
        for x, y in bar:
            x, y = x.to(args.device, non_blocking=True), y.to(args.device, non_blocking=True)
            out = reg.compute(model, x)  # CGC: in place of model(x)
            loss = F.cross_entropy(out.logits, y)
            loss = loss + args.lam * out.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in out.scalars.items()})  # CGC
    return model


if __name__ == "__main__":
    main()
