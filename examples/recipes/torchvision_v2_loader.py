"""CGC with torchvision's v2 transforms: augmentation in the loader's workers, the views of CGC on the device.

    python examples/recipes/torchvision_v2_loader.py

The lines that CGC adds end in "# CGC"; where one replaces another, the other follows "was:".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import resnet18
from torchvision.transforms import v2

from cgc_reg import CGCRegularizer, RandomResizedCropFlip  # CGC


class ToyImages(Dataset):
    """Pictures of one bright square, anywhere on noise, uint8; its colour is the class."""

    def __init__(self, count: int, transform: v2.Transform) -> None:
        self.x, self.y = torch.randint(128, (count, 3, 72, 72), dtype=torch.uint8), torch.randint(3, (count,))
        for image, label, (top, left) in zip(self.x, self.y, torch.randint(56, (count, 2)).tolist(), strict=True):
            image[label, top : top + 16, left : left + 16] += 127
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.transform(tv_tensors.Image(self.x[index])), self.y[index]


def main(
    images: int = 512,
    epochs: int = 3,
    batch_size: int = 32,
    workers: int = 2,
    lam: float = 0.5,  # CGC
) -> torch.nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    to_floats = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        v2.ToPureTensor(),
    ]
    augment = v2.Compose(
        [v2.RandomResizedCrop(64, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2), *to_floats]
    )
    prepare = v2.Compose([v2.CenterCrop(64), *to_floats])
    options = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
    loader = DataLoader(ToyImages(images, augment), batch_size, shuffle=True, drop_last=True, **options)
    validation = DataLoader(ToyImages(images // 2, prepare), batch_size, **options)
    model = resnet18(num_classes=3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Its own crop and flip, relative to what the loader gives: drawn for the whole batch at once, on x's device.
    reg = CGCRegularizer("layer4", transform=RandomResizedCropFlip(scale=(0.3, 1.0)))  # CGC

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            out = reg.compute(model, x)  # CGC
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
