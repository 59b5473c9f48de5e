"""CGC in a LightningModule, logged to TensorBoard and to a CSV file.

    python examples/recipes/lightning_module.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


class Classifier(lightning.LightningModule):
    """A ResNet-18, its losses and its measures."""

    def __init__(
        self,
        lam: float = 0.5,  # CGC
    ) -> None:
        super().__init__()
        self.model = resnet18(num_classes=3)
        self.reg = CGCRegularizer("layer4")  # CGC
        self.lam = lam  # CGC

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.reg.compute(self.model, x)  # CGC
        logits = out.logits  # CGC, was: logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.log("train/cross_entropy", loss)
        loss = loss + self.lam * out.loss  # CGC
        self.log_dict({f"train/cgc_{name}": value for name, value in out.scalars.items()})  # CGC
        return loss

    def validation_step(self, batch, batch_idx):  # CGC works under no_grad, as in `fit`, and in inference mode
        x, y = batch
        out = self.reg.compute(self.model, x)  # CGC
        logits = out.logits  # CGC, was: logits = self.model(x)
        self.log("val/cross_entropy", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val/accuracy", (logits.argmax(dim=1) == y).float().mean(), prog_bar=True)
        self.log_dict({f"val/cgc_{name}": value for name, value in out.scalars.items()})  # CGC

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(
    out: Path = Path("runs/recipes/lightning"),
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
) -> Classifier:
    train = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    classifier = Classifier(lam)  # CGC, was: classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=[TensorBoardLogger(out, name="tensorboard"), CSVLogger(out, name="csv")],
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    trainer.fit(classifier, train, validation)
    trainer.validate(classifier, validation)  # in inference mode
    return classifier


if __name__ == "__main__":
    lightning.seed_everything(0)
    main()
