"""Hugging Face Accelerate: CGC in a loop that also runs in mixed precision and in several processes.

python examples/recipes/accelerate_loop.py
torchrun --nproc_per_node 2 examples/recipes/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor
from tqdm import tqdm

from cgc_reg import CGCRegularizer  # CGC


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="in each process")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    args = parser.parse_args(argv)

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, cpu=args.cpu, log_with="tensorboard", project_dir=args.out
    )
    accelerator.init_trackers("cgc", {"lam": args.lam, "epochs": args.epochs})
    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor())
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    several = accelerator.num_processes > 1
    reg = CGCRegularizer("layer4", gather_distributed=several)  # CGC: against the images of all processes

    step = 0
    for epoch in range(args.epochs):
        for x, y in tqdm(loader, f"epoch {epoch + 1}", disable=not accelerator.is_local_main_process):
            with accelerator.autocast():
                out = reg.compute(model, x)  # CGC: in place of model(x); the model as `prepare` returned it
                loss = F.cross_entropy(out.logits, y)
                loss = loss + args.lam * out.loss  # CGC
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({f"cgc/{name}": float(value) for name, value in out.scalars.items()}, step)  # CGC
            step += 1
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
