"""CGC for a segmentation network, which returns a dictionary of maps: `output_fn` makes class scores of them.

    python examples/recipes/segmentation_output.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import warnings  # CGC

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from cgc_reg import CGCRegularizer, GradCAM  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise, and their masks: 0, or the square's colour from 1 to 3."""
    x, masks = 0.5 * torch.rand(count, 3, 64, 64), torch.zeros(count, 64, 64, dtype=torch.long)
    labels = torch.randint(3, (count,)).tolist()
    for image, mask, label, (top, left) in zip(x, masks, labels, torch.randint(40, (count, 2)).tolist(), strict=True):
        image[label, top : top + 24, left : left + 24] += 0.5
        mask[top : top + 24, left : left + 24] = label + 1
    return TensorDataset(x, masks)


def class_scores(output: dict[str, torch.Tensor]) -> torch.Tensor:  # CGC
    """Average the map of each class over its pixels, (n, k), but the background's, which is larger than any."""  # CGC
    return output["out"][:, 1:].mean(dim=(2, 3))  # CGC


def main(
    images: int = 512,
    epochs: int = 4,
    batch_size: int = 16,
    lam: float = 0.5,  # CGC
) -> torch.nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNetV3's 0.01 is for trainings longer than this one
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # The network adds a finer map from an early layer, which the heatmaps leave out.  # CGC
    warnings.filterwarnings("ignore", "A branch of the model goes around")  # CGC
    # No BatchNorm follows this layer: one would make an image's heatmap depend on the others of the batch.
    reg = CGCRegularizer(GradCAM("classifier.cbr", output_fn=class_scores))  # CGC

    for epoch in range(epochs):
        model.train()
        for x, masks in loader:
            x, masks = x.to(device), masks.to(device)
            out = reg.compute(model, x)  # CGC
            output = out.output  # CGC, was: output = model(x)
            loss = F.cross_entropy(output["out"], masks)
            loss = loss + lam * out.loss  # CGC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        intersection = union = 0
        with torch.inference_mode():
            for x, masks in validation:
                found, there = model(x.to(device))["out"].argmax(dim=1).cpu(), masks > 0
                intersection += ((found == masks) & there).sum().item()
                union += ((found > 0) | there).sum().item()
        print(f"epoch {epoch}: last loss {loss.item():.3f}, validation IoU of the squares {intersection / union:.3f}")
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
