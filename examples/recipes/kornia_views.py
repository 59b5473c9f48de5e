"""CGC with kornia: its augmentations make the views, and their matrices say where each heatmap must go.

    python examples/recipes/kornia_views.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cgc_reg import CGCRegularizer, SpatialTransform  # CGC


def toy_images(count: int) -> TensorDataset:
    """Make pictures of one bright square, anywhere on noise; its colour is the class."""
    x, y = 0.5 * torch.rand(count, 3, 64, 64), torch.randint(3, (count,))
    for image, label, (top, left) in zip(x, y, torch.randint(48, (count, 2)).tolist(), strict=True):
        image[label, top : top + 16, left : left + 16] += 0.5
    return TensorDataset(x, y)


def main(
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    lam: float = 0.5,  # CGC
) -> torch.nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(toy_images(images), batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(toy_images(images // 2), batch_size)
    augment = torch.nn.Sequential(K.RandomHorizontalFlip(), K.RandomBrightness((0.8, 1.2)))
    # What moves pixels in the views must be affine: no perspective, no elastic deformation. Colours may change too.
    views = K.AugmentationSequential(  # CGC
        K.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.8, 1.5), p=1.0),  # CGC
        K.RandomHorizontalFlip(),  # CGC
        K.RandomBrightness((0.8, 1.2)),  # CGC
    )  # CGC
    model = resnet18(num_classes=3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reg = CGCRegularizer("layer4")  # CGC

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            x, y = augment(x.to(device)), y.to(device)
            view = views(x)  # CGC
            transform = SpatialTransform.from_matrix(views.transform_matrix, image_size=(64, 64))  # CGC
            out = reg.compute(model, x, view=view, transform=transform)  # CGC
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
        print(f"epoch {epoch}: last loss {loss.item():.3f}, validation accuracy {right / len(validation.dataset):.3f}")
        print("    " + ", ".join(f"{name} {value.item():.3f}" for name, value in out.scalars.items()))  # CGC
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
