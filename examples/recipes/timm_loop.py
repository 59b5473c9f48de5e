"""timm: CGC in a loop with mixed precision, gradient clipping and a moving average of the weights (EMA).

python examples/recipes/timm_loop.py --model resnet18
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor
from tqdm import tqdm

from cgc_reg import CGCRegularizer, suggest_target_layer  # CGC


def main(argv: list[str] | None = None) -> tuple[nn.Module, ModelEmaV3]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    data = FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor())
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    model = timm.create_model(args.model, num_classes=10).to(args.device)
    ema = ModelEmaV3(model, decay=0.99)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
    dtype = torch.float16 if args.device.startswith("cuda") else torch.bfloat16
    scaler = NativeScaler(device=args.device) if dtype is torch.float16 else None
    layer = suggest_target_layer(model, torch.zeros(1, 3, args.image_size, args.image_size, device=args.device))  # CGC
    reg = CGCRegularizer(layer)  # CGC

    updates = 0
    for epoch in range(args.epochs):
        model.train()
        bar = tqdm(loader, f"epoch {epoch + 1}")
        for x, y in bar:
            x, y = x.to(args.device), y.to(args.device)
            with torch.autocast(args.device, dtype):
                out = reg.compute(model, x)  # CGC: in place of model(x)
                loss = F.cross_entropy(out.logits, y)
                loss = loss + args.lam * out.loss  # CGC
            optimizer.zero_grad()
            if scaler is not None:
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
            updates += 1
            ema.update(model, step=updates)
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in out.scalars.items()})  # CGC
        scheduler.step(epoch + 1)
    return model, ema


if __name__ == "__main__":
    main()
