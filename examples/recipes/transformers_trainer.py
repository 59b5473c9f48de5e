"""CGC in the Hugging Face Trainer, with an image classifier from a configuration.

    python examples/recipes/transformers_trainer.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from cgc_reg import CGCRegularizer, GradCAM  # CGC


class ToyImages(Dataset):
    """Pictures of one bright square, anywhere on noise; its colour is the class."""

    def __init__(self, count: int) -> None:
        self.x, self.y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
        for image, label, (top, left) in zip(self.x, self.y, torch.randint(48, (count, 2)).tolist(), strict=True):
            image[label, top : top + 16, left : left + 16] += 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.x[index], "labels": self.y[index]}


class CGCTrainer(Trainer):  # CGC
    """Adds CGC to the cross-entropy of training, and its scalars to the logs."""  # CGC

    def __init__(self, *args, reg, lam=0.5, **kwargs):  # CGC
        super().__init__(*args, **kwargs)  # CGC
        self.reg, self.lam, self.scalars = reg, lam, []  # CGC
        self.model_accepts_loss_kwargs = False  # CGC - the loss is a mean: the Trainer divides it by the accumulation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # CGC
        if not model.training or len(inputs["pixel_values"]) < 2:  # CGC - the model's own, also for a single image
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # CGC
        out = self.reg.compute(model, inputs["pixel_values"])  # CGC - in place of model(**inputs), in two passes
        smoothing = self.args.label_smoothing_factor  # CGC
        loss = F.cross_entropy(out.logits, inputs["labels"], label_smoothing=smoothing)  # CGC
        loss = loss + self.lam * out.loss  # CGC
        self.scalars.append(out.scalars)  # CGC
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss  # CGC

    def log(self, logs, start_time=None):  # CGC
        if "loss" in logs and self.scalars:  # CGC - a log of training: means over the steps since the last one
            for name in self.scalars[0]:  # CGC
                logs[f"cgc_{name}"] = torch.stack([step[name] for step in self.scalars]).mean().item()  # CGC
            self.scalars.clear()  # CGC
        super().log(logs, start_time)  # CGC


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def main(
    out: Path = Path("runs/recipes/transformers"),
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    accumulate: int = 1,
    lam: float = 0.5,  # CGC
) -> Trainer:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    config.num_labels = 3
    model = ResNetForImageClassification(config)
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="tensorboard",
    )
    # The output of an image classifier has `logits`, which CGC finds itself; it is said here for models that differ.
    reg = CGCRegularizer(GradCAM("resnet.encoder.stages.1", output_fn=lambda output: output.logits))  # CGC
    trainer = CGCTrainer(  # CGC, was: trainer = Trainer(
        model,
        args,
        train_dataset=ToyImages(images),
        eval_dataset=ToyImages(images // 2),
        compute_metrics=accuracy,
        reg=reg,  # CGC
        lam=lam,  # CGC
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    set_seed(0)
    main()
