"""Solar cells, functional or defective: the data set ELPV, as the package elpv-dataset ships it (CC BY-NC-SA 4.0)."""

from __future__ import annotations

from collections import defaultdict
from importlib import resources
from pathlib import Path

import torch
from torchvision.transforms import v2

from lab.image_data import Data, DataError, ImageFiles, normalize

CLASSES = ["functional", "defective"]


def load_elpv(image_size: int) -> Data:
    """Load the electroluminescence images of the installed package.

    Experts called each cell functional or defective, and said whether they were sure; the defect probabilities 0, 1/3,
    2/3 and 1 stand for that. Here 1/2 or more is defective. A quarter of the cells of each class and type (mono- or
    polycrystalline) is for validation: as large a share as in the paper, but other cells, and the same ones whatever
    the seed of a run.

    References:
        Deitsch et al., Automatic Classification of Defective Photovoltaic Module Cells in Electroluminescence Images
        (Solar Energy 185, 2019).
    """
    try:
        folder = Path(str(resources.files("elpv_dataset"))) / "data"
    except ModuleNotFoundError:
        raise DataError(
            'ELPV comes with a package that is not installed; run pip install ".[elpv]" (CC BY-NC-SA 4.0).'
        ) from None
    cells = defaultdict(list)
    try:
        for line in (folder / "labels.csv").read_text().splitlines():
            path, probability, kind = line.split()
            label = int(float(probability) >= 0.5)
            cells[label, kind].append((str(folder / path), label))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'labels.csv'} cannot be read ({error}); install elpv-dataset again.") from None
    generator = torch.Generator().manual_seed(0)
    train, validation = [], []
    for _, group in sorted(cells.items()):
        shuffled = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        validation += shuffled[: len(group) // 4]
        train += shuffled[len(group) // 4 :]
    # The whole cell, since the defect may lie anywhere; it looks the same from either side.
    whole, flips = v2.Resize((image_size, image_size)), [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    return Data(
        ImageFiles(train, v2.Compose([whole, *flips, *normalize()])),
        ImageFiles(validation, v2.Compose([whole, *normalize()])),
        CLASSES,
        [label for _, label in train],
    )
