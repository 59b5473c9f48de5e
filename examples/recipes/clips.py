"""Clips: CGC for heatmaps in space and time, of a network that tells where something moves.

    python examples/recipes/clips.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cgc_reg import CGCRegularizer, RandomResizedCropFlip, content_heatmap, explain  # CGC

FRAMES, SIZE, SQUARE = 8, 32, 6  # of a clip; the sides of a frame and of a square, in pixels
T = RandomResizedCropFlip(scale=(0.5, 1.0), flip_p=0.0)  # CGC - cuts in space and time; a mirror shows another class


def squares(corners: Tensor) -> Tensor:
    """Mark a square in each frame: its corners (n, frames, 2) to bool (n, frames, rows, columns)."""
    pixels = torch.arange(SIZE)
    rows, columns = ((pixels >= at[..., None]) & (pixels < at[..., None] + SQUARE) for at in corners.unbind(dim=2))
    return rows[..., None] & columns[..., None, :]


def toy_data(count: int) -> TensorDataset:
    """Make clips of noise with a square that goes right, left, down or up, which is the class, and one that stays."""
    y = torch.arange(count) % 4
    step = torch.tensor([[0, 2], [0, -2], [2, 0], [-2, 0]])[y]  # pixels from frame to frame, down and right
    path = (torch.arange(FRAMES) - (FRAMES - 1) / 2)[None, :, None] * step[:, None]
    reach = path.abs().amax(dim=1)
    corners = reach + torch.rand(count, 2) * (SIZE - SQUARE - 2 * reach)  # no frame loses it
    moving = squares(corners[:, None] + path)
    staying = squares((torch.rand(count, 1, 2) * (SIZE - SQUARE)).expand(-1, FRAMES, -1))
    x = 0.5 * torch.rand(count, 3, FRAMES, SIZE, SIZE) + (moving | staying)[:, None]
    return TensorDataset(x, y, moving)


def small_net() -> nn.Sequential:
    """Return three convolutions to a grid of 4 x 8 x 8, global average pooling and a linear head."""
    layers: list[nn.Module] = []
    for before, channels, stride in ((3, 16, (1, 2, 2)), (16, 32, 2), (32, 64, 1)):
        convolution = nn.Conv3d(before, channels, 3, stride=stride, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm3d(channels), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 4))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: torch.device) -> float:
    right = [model(x.to(device)).argmax(dim=1).eq(y.to(device)) for x, y, _ in loader]
    return torch.cat(right).float().mean().item()


def main(
    images: int = 512,
    epochs: int = 6,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_data(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_data(images // 2), batch_size)
    model = small_net().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator(device).manual_seed(0)  # CGC
    reg = CGCRegularizer("2", transform=T, weighting="confidence", generator=generator)  # CGC

    for epoch in range(epochs):
        model.train()
        for x, y, _ in loader:
            x, y = x.to(device), y.to(device)
            output = reg.compute(model, x)  # CGC, was: logits = model(x)
            logits = output.logits  # CGC
            loss = F.cross_entropy(logits, y)
            loss = loss + lam * output.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        print(f"epoch {epoch}: accuracy {accuracy(model, validation, device):.3f}")
        shares = [  # CGC
            content_heatmap(explain(model, x.to(device), "2", y.to(device)), moving.to(device))  # CGC
            for x, y, moving in validation  # CGC
        ]  # CGC
        print(f"         share of a heatmap on what moves {torch.cat(shares).nanmean().item():.3f}")  # CGC
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
