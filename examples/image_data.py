"""Data sets for the examples: Imagenette, any folder of class folders, and the built-in shapes."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.transforms import v2

import processes
from shapes import CLASSES, Shapes

IMAGENETTE_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
ALTERNATIVES = "use --data shapes (built in) or --data DIR (a folder with train/ and val/)"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """Data that cannot be used, and what to do about it."""


@dataclass
class Data:
    """A data set of normalised images; validation items of the shapes carry the object's mask."""

    train: Dataset[Any]
    validation: Dataset[Any]
    classes: list[str]
    labels: list[int]  # of the training images


def load_data(name: str, *, root: Path, size: str, image_size: int, seed: int) -> Data:
    """Load ``"imagenette"``, ``"shapes"``, or the folder of that name."""
    if name == "shapes":
        return load_shapes(image_size=image_size, seed=seed)
    if name == "imagenette":
        with processes.writer_first():
            folder = download_imagenette(root, size)
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; {ALTERNATIVES}.")
    return load_folder(folder, image_size=image_size)


def load_shapes(*, image_size: int, seed: int, train: int = 8192, validation: int = 1024) -> Data:
    """Make the shapes; training and validation come from different seeds."""
    train_set = Shapes(
        train, size=image_size, seed=2 * seed, transform=v2.Compose([v2.RandomHorizontalFlip(), *normalize()])
    )
    validation_set = Shapes(
        validation, size=image_size, seed=2 * seed + 1, transform=v2.Compose(normalize()), masks=True
    )
    return Data(train_set, validation_set, list(CLASSES), train_set.labels.tolist())


def load_folder(folder: Path, *, image_size: int) -> Data:
    """Load the images in folder/train/CLASS and folder/val/CLASS."""
    augment = v2.Compose([v2.RandomResizedCrop(image_size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), *normalize()])
    centre = v2.Compose([v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size), *normalize()])
    train, validation = open_split(folder / "train", augment), open_split(folder / "val", centre)
    if train.classes != validation.classes:
        different = sorted(set(train.classes) ^ set(validation.classes))
        raise DataError(
            f"{folder}/train and {folder}/val must hold the same classes; they differ in {', '.join(different)}."
        )
    return Data(train, validation, train.classes, train.targets)


def open_split(folder: Path, transform: Callable[[Any], Any]) -> ImageFolder:
    """Open a folder of class folders."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; --data DIR needs DIR/train/CLASS/ and DIR/val/CLASS/ with images."
        )
    try:
        return ImageFolder(str(folder), transform, loader=open_image)
    except FileNotFoundError as error:  # torchvision's word for a folder without classes, or a class without images
        raise DataError(f"{folder} cannot be used: {error}") from None


def open_image(path: str) -> Image.Image:
    """Open an image file as RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"the image {path} cannot be read ({error}); repair or remove it.") from None


def download_imagenette(root: Path, size: str) -> Path:
    """Return Imagenette's folder, fetched with a progress bar if it is missing."""
    folder = root / IMAGENETTE_FOLDERS[size]
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    # Into a folder of its own first, so that an interrupted download is not taken for the data set.
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        try:
            Imagenette(scratch, split="train", size=size, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Imagenette cannot be downloaded ({error}); connect to a network, or {ALTERNATIVES}."
            ) from None
        os.replace(Path(scratch) / folder.name, folder)
    return folder


def normalize() -> list[Callable[[Any], Any]]:
    """From a PIL image or a uint8 tensor to a normalised float tensor."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]


def denormalize(images: Tensor) -> Tensor:
    """Bring normalised images back to values from 0 to 1."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def split_labeled(data: Data, fraction: float, *, seed: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Keep the labels of a share of each class, at least one image; return the labelled and the other images."""
    if fraction >= 1:
        return data.train, None
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(data.labels):
        by_class[label].append(index)
    generator = torch.Generator().manual_seed(seed)
    labeled = []
    for indices in by_class.values():
        chosen = torch.randperm(len(indices), generator=generator)[: max(1, round(fraction * len(indices)))]
        labeled += [indices[i] for i in chosen.tolist()]
    rest = sorted(set(range(len(data.labels))) - set(labeled))
    return Subset(data.train, sorted(labeled)), Subset(data.train, rest) if rest else None
