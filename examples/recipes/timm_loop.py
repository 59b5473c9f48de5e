"""CGC in a loop in timm's style: a timm model, mixed precision, and an average of the weights (EMA).

    python examples/recipes/timm_loop.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, dispatch_clip_grad, random_seed
from torch.utils.data import DataLoader, TensorDataset

from cgc_reg import CGCRegularizer  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


@torch.inference_mode()
def validate(model, loader, device, autocast) -> float:
    model.eval()
    top1 = AverageMeter()
    for x, y in loader:
        with autocast():
            logits = model(x.to(device))
        top1.update(accuracy(logits, y.to(device))[0].item(), len(x))
    return top1.avg


def main(
    images: int = 512,
    epochs: int = 4,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
) -> tuple[torch.nn.Module, ModelEmaV3]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    autocast = partial(torch.autocast, device.type, dtype)
    scaler = NativeScaler(device.type) if dtype == torch.float16 else None
    model = timm.create_model("resnet10t", num_classes=3).to(device)
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs)
    cross_entropy = LabelSmoothingCrossEntropy(0.1)
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    reg = CGCRegularizer("layer4")  # CGC

    updates = 0
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        margins = AverageMeter()  # CGC
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            with autocast():
                out = reg.compute(model, x)  # CGC - computes heatmaps and its loss in float32
                logits = out.logits  # CGC, was: logits = model(x)
                loss = cross_entropy(logits, y)
                loss = loss + lam * out.loss  # CGC
            optimizer.zero_grad()
            if scaler is not None:
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), 1.0)
                optimizer.step()
            updates += 1
            ema.update(model, step=updates)  # the model itself: CGC leaves no hook and no buffer in it
            losses.update(loss.item(), len(x))
            margins.update(out.scalars["margin"].item(), len(x))  # CGC
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {losses.avg:.3f}")
        print(f"    own heatmap pairs are more alike than others by {margins.avg:.3f}")  # CGC
        for name, module in (("model", model), ("average", ema.module)):
            print(f"    validation top-1 of the {name}: {validate(module, validation, device, autocast):.1f}")
    return model, ema


if __name__ == "__main__":
    random_seed(0)
    main()
