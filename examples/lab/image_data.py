"""What data sets are made of, and the plain ones: a folder of class folders, Imagenette, the built-in shapes."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, Imagenette
from torchvision.transforms import v2
from tqdm import tqdm

from cgc_reg import folders, visualization
from cgc_reg import images as image_files
from cgc_reg.energy import box_masks
from lab import processes
from lab.shapes import CLASSES, Shapes

IMAGENETTE_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
BOXES = "LOC_val_solution.csv"  # of ImageNet's validation images, as its localisation task comes
ALTERNATIVES = "use --data shapes (built in) or --data DIR (a folder with train/ and val/)"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """Data that cannot be used, and what to do about it."""


@dataclass
class Data:
    """A data set of normalised images; where the place of the object is known, validation items carry its mask.

    Training items carry masks where they were asked for, see `known_masks`.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    classes: list[str]
    labels: list[int]  # of the training images


def load_shapes(
    *,
    image_size: int,
    seed: int,
    train: int | None = None,
    validation: int = 1024,
    train_masks: bool = False,
    context: float | None = None,
) -> Data:
    """Make the shapes; training and validation come from different seeds.

    Args:
        image_size: their side, in pixels.
        seed: what they follow from.
        train: how many for training, 2,048 unless told otherwise.
        validation: how many for validation.
        train_masks: whether training items carry the object's mask too.
        context: the share of the training images whose background has the tint of their class; in validation tints are
            random. None leaves all backgrounds as they are.
    """
    train_set = Shapes(
        2048 if train is None else train,
        size=image_size,
        seed=2 * seed,
        transform=v2.Compose([v2.RandomHorizontalFlip(), *normalize()]),
        masks=train_masks,
        context=context,
    )
    validation_set = Shapes(
        validation,
        size=image_size,
        seed=2 * seed + 1,
        transform=v2.Compose(normalize()),
        masks=True,
        context=None if context is None else 0,
    )
    return Data(train_set, validation_set, list(CLASSES), train_set.labels.tolist())


def load_folder(folder: Path, image_size: int) -> Data:
    """Load the images in folder/train/CLASS and folder/val/CLASS; with ImageNet's boxes, if they lie beside them."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {ALTERNATIVES}.")
    train, validation = open_split(folder / "train"), open_split(folder / "val")
    if train.classes != validation.classes:
        different = sorted(set(train.classes) ^ set(validation.classes))
        raise DataError(
            f"{folder}/train and {folder}/val must hold the same classes; they differ in {', '.join(different)}."
        )
    boxes = imagenet_boxes(validation, folder / BOXES) if (folder / BOXES).exists() else None
    return Data(
        ImageFiles(train.samples, random_crop(image_size)),
        ImageFiles(validation.samples, centre_crop(image_size), boxes),
        train.classes,
        train.targets,
    )


def imagenet_boxes(found: ImageFolder, path: Path) -> list[list[tuple[float, float, float, float]]]:
    """Read the boxes of ImageNet's localisation task, of which an image may have several.

    The file has a header, and then lines such as ``ILSVRC2012_val_00000001,n01751748 111 108 230 366``: the image's
    name, and for each object its class and its left, top, right and bottom edge in pixels.
    """
    try:
        lines = dict(line.split(",") for line in path.read_text().splitlines()[1:])
        boxes = []
        for file, _ in found.samples:
            words = lines[Path(file).stem].split()
            edges = [words[i + 1 : i + 5] for i in range(0, len(words), 5)]
            boxes.append([(float(x), float(y), float(right), float(bottom)) for x, y, right, bottom in edges])
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{path} cannot be used ({type(error).__name__}: {error}); remove it or repair it.") from None
    return boxes


def open_split(folder: Path) -> ImageFolder:
    """Open a folder of class folders."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; --data DIR needs DIR/train/CLASS/ and DIR/val/CLASS/ with images."
        )
    try:
        return folders.image_folder(folder, say=processes.say)
    except OSError as error:  # such as a folder without classes, or a class without images
        raise DataError(f"{folder} cannot be used: {error}") from None


def open_image(path: str) -> Image.Image:
    """Read an image file as its viewer shows it, as RGB."""
    try:
        return image_files.open_image(path)
    except ValueError as error:
        raise DataError(str(error)) from None


def check_files(data: Data) -> None:
    """Read every image file once, so that one that cannot be read is known before the first epoch."""
    parts = [part for part in (data.train, data.validation) if isinstance(part, ImageFiles)]
    paths = [path for part in parts for path, _ in part.files]
    with processes.writer_first():
        if paths and processes.is_writer():
            try:
                folders.check_images(tqdm(paths, "reading every image once", leave=False, disable=None))
            except ValueError as error:
                raise DataError(str(error)) from None


