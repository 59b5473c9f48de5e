"""CGC in a Hugging Face Accelerate loop, with gradient accumulation and a TensorBoard tracker.

    python examples/recipes/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/recipes/accelerate_loop.py    # on CPUs: with ACCELERATE_USE_CPU=true

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


def main(
    out: Path = Path("runs/recipes/accelerate"),
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    mixed_precision: str = "no",
    lam: float = 0.5,  # CGC
) -> torch.nn.Module:
    accelerator = Accelerator(
        gradient_accumulation_steps=2, mixed_precision=mixed_precision, log_with="tensorboard", project_dir=out
    )
    accelerator.init_trackers("tensorboard")
    model = resnet18(num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    model, optimizer, loader, validation = accelerator.prepare(model, optimizer, loader, validation)
    reg = CGCRegularizer("layer4")  # CGC

    step = 0
    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                output = reg.compute(model, x)  # CGC - the prepared model, never the unwrapped one
                logits = output.logits  # CGC, was: logits = model(x)
                loss = F.cross_entropy(logits, y)
                scalars = {"train/cross_entropy": loss.detach()}
                loss = loss + lam * output.loss  # CGC
                scalars |= {f"train/cgc_{name}": value for name, value in output.scalars.items()}  # CGC
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.log(scalars, step=step)
            step += 1

        model.eval()
        right = []
        with torch.inference_mode():
            for x, y in validation:
                right.append(accelerator.gather_for_metrics(model(x).argmax(dim=1) == y))
        accuracy = torch.cat(right).float().mean().item()
        accelerator.log({"val/accuracy": accuracy}, step=step)
        accelerator.print(f"epoch {epoch}: validation accuracy {accuracy:.3f}")
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    set_seed(0)
    main()
