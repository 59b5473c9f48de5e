"""Signals: CGC for heatmaps over time, of a network that tells which event a noisy recording holds.

    python examples/recipes/signals.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cgc_reg import CGCRegularizer, RandomResizedCropFlip, content_heatmap, explain  # CGC

LENGTH, EVENT = 256, 32  # of a recording and of its event, in samples
T = RandomResizedCropFlip(scale=(0.5, 1.0), flip_p=0.0)  # CGC - cuts and stretches; backwards is the other class


def toy_data(count: int) -> TensorDataset:
    """Make recordings of two channels, a slow wave and noise, with one event that rises in pitch, class 0, or falls."""
    y = torch.arange(count) % 2
    time = torch.arange(LENGTH)
    since = time - torch.rand(count, 1) * (LENGTH - EVENT)
    during = (since >= 0) & (since < EVENT)
    pitch = torch.where(y[:, None] == 0, since, EVENT - since) / EVENT  # from 0 to 1, or back
    event = during * (0.2 * torch.pi * (1 + 2 * pitch) * since).sin()
    wave = (2 * torch.pi * (time / 100 + torch.rand(count, 1))).sin()
    x = torch.stack([event + wave, event - wave], dim=1) + 0.5 * torch.randn(count, 2, LENGTH)
    return TensorDataset(x, y, during)


def small_net() -> nn.Sequential:
    """Return three convolutions to 64 places, global average pooling and a linear head."""
    layers: list[nn.Module] = []
    for before, channels, stride in ((2, 16, 2), (16, 32, 2), (32, 64, 1)):
        convolution = nn.Conv1d(before, channels, 7, stride=stride, padding=3, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm1d(channels), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 2))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: torch.device) -> float:
    right = [model(x.to(device)).argmax(dim=1).eq(y.to(device)) for x, y, _ in loader]
    return torch.cat(right).float().mean().item()


def bars(values: Tensor) -> str:  # CGC
    """Draw values from 0 on as a line of text."""  # CGC
    heights = 8 * values / values.max().clamp(min=1e-12)  # CGC
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights.round().int().tolist())  # CGC


def main(
    images: int = 1024,
    epochs: int = 8,
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
            content_heatmap(explain(model, x.to(device), "2", y.to(device)), during.to(device))  # CGC
            for x, y, during in validation  # CGC
        ]  # CGC
        print(f"         share of a heatmap on its event {torch.cat(shares).nanmean().item():.3f}")  # CGC

    x, y, during = next(iter(validation))  # CGC
    heatmap = explain(model, x.to(device), "2", y.to(device))[0]  # CGC
    print(f"event   |{bars(during[0, ::4].float())}|")  # CGC
    print(f"heatmap |{bars(heatmap)}|")  # CGC
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
