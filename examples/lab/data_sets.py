"""The data sets that `--data` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lab.elpv import load_elpv
from lab.fine_grained import load_cub200, load_fgvc_aircraft, load_flowers102, load_stanford_cars
from lab.image_data import Data, load_folder, load_imagenette, load_shapes

CONTEXT = 0.9  # share of the training images of shapes_context whose background has the tint of their class


class DataSet(NamedTuple):
    """What to say of a data set, the side of its images in pixels, and how to load it."""

    about: str
    image_size: int
    load: Callable[..., Data]


DATA_SETS = {
    "imagenette": DataSet(
        "ten classes of ImageNet", 224, lambda root, size, image_size, **_: load_imagenette(root, size, image_size)
    ),
    "shapes": DataSet(
        "built in",
        64,
        lambda image_size, seed, train_images, train_masks, **_: load_shapes(
            image_size=image_size, seed=seed, train=train_images, train_masks=train_masks
        ),
    ),
    "shapes_context": DataSet(
        "built in, with backgrounds that tell the class in training alone",
        64,
        lambda image_size, seed, train_images, train_masks, **_: load_shapes(
            image_size=image_size, seed=seed, train=train_images, train_masks=train_masks, context=CONTEXT
        ),
    ),
    "cub200": DataSet("CUB-200-2011, birds", 224, lambda root, image_size, **_: load_cub200(root, image_size)),
    "flowers102": DataSet("Oxford 102 Flowers", 224, lambda root, image_size, **_: load_flowers102(root, image_size)),
    "fgvc-aircraft": DataSet("FGVC-Aircraft", 224, lambda root, image_size, **_: load_fgvc_aircraft(root, image_size)),
    "stanford-cars": DataSet("Stanford Cars", 224, lambda root, image_size, **_: load_stanford_cars(root, image_size)),
    "elpv": DataSet("solar cells; CC BY-NC-SA 4.0", 128, lambda image_size, **_: load_elpv(image_size)),
}
DRAWN = ("shapes", "shapes_context")  # as many as are asked for, and with masks in training too
CHOICES = ", ".join(f"{name} ({data_set.about})" for name, data_set in DATA_SETS.items())


def default_image_size(name: str, size: str) -> int:
    """Return the side of the images where none is asked for, in pixels."""
    if (name, size) == ("imagenette", "160px"):
        return 128
    return DATA_SETS[name].image_size if name in DATA_SETS else 224


def load_data(
    name: str,
    *,
    root: Path,
    size: str,
    image_size: int,
    seed: int,
    train_images: int | None = None,
    train_masks: bool = False,
) -> Data:
    """Load the data set of that name, or else the folder; the last two are for shapes: how many, and with masks."""
    if name not in DATA_SETS:
        return load_folder(Path(name), image_size)
    return DATA_SETS[name].load(
        root=root, size=size, image_size=image_size, seed=seed, train_images=train_images, train_masks=train_masks
    )
