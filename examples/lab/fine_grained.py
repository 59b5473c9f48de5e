"""Data sets whose classes differ in details: birds, flowers, aircraft, cars; each as its authors split it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import FGVCAircraft, Flowers102, StanfordCars
from torchvision.transforms import v2

from lab.image_data import Data, DataError, ImageFiles, centre_crop, fetch, random_crop

CUB_200 = "unpack CUB_200_2011.tgz from https://www.vision.caltech.edu/datasets/cub_200_2011/ there"
LAYOUTS = {
    Flowers102: "jpg/, imagelabels.mat and setid.mat, unchanged",
    FGVCAircraft: "data/ with images/, variants.txt, images_variant_trainval.txt and images_variant_test.txt",
    StanfordCars: "cars_train/ and cars_test/ with the images, devkit/ with cars_train_annos.mat and cars_meta.mat, "
    "and cars_test_annos_withlabels.mat",
}


def load_cub200(root: Path, image_size: int) -> Data:
    """Load CUB-200-2011; the mask of a validation image is the bird's box."""
    folder = root / "CUB_200_2011"
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {CUB_200}.")
    train, validation, boxes = [], [], []
    try:
        classes = read_table(folder / "classes.txt")
        index = {number: i for i, number in enumerate(classes)}
        labels, in_train, sides = (
            read_table(folder / name)
            for name in ("image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")
        )
        for image, (path,) in read_table(folder / "images.txt").items():
            file = str(folder / "images" / path), index[labels[image][0]]
            if in_train[image] == ["1"]:
                train.append(file)
            else:
                left, top, width, height = map(float, sides[image])
                validation.append(file)
                boxes.append([(left, top, left + width, top + height)])
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{folder} cannot be used ({type(error).__name__}: {error}); {CUB_200}.") from None
    return Data(
        ImageFiles(train, random_crop(image_size)),
        ImageFiles(validation, centre_crop(image_size), boxes),
        [name for (name,) in classes.values()],
        [label for _, label in train],
    )


def read_table(path: Path) -> dict[str, list[str]]:
    """Read lines of a number and its values."""
    return {number: values for number, *values in map(str.split, path.read_text().splitlines())}


def load_flowers102(root: Path, image_size: int) -> Data:
    """Load Oxford 102 Flowers; as is usual, its train and val (ten images of each class) are both for training."""
    folder = root / "flowers-102"
    fetch("Oxford 102 Flowers", folder, lambda place: Flowers102(place, download=True))
    return load_splits(Flowers102, folder, ["train", "val"], image_size)


def load_fgvc_aircraft(root: Path, image_size: int) -> Data:
    """Load FGVC-Aircraft; the classes are its 100 variants."""
    folder = root / "fgvc-aircraft-2013b"
    fetch("FGVC-Aircraft", folder, lambda place: FGVCAircraft(place, download=True))
    return load_splits(FGVCAircraft, folder, ["trainval"], image_size, without_banner)


def load_stanford_cars(root: Path, image_size: int) -> Data:
    """Load Stanford Cars."""
    folder = root / "stanford_cars"
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}, and Stanford Cars cannot be downloaded any more; the folder must hold "
            f"{LAYOUTS[StanfordCars]}."
        )
    return load_splits(StanfordCars, folder, ["train"], image_size)


def load_splits(
    source: Callable[..., Any], folder: Path, training: list[str], image_size: int, *prepare: Callable[[Any], Any]
) -> Data:
    """Let torchvision read which images there are; its test split is for validation."""
    try:
        *train, test = (source(folder.parent, split=split) for split in [*training, "test"])
    except (OSError, RuntimeError, ValueError, LookupError, ImportError) as error:
        raise DataError(f"{folder} cannot be used ({error}); it must hold {LAYOUTS[source]}.") from None
    train_files = [file for split in train for file in list_files(split)]
    return Data(
        ImageFiles(train_files, v2.Compose([*prepare, random_crop(image_size)])),
        ImageFiles(list_files(test), v2.Compose([*prepare, centre_crop(image_size)])),
        # Before 0.22 torchvision had no names for the flowers.
        getattr(test, "classes", [f"flower {i}" for i in range(1, 103)]),
        [label for _, label in train_files],
    )


def list_files(split: Any) -> list[tuple[str, int]]:
    """Return path and class of each image in one of torchvision's data sets."""
    pairs = split._samples if hasattr(split, "_samples") else zip(split._image_files, split._labels, strict=True)
    return [(str(path), label) for path, label in pairs]


def without_banner(image: Image.Image) -> Image.Image:
    """Cut off the lowest 20 rows of an aircraft image, which name the photographer."""
    return image.crop((0, 0, image.width, image.height - 20))
