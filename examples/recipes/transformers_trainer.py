"""Hugging Face Trainer: CGC in `compute_loss`, for an image-classification model made from a config.

python examples/recipes/transformers_trainer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from cgc_reg import CGCRegularizer  # CGC


class CGCTrainer(Trainer):
    """A Trainer with CGC."""

    def __init__(self, *args: Any, lam: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lam = lam
        # This loss is a mean over a batch, so that Trainer averages it over the batches of an accumulated step.
        self.model_accepts_loss_kwargs = False
        self.reg = CGCRegularizer("resnet.encoder.stages.3")  # CGC

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        out = self.reg.compute(model, inputs["pixel_values"])  # CGC: in place of model(**inputs)
        loss = F.cross_entropy(out.logits, inputs["labels"])
        if model.training and self.state.global_step % self.args.logging_steps == 0:  # CGC
            self.log({f"cgc_{name}": float(value) for name, value in out.scalars.items()})  # CGC
        loss = loss + self.lam * out.loss  # CGC
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss


class Named(Dataset[dict[str, Any]]):
    """The items of a data set under the names that the model's forward has for them."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": torch.as_tensor(label)}


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    args = parser.parse_args(argv)

    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic", num_labels=10
    )
    data = Named(FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor()))
    training = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        dataloader_drop_last=True,  # CGC compares the images of a batch, and a last one may hold a single image
        eval_strategy="epoch",
        logging_steps=4,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="tensorboard",
    )
    model = ResNetForImageClassification(config)
    trainer = CGCTrainer(model, training, train_dataset=data, eval_dataset=data, lam=args.lam)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
