"""CGC while fine-tuning the last stage of a network whose trunk is frozen, its BatchNorm included.

    python examples/recipes/frozen_trunk.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer  # CGC

TRAINED = ("layer4", "fc")  # what is fine-tuned; all else is the trunk


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


def train_mode(model: torch.nn.Module) -> None:
    """Bring the model into training mode, all but the trunk: its BatchNorm keeps to the statistics it came with."""
    model.train()
    for name, module in model.named_children():
        if name not in TRAINED:
            module.eval()


def main(
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    weights: str | None = None,  # "DEFAULT" downloads those that were trained on ImageNet
    lam: float = 0.5,  # CGC
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    model = resnet18(weights=weights)
    model.fc = torch.nn.Linear(model.fc.in_features, 3)
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    reg = CGCRegularizer("layer4")  # CGC

    for epoch in range(epochs):
        train_mode(model)
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            out = reg.compute(model, x)  # CGC - builds no graph in the trunk, and leaves its mode alone
            logits = out.logits  # CGC, was: logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss = loss + lam * out.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        right = 0
        with torch.inference_mode():
            for x, y in validation:
                right += (model(x.to(device)).argmax(dim=1).cpu() == y).sum().item()
        print(f"epoch {epoch}: validation accuracy {right / len(validation.dataset):.3f}")
        print(f"    margin of the heatmaps {out.scalars['margin'].item():.3f}")  # CGC

    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])}
    print("changed:", ", ".join(sorted(changed)))
    return model, before


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
