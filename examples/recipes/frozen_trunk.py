"""Fine-tuning with a frozen trunk: CGC trains what is left to train, and leaves the rest as it is.

python examples/recipes/frozen_trunk.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor
from tqdm import tqdm

from cgc_reg import CGCRegularizer  # CGC

FROZEN = ("conv1", "bn1", "layer1", "layer2", "layer3")


def freeze(model: nn.Module) -> None:
    """Keep the first layers as they are: their weights, and BatchNorm's running statistics."""
    for name in FROZEN:
        model.get_submodule(name).requires_grad_(False).eval()


def main(argv: list[str] | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    data = FakeData(args.images, (3, args.image_size, args.image_size), num_classes=10, transform=ToTensor())
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    model = resnet18(num_classes=10).to(args.device)  # with weights="DEFAULT" and a new `fc` in a real fine-tuning
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    reg = CGCRegularizer("layer4")  # CGC: a layer that is trained

    for epoch in range(args.epochs):
        freeze(model.train())  # `train` switches the trunk's BatchNorm too
        bar = tqdm(loader, f"epoch {epoch + 1}")
        for x, y in bar:
            x, y = x.to(args.device), y.to(args.device)
            out = reg.compute(model, x)  # CGC: in place of model(x)
            loss = F.cross_entropy(out.logits, y)
            loss = loss + args.lam * out.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in out.scalars.items()})  # CGC
    changed = {name.partition(".")[0] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    print(f"changed: {', '.join(sorted(changed))}; as before: {', '.join(FROZEN)}")
    return model, before


if __name__ == "__main__":
    main()
