"""Several labels an image: CGC for the evidence of all labels that are present, and a heatmap for each of them.

    python examples/recipes/several_labels.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer, content_heatmap, explain  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of up to three bright squares, one of each colour, anywhere on noise: labels and masks (n, 3)."""
    x, labels = 0.5 * torch.rand(count, 3, 64, 64), torch.rand(count, 3) < 0.5
    masks = torch.zeros(count, 3, 64, 64, dtype=torch.bool)
    for (image, label), (top, left) in zip(
        labels.nonzero().tolist(), torch.randint(48, (int(labels.sum()), 2)).tolist(), strict=True
    ):
        masks[image, label, top : top + 16, left : left + 16] = True
    return TensorDataset(x + 0.5 * masks, labels.float(), masks)


def heatmaps_by_label(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # CGC
    """Return a heatmap for each label that is present, and which image and label it is of, (count, 2)."""  # CGC
    present = labels.nonzero()  # CGC
    return explain(model, x[present[:, 0]], "layer4", target=present[:, 1]), present  # CGC


def main(
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    model = resnet18(num_classes=3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator(device).manual_seed(0)  # CGC
    reg = CGCRegularizer("layer4", weighting="confidence", generator=generator)  # CGC

    for epoch in range(epochs):
        model.train()
        for x, labels, _ in loader:
            x, labels = x.to(device), labels.to(device)
            output = reg.compute(model, x, target=labels)  # CGC, was: logits = model(x)
            logits = output.logits  # CGC
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            loss = loss + lam * output.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        right, on_object = 0, []
        for x, labels, masks in validation:
            x, labels, masks = x.to(device), labels.to(device), masks.to(device)
            with torch.no_grad():
                right += ((model(x) > 0) == labels.bool()).sum().item()
            heatmaps, present = heatmaps_by_label(model, x, labels)  # CGC
            on_object.append(content_heatmap(heatmaps, masks[present[:, 0], present[:, 1]]))  # CGC
        print(f"epoch {epoch}: labels right {right / (3 * len(validation.dataset)):.3f}")
        share = torch.cat(on_object).nanmean().item()  # CGC
        print(f"         share of a label's heatmap on its square {share:.3f}")  # CGC
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
