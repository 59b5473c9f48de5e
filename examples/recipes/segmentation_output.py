"""Segmentation: a model whose output is a dictionary of maps, brought to class scores by `output_fn`.

The loss per pixel needs the model's own output, so the loop runs the model itself, and `reuse` saves the second pass.

    python examples/recipes/segmentation_output.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from tqdm import tqdm

from cgc_reg import CGCRegularizer  # CGC


def scores(output: dict[str, Tensor]) -> Tensor:  # CGC
    """Average a class's map over the pixels: (n, k), whose largest is the class that fills the image most."""  # CGC
    return output["out"].mean(dim=(2, 3))  # CGC


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    images = torch.rand(args.images, 3, args.image_size, args.image_size)
    masks = torch.randint(5, (args.images, args.image_size, args.image_size))
    loader = DataLoader(TensorDataset(images, masks), args.batch_size, shuffle=True, drop_last=True)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Behind the last BatchNorm, which would mix the images of a batch.
    reg = CGCRegularizer("classifier.cbr", output_fn=scores)  # CGC

    for epoch in range(args.epochs):
        bar = tqdm(loader, f"epoch {epoch + 1}")
        for x, y in bar:
            x, y = x.to(args.device), y.to(args.device)
            with reg.reuse(model):  # CGC
                output = model(x)
                cgc = reg(model, x)  # CGC
            loss = F.cross_entropy(output["out"], y)
            loss = loss + args.lam * cgc  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(cgc=f"{float(cgc.detach()):.3f}")  # CGC
    return model


if __name__ == "__main__":
    main()
