"""CGC on images without labels, beside cross-entropy on the few that have them, logged to a CSV file.

    python examples/recipes/semi_supervised.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


def repeat(loader: DataLoader) -> Iterator:
    """Go through a loader again and again, shuffled anew each time."""
    while True:
        yield from loader


def main(
    out: Path = Path("runs/recipes/semi_supervised"),
    labelled_images: int = 64,
    unlabelled_images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    lam: float = 0.25,  # CGC
) -> torch.nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labelled = DataLoader(toy_images(labelled_images), batch_size, shuffle=True, drop_last=True)
    unlabelled = DataLoader(toy_images(unlabelled_images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(unlabelled_images // 2), batch_size)
    model = resnet18(num_classes=3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reg = CGCRegularizer("layer4")  # CGC

    rows = []
    for epoch in range(epochs):  # one epoch goes once over the images without labels
        model.train()
        for (x, y), (u, _) in zip(repeat(labelled), unlabelled, strict=False):
            x, y, u = x.to(device), y.to(device), u.to(device)
            loss = F.cross_entropy(model(x), y)
            row = {"step": len(rows), "cross_entropy": loss.item()}
            output = reg.compute(model, u)  # CGC - for the class that the model predicts
            loss = loss + lam * output.loss  # CGC
            row |= {f"cgc_{name}": value.item() for name, value in output.scalars.items()}  # CGC
            rows.append(row)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        right = 0
        with torch.inference_mode():
            for x, y in validation:
                right += (model(x.to(device)).argmax(dim=1).cpu() == y).sum().item()
        print(f"epoch {epoch}: validation accuracy {right / len(validation.dataset):.3f}")

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
