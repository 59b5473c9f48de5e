"""CGC in a fastai Learner, by a callback that adds its loss.

    python examples/recipes/fastai_learner.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

from contextlib import ExitStack  # CGC
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.vision.all import (
    Callback,  # CGC
    CSVLogger,
    DataLoaders,
    Learner,
    TensorCategory,
    TensorImage,
    accuracy,
)
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer  # CGC


def toy_images(count: int) -> list[tuple[TensorImage, TensorCategory]]:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return [(TensorImage(image), TensorCategory(label)) for image, label in zip(x, y, strict=True)]


class CGC(Callback):  # CGC
    """Add lam times the CGC loss in training; a step costs two passes, with the Learner's own."""  # CGC

    def __init__(self, reg: CGCRegularizer, lam: float) -> None:  # CGC
        self.reg, self.lam, self.step = reg, lam, ExitStack()  # CGC

    def before_batch(self) -> None:  # CGC
        if self.training:  # CGC
            self.step.enter_context(self.reg.reuse(self.model))  # CGC

    def after_loss(self) -> None:  # CGC
        if self.training:  # CGC
            with self.step:  # CGC
                self.learn.loss_grad = self.loss_grad + self.lam * self.reg(self.model, self.x)  # CGC
                self.learn.loss = self.loss_grad.detach()  # CGC


def main(
    images: int = 512,
    epochs: int = 4,
    batch_size: int = 16,
    lam: float = 0.5,  # CGC
    out: Path = Path("runs/fastai"),
) -> torch.nn.Module:
    dls = DataLoaders.from_dsets(
        toy_images(images), toy_images(images // 2), bs=batch_size, shuffle=True, drop_last=True, num_workers=0
    )
    learner = Learner(
        dls,
        resnet18(num_classes=3),
        loss_func=F.cross_entropy,
        metrics=accuracy,
        path=out,
        cbs=[
            CSVLogger("metrics.csv"),
            CGC(CGCRegularizer("layer4"), lam),  # CGC
        ],
    )
    learner.fit_one_cycle(epochs, 3e-3)
    return learner.model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
