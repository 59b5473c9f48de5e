"""Volumes, as of CT: CGC for consistent heatmaps in three dimensions, and guidance by the masks of the lesions.

    python examples/recipes/volumes.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cgc_reg import CGCRegularizer, RandomAffine, content_heatmap, energy_loss, explain  # CGC

SIZE = (16, 32, 32)  # slices, rows and columns: the slices are thick
SPACING = (2.0, 1.0, 1.0)  # millimetres along each
T = RandomAffine(20, scale=(0.9, 1.2), spacing=SPACING)  # CGC - turns in space


def toy_data(count: int) -> TensorDataset:
    """Make volumes of noise with one lesion: a ball, which is class 0, or a shell, which is class 1."""
    y = torch.arange(count) % 2
    axes = [unit * torch.arange(n) for unit, n in zip(SPACING, SIZE, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    centres = 8 + torch.rand(count, 3) * torch.tensor([a[-1].item() - 16 for a in axes])
    distance = (places - centres[:, :, None, None, None]).norm(dim=1)
    ball, shell = distance < 5, (distance > 4) & (distance < 6.5)
    masks = torch.where(y[:, None, None, None] == 0, ball, shell)
    x = torch.rand(count, 1, *SIZE) + masks[:, None]
    return TensorDataset(x, y, masks)


def small_net() -> nn.Sequential:
    """Return three convolutions to a grid of 8 x 8 x 8, global average pooling and a linear head."""
    layers: list[nn.Module] = []
    for before, channels, stride in ((1, 16, (1, 2, 2)), (16, 32, 2), (32, 64, 1)):
        convolution = nn.Conv3d(before, channels, 3, stride=stride, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm3d(channels), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 2))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: torch.device) -> float:
    right = [model(x.to(device)).argmax(dim=1).eq(y.to(device)) for x, y, _ in loader]
    return torch.cat(right).float().mean().item()


def main(
    images: int = 512,
    epochs: int = 6,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
    mu: float = 0.5,  # CGC - of the guidance
) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_data(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_data(images // 2), batch_size)
    model = small_net().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    generator = torch.Generator(device).manual_seed(0)  # CGC
    reg = CGCRegularizer("2", transform=T, weighting="confidence", generator=generator)  # CGC

    for epoch in range(epochs):
        model.train()
        for x, y, masks in loader:
            x, y, masks = x.to(device), y.to(device), masks.to(device)
            output = reg.compute(model, x)  # CGC, was: logits = model(x)
            logits = output.logits  # CGC
            loss = F.cross_entropy(logits, y)
            loss = loss + lam * output.loss + mu * energy_loss(output.heatmap, masks)  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        model.eval()
        print(f"epoch {epoch}: accuracy {accuracy(model, validation, device):.3f}")
        shares = [  # CGC
            content_heatmap(explain(model, x.to(device), "2", y.to(device)), masks.to(device))  # CGC
            for x, y, masks in validation  # CGC
        ]  # CGC
        print(f"         share of a heatmap on its lesion {torch.cat(shares).nanmean().item():.3f}")  # CGC
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
