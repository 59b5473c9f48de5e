"""A small student follows its teacher: its predictions, as in any distillation, and its heatmaps (e2KD).

    python examples/recipes/teacher.py

The lines that the heatmaps add end in "# CGC"; where one replaces another, the other follows "was:".

Parchami-Araghi et al., Good Teachers Explain: Explanation-Enhanced Knowledge Distillation (ECCV 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from cgc_reg import GradCAM, explain, mse_consistency  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


def train_teacher(teacher: nn.Module, loader: DataLoader, epochs: int, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(teacher(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    teacher.eval()  # for good: it only looks from now on


def distillation(logits: Tensor, taught: Tensor, temperature: float = 2.0) -> Tensor:
    """Compare two networks' scores (n, classes), softened by a temperature."""
    log_probability, wanted = (logits / temperature).log_softmax(dim=1), (taught / temperature).softmax(dim=1)
    return temperature**2 * F.kl_div(log_probability, wanted, reduction="batchmean")


def main(
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    lam: float = 1.0,  # CGC
) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    teacher = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=3).to(device)
    train_teacher(teacher, loader, epochs, device)
    student = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    g = GradCAM("layer4")  # CGC - of both; a teacher of another kind has one of its own

    for epoch in range(epochs):
        student.train()
        for x, _ in loader:  # the teacher is all that the student learns from
            x = x.to(device)
            with torch.no_grad():
                shown = g(teacher, x)  # CGC, was: taught = teacher(x)
                taught = shown.logits  # CGC
            seen = g(student, x, target=shown.target)  # CGC, was: logits = student(x)
            logits = seen.logits  # CGC
            loss = distillation(logits, taught)
            loss = loss + lam * mse_consistency(seen.heatmap, shown.heatmap)  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        student.eval()
        agree, distance = 0.0, 0.0
        with torch.no_grad():
            for x, _ in validation:
                x = x.to(device)
                target = teacher(x).argmax(dim=1)
                agree += (student(x).argmax(dim=1) == target).sum().item()
                maps = (explain(model, x, g, target) for model in (student, teacher))  # CGC
                distance += len(x) * mse_consistency(*maps).item()  # CGC
        count = len(validation.dataset)
        print(f"epoch {epoch}: predicts as its teacher {agree / count:.3f}")
        print(f"         heatmaps differ from its teacher's by {distance / count:.3f}, from 0 to 2")  # CGC
    return student


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
