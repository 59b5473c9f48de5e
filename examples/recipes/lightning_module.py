"""Lightning: CGC in `training_step`, its numbers in TensorBoard and CSV, and as a measure in validation.

python examples/recipes/lightning_module.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from cgc_reg import CGCRegularizer  # CGC


class Classifier(lightning.LightningModule):
    """A classifier with CGC."""

    def __init__(self, lam: float = 0.5, lr: float = 0.05) -> None:
        super().__init__()
        self.model = resnet18(num_classes=10)
        self.lam, self.lr = lam, lr
        self.reg = CGCRegularizer("layer4")  # CGC

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.reg.compute(self.model, x)  # CGC: in place of self.model(x)
        loss = F.cross_entropy(out.logits, y)
        self.log("train/cross_entropy", loss)
        self.log_dict({f"train/cgc_{name}": value for name, value in out.scalars.items()})  # CGC
        loss = loss + self.lam * out.loss  # CGC
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        out = self.reg.compute(self.model, x)  # CGC: a measure here, also in Lightning's inference mode
        self.log("val/top1", (out.logits.argmax(dim=1) == y).float().mean())
        self.log_dict({f"val/cgc_{name}": value for name, value in out.scalars.items()})  # CGC

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def main(argv: list[str] | None = None) -> Classifier:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    args = parser.parse_args(argv)

    data = FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor())
    # CGC compares the images of a batch: a last one with a single image has nothing to compare.
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(data, args.batch_size, drop_last=True)
    classifier = Classifier(args.lam)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        logger=[TensorBoardLogger(args.out, name="tensorboard"), CSVLogger(args.out, name="csv")],
        log_every_n_steps=1,
        default_root_dir=args.out,
    )
    trainer.fit(classifier, loader, validation)
    return classifier


if __name__ == "__main__":
    main()
