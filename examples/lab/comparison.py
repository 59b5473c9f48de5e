"""Models side by side: a table of what was measured of them, and a picture of their heatmaps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cgc_reg import RandomResizedCropFlip, SpatialTransform, explain
from cgc_reg.visualization import overlay
from lab.image_data import denormalize

TITLES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "cgc": "CGC loss",
    "similarity": "similarity of T(g(x)) and g(T(x))",
    "margin": "margin over other images",
    "blank_share": "blank heatmaps",
    "content_heatmap": "content heatmap",
    "object_coverage": "object coverage",
    "mostly_off_object": "heatmaps mostly off the object",
    "pointing_game": "pointing game",
    "insertion": "insertion area",
    "deletion": "deletion area",
    "faithfulness": "faithfulness correlation",
    "sensitivity": "sensitivity to noise",
    "localisation": "relevance rank accuracy",
    "random_head": "rank correlation with heatmaps of a random head",
    "random_model": "rank correlation with heatmaps of a random model",
    "seconds": "seconds per epoch",
}


def table(corner: str, columns: Mapping[str, Mapping[str, str]]) -> str:
    """Lay out columns of named values that all have, in Markdown."""
    rows = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, title in TITLES.items():
        if all(name in column for column in columns.values()):
            rows.append(f"| {title} | " + " | ".join(column[name] for column in columns.values()) + " |")
    return "\n".join(rows)


def written(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in values.items()}


def examples_of(dataset: Dataset[tuple[Tensor, ...]], count: int) -> Tensor:
    """Take images from all over a data set, (n, 3, H, W)."""
    length = len(dataset)  # type: ignore[arg-type]  # torch gives a Dataset no length
    places = torch.linspace(0, length - 1, min(count, length)).long().tolist()
    return torch.stack([dataset[i][0] for i in places])


def with_views(images: Tensor, transform: SpatialTransform) -> Tensor:
    """Put T(x) after each image: x_1, T(x_1), x_2, ..."""
    return torch.stack([images, transform(images)], dim=1).flatten(0, 1)


def draw(images: Tensor, seed: int = 0) -> SpatialTransform:
    """Draw T as the measuring of a model does."""
    generator = torch.Generator().manual_seed(seed)
    size = (images.shape[2], images.shape[3])
    return RandomResizedCropFlip().sample(len(images), size, device=images.device, generator=generator)


def heatmap_columns(model: nn.Module, layer: str, pairs: Tensor, name: str) -> dict[str, Tensor]:
    """Return a picture's columns: heatmaps, and overlays, of images and their views for the image's class."""
    with torch.no_grad():
        target = model.eval()(pairs[::2]).argmax(dim=1).repeat_interleave(2)
    heatmaps = explain(model, pairs, layer, target)
    return {f"{name}\nheatmap": heatmaps, f"{name}\noverlay": overlay(denormalize(pairs), heatmaps)}