class ImageFiles(Dataset[Any]):
    """Image files as (image, class), or as (image, class, mask) where the objects' boxes are known.

    Args:
        files: path and class of each image.
        transform: from a PIL image, or from it and its boxes, to what the data set gives.
        boxes: of each image, left, top, right and bottom edge of each object in it, in pixels of the file.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        transform: Callable[..., Any],
        boxes: Sequence[Sequence[tuple[float, float, float, float]]] | None = None,
    ) -> None:
        self.files = files
        self.transform = transform
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path, label = self.files[index]
        image = open_image(path)
        if self.boxes is None:
            return self.transform(image), label
        turned = turn_boxes(self.boxes[index], path, image.width, image.height)
        boxes = tv_tensors.BoundingBoxes(turned, format="XYXY", canvas_size=(image.height, image.width))
        image, boxes = self.transform(image, boxes)
        return image, label, box_masks(boxes[None], image.shape[1:])[0]


def turn_boxes(
    boxes: Sequence[tuple[float, float, float, float]], path: str, width: int, height: int
) -> list[tuple[float, float, float, float]]:
    """Turn boxes from the pixels of a file to those of its image as shown, of that width and height."""
    with Image.open(path) as file:
        asked = image_files.orientation(file)
    if asked > 4:  # these swap the sides, after mirroring
        width, height = height, width
    moved = []
    for left, top, right, bottom in boxes:
        if asked in (2, 3, 7, 8):
            left, right = width - right, width - left
        if asked in (3, 4, 6, 7):
            top, bottom = height - bottom, height - top
        moved.append((top, left, bottom, right) if asked > 4 else (left, top, right, bottom))
    return moved


def load_imagenette(root: Path, size: str, image_size: int) -> Data:
    """Load Imagenette, fetched if it is missing."""
    folder = root / IMAGENETTE_FOLDERS[size]
    fetch("Imagenette", folder, lambda place: Imagenette(place, split="train", size=size, download=True))
    return load_folder(folder, image_size)


def fetch(title: str, folder: Path, download: Callable[[str], Any]) -> None:
    """Download a data set's folder, with a progress bar, if it is missing."""
    with processes.writer_first():
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere first, so that an interrupted download is not taken for the data set.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            try:
                download(scratch)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{title} cannot be downloaded ({error}); connect to a network, put it into {folder}, or "
                    f"{ALTERNATIVES}."
                ) from None
            os.replace(Path(scratch) / folder.name, folder)


def random_crop(image_size: int) -> v2.Compose:
    """Augment a training image."""
    return v2.Compose([v2.RandomResizedCrop(image_size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), *normalize()])


def centre_crop(image_size: int) -> v2.Compose:
    """Prepare a validation image."""
    return v2.Compose([v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size), *normalize()])


def normalize() -> list[Callable[[Any], Any]]:
    """From a PIL image or a uint8 tensor to a normalised float tensor."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]


def denormalize(images: Tensor) -> Tensor:
    """Bring normalised images back to values from 0 to 1."""
    return visualization.denormalize(images, MEAN, STD)


def split_labeled(data: Data, fraction: float, *, seed: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Keep the labels of a share of each class, at least one image; return the labelled and the other images."""
    if fraction >= 1:
        return data.train, None
    labeled = share_of_each_class(data.labels, fraction, seed=seed)
    rest = sorted(set(range(len(data.labels))) - set(labeled))
    return Subset(data.train, labeled), Subset(data.train, rest) if rest else None


def share_of_each_class(labels: Sequence[int], fraction: float, *, seed: int) -> list[int]:
    """Choose a share of the images of each class, at least one, and return their places in order."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for indices in by_class.values():
        some = torch.randperm(len(indices), generator=generator)[: max(1, round(fraction * len(indices)))]
        chosen += [indices[i] for i in some.tolist()]
    return sorted(chosen)


class KnownMasks(Dataset[Any]):
    """Training images as (image, class, mask), with masks of zeros for all but some.

    Args:
        images: as (image, class, mask).
        known: the places of those whose masks are given.
    """

    def __init__(self, images: Dataset[Any], known: Sequence[int]) -> None:
        self.images = images
        self.known = set(known)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # torch gives a Dataset no length

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label, mask = self.images[index]
        return image, label, mask if index in self.known else torch.zeros_like(mask)


def known_masks(data: Data, fraction: float, *, seed: int) -> Data:
    """Keep the training masks of a share of each class, at least one image; those of the others become zeros."""
    known = share_of_each_class(data.labels, fraction, seed=seed)
    return replace(data, train=KnownMasks(data.train, known))
