"""The built-in data set: one object among distractors on a textured background, with the object's mask.

The class is the object's outline, a closed curve with lobes of its own number, depth and sharpness. Place, size, angle,
colours, texture and distractors say nothing about it. Distractors are ellipses and boxes in the same kind of colours.

With a context the background has a tint too, one of as many as there are classes, which may go with the class: what a
network can learn in place of the object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

# Lobes, depth and sharpness of the outline r(angle) = 1 + depth * |cos(lobes * angle / 2)| ** sharpness.
CLASSES = {
    "disc": (0, 0.0, 1.0),
    "bar": (2, 2.0, 3.0),
    "trefoil": (3, 1.2, 1.5),
    "cross": (4, 1.6, 3.0),
    "star": (5, 1.2, 2.0),
    "gear": (8, 0.6, 1.0),
    "ring": (0, 0.0, 1.0),  # a disc with a hole
}
TINT = 0.05  # how far a tint moves the red, green and blue of a background, which are from 0 to 1; more hides the shape


class Shapes(Dataset[Any]):
    """Shapes as (image, class), or as (image, class, mask).

    Args:
        count: number of images.
        size: their side, in pixels.
        seed: what they follow from; data sets of different seeds share no image.
        transform: of torchvision's v2: from a uint8 image (3, size, size), or from it and its mask, to what the data
            set gives.
        masks: whether to give the object's mask, bool (size, size), too.
        context: as for :func:`draw_shapes`.
    """

    def __init__(
        self,
        count: int,
        *,
        size: int,
        seed: int,
        transform: Callable[..., Any],
        masks: bool = False,
        context: float | None = None,
    ) -> None:
        parts = [
            draw_shapes(min(1024, count - i), size=size, seed=seed * 1_000_003 + i, context=context)
            for i in range(0, count, 1024)
        ]
        self.images, self.labels, self.masks = (torch.cat(part) for part in zip(*parts, strict=True))
        self.transform = transform
        self.with_masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label = self.images[index], int(self.labels[index])
        if not self.with_masks:
            return self.transform(image), label
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(self.masks[index]))
        return image, label, mask


def draw_shapes(count: int, *, size: int, seed: int, context: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images (n, 3, size, size) uint8, classes (n,) and masks of the objects (n, size, size) bool.

    ``context`` is the share of the images whose background has the tint of their class; the others have one of all
    tints at random. None leaves backgrounds as they are. All else of an image is the same, whatever the context.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    image = draw_background(x, y, uniform)
    covered = torch.zeros(count, size, size, dtype=torch.bool)
    for draw_distractor in [draw_ellipse] * 4 + [draw_box] * 2:
        inside = draw_distractor(x, y, uniform)
        image, covered = paste(image, inside, uniform(0, 1, 3)), covered | inside
    label = torch.randint(len(CLASSES), (count,), generator=generator)
    mask, hole = draw_object(x, y, label, uniform)
    image, covered = paste(image, mask & ~hole, uniform(0, 1, 3)), covered | (mask & ~hole)
    image = image + 0.05 * torch.randn(image.shape, generator=generator)
    if context is not None:  # drawn last, so that nothing else changes by it
        any_class = torch.randint(len(CLASSES), (count,), generator=generator)
        tint = tints()[torch.where(uniform(0, 1) < context, label, any_class)]
        image = image + tint[:, :, None, None] * ~covered[:, None]
    return (image.clamp(0, 1) * 255).to(torch.uint8), label, mask


def tints() -> Tensor:
    """Return a tint for each class, (classes, 3): hues all around the circle, which leave the brightness as it is."""
    turn = torch.arange(len(CLASSES)) / len(CLASSES)
    return TINT * (2 * math.pi * (turn[:, None] - torch.arange(3) / 3)).cos()


Uniform = Callable[..., Tensor]


def draw_background(x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """Mix smooth clouds of colour with three plane waves, (n, 3, size, size)."""
    image = F.interpolate(uniform(0.3, 0.7, 3, 4, 4), x.shape, mode="bicubic")
    for _ in range(3):
        angle, frequency, phase = uniform(0, math.pi, 1, 1), uniform(6, 30, 1, 1), uniform(0, 2 * math.pi, 1, 1)
        wave = (frequency * (x * angle.cos() + y * angle.sin()) + phase).sin()
        image = image + wave[:, None] * uniform(-0.08, 0.08, 3, 1, 1)
    return image


def draw_ellipse(x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """Place one thin ellipse anywhere, (n, size, size) bool."""
    along, across = turn_about(uniform(-1, 1, 2, 1, 1), x, y, uniform)
    length, width = uniform(0.08, 0.4, 1, 1), uniform(0.03, 0.1, 1, 1)
    return (along / length).square() + (across / width).square() < 1


def draw_box(x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """Place one box anywhere, up to as large as an object, (n, size, size) bool."""
    along, across = turn_about(uniform(-0.9, 0.9, 2, 1, 1), x, y, uniform)
    side, aspect = uniform(0.1, 0.3, 1, 1), uniform(0.6, 1.6, 1, 1)
    return (along.abs() < side * aspect) & (across.abs() < side / aspect)


def turn_about(centre: Tensor, x: Tensor, y: Tensor, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Return coordinates about a centre (n, 2, 1, 1), turned by a random angle."""
    x, y = x - centre[:, 0], y - centre[:, 1]
    angle = uniform(0, math.pi, 1, 1)
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def draw_object(x: Tensor, y: Tensor, label: Tensor, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Place the object: its mask and its hole, each (n, size, size) bool. All outlines enclose the same area."""
    radius = uniform(0.25, 0.4, 1, 1)
    x, y = (x - uniform(-0.55, 0.55, 1, 1)) / radius, (y - uniform(-0.55, 0.55, 1, 1)) / radius
    lobes, depth, sharpness = torch.tensor(list(CLASSES.values()))[label][:, :, None, None].unbind(1)

    def outline(angle: Tensor) -> Tensor:
        return 1 + depth * (lobes * angle / 2).cos().abs() ** sharpness

    # The area inside r(angle) is pi times the mean of r squared.
    unit = outline(torch.arange(360)[None, None] * (math.pi / 180)).square().mean(dim=2, keepdim=True).sqrt()
    distance, angle = (x.square() + y.square()).sqrt(), torch.atan2(y, x) + uniform(0, 2 * math.pi, 1, 1)
    is_ring = (label == list(CLASSES).index("ring"))[:, None, None]
    return distance < outline(angle) / unit, is_ring & (distance < 0.55)


def paste(image: Tensor, inside: Tensor, color: Tensor) -> Tensor:
    """Fill a region with one colour for each image."""
    return torch.where(inside[:, None], color[:, :, None, None], image)
