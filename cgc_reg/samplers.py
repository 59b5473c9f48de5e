"""What draws the transforms: an independent map for each image, and the whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_probability, check_range, check_sampler, check_size, describe, is_number
from cgc_reg.transforms import SpatialTransform


class TransformSampler(Protocol):
    """What draws transforms: anything with this ``sample`` can be a regularizer's ``transform``."""

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image of a batch."""
        ...


def _uniform(
    low: float,
    high: float,
    shape: tuple[int, ...],
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw on the generator's device, or on the device given."""
    device = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float32) * (high - low) + low


def _move(transform: SpatialTransform, device: torch.device | str | None) -> SpatialTransform:
    return transform if device is None else transform.to(device)


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """Draw a box in each image, stretched to the whole output, and a horizontal flip.

    Boxes have the distribution of :class:`torchvision.transforms.RandomResizedCrop`: an area and an aspect ratio
    are drawn up to ten times until the box fits, else the largest centred box of an allowed ratio is taken. The
    whole batch is drawn at once, on its device.

    Args:
        scale: (minimum, maximum) of the box's area, as a share of the image's.
        ratio: (minimum, maximum) of the box's width / height, drawn uniformly in its logarithm.
        flip_p: probability of a horizontal flip.

    Example:
        >>> transform = RandomResizedCropFlip().sample(32, (224, 224))
        >>> transform(torch.rand(32, 3, 224, 224)).shape, transform(torch.rand(32, 7, 7)).shape
        (torch.Size([32, 3, 224, 224]), torch.Size([32, 7, 7]))
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, 1)
        if self.scale[1] == 0:
            raise ValueError(f"`scale` must allow boxes larger than nothing; got {describe(self.scale)}.")
        check_range("ratio", self.ratio, 0)
        if self.ratio[0] == 0:
            raise ValueError(f"`ratio` must be two positive numbers; got {describe(self.ratio)}.")
        check_probability("flip_p", self.flip_p)

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image.

        Args:
            batch_size: n, the number of maps.
            image_size: (H, W) of the images that the transform will be applied to, in pixels.
            device: where the transform is wanted; drawn there, unless the generator lives elsewhere.
            generator: source of randomness; torch's global one if None.
        """
        top, left, height, width = self.sample_boxes(batch_size, image_size, device=device, generator=generator)
        flip = _uniform(0, 1, (batch_size,), device, generator) < self.flip_p
        return _move(SpatialTransform.from_crop(top, left, height, width, flip, image_size=image_size), device)

    def sample_boxes(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw the boxes alone: top, left, height, width, each (n,), float32, whole numbers of pixels.

        The arguments are those of :meth:`sample`; the boxes stay on the device that they are drawn on.
        """
        image_height, image_width = check_size("image_size", image_size)
        tries = (batch_size, 10)
        area = _uniform(*self.scale, tries, device, generator) * (image_height * image_width)
        ratio = _uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), tries, device, generator).exp()
        width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (width >= 1) & (width <= image_width) & (height >= 1) & (height <= image_height)
        first = fits.int().argmax(dim=1, keepdim=True)  # of equals, argmax takes the first
        width, height, fits = (value.gather(1, first)[:, 0] for value in (width, height, fits))

        image_ratio = image_width / image_height
        fallback_width, fallback_height = image_width, image_height
        if image_ratio < self.ratio[0]:
            fallback_height = max(1, round(image_width / self.ratio[0]))
        elif image_ratio > self.ratio[1]:
            fallback_width = max(1, round(image_height * self.ratio[1]))
        width, height = width.masked_fill(~fits, fallback_width), height.masked_fill(~fits, fallback_height)

        top, left = (
            torch.minimum((_uniform(0, 1, (batch_size,), device, generator) * (room + 1)).floor(), room).where(
                fits, (room / 2).floor()
            )
            for room in (image_height - height, image_width - width)
        )
        return top, left, height, width


@dataclass(frozen=True)
class RandomAffine:
    """Draw a rotation, translation, zoom and shear of each image about its centre.

    The arguments mean what they mean in :class:`torchvision.transforms.RandomAffine`; translations are not rounded
    to whole pixels. A rotation is one in pixels, also when the image is not square.

    Args:
        degrees: (minimum, maximum) of the clockwise angle in degrees; a number d stands for (-d, d), and 0 for none.
        translate: largest horizontal and vertical shift, as shares of the image's width and height.
        scale: (minimum, maximum) of the zoom; above 1 enlarges.
        shear: in degrees; a number s stands for (-s, s) along x, two numbers for a range along x, four for ranges
            along x and y.

    Example:
        >>> RandomAffine(degrees=15, translate=(0.1, 0.1)).sample(8, (224, 160)).theta.shape
        torch.Size([8, 2, 3])
    """

    degrees: float | tuple[float, float]
    translate: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    shear: float | tuple[float, float] | tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        self._degrees()
        self._shear()
        if self.translate is not None:
            translate = self.translate
            if (
                not isinstance(translate, (tuple, list))
                or len(translate) != 2
                or not all(is_number(v) and 0 <= v <= 1 for v in translate)
            ):
                raise ValueError(
                    "`translate` must be two shares from 0 to 1 (of the width, of the height); got "
                    f"{describe(translate)}."
                )
        if self.scale is not None and check_range("scale", self.scale, 0)[0] == 0:
            raise ValueError(f"`scale` must be two positive numbers; got {describe(self.scale)}.")

    def _degrees(self) -> tuple[float, float]:
        return _symmetric_range("degrees", self.degrees)

    def _shear(self) -> tuple[tuple[float, float], tuple[float, float]]:
        if isinstance(self.shear, (tuple, list)) and len(self.shear) == 4:
            ranges = check_range("shear", self.shear[:2]), check_range("shear", self.shear[2:])
        else:
            ranges = _symmetric_range("shear", 0.0 if self.shear is None else self.shear), (0.0, 0.0)
        if any(abs(angle) >= 90 for limits in ranges for angle in limits):
            raise ValueError(f"`shear` must lie between -90 and 90 degrees; got {describe(self.shear)}.")
        return ranges

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`."""
        height, width = check_size("image_size", image_size)

        def draw(limits: tuple[float, float]) -> Tensor:
            return _uniform(*limits, (batch_size,), device, generator)

        angle = draw(self._degrees()).deg2rad()
        shear_x, shear_y = (draw(limits).deg2rad() for limits in self._shear())
        zoom = draw(self.scale or (1.0, 1.0))
        limit_x, limit_y = self.translate or (0.0, 0.0)
        move_x, move_y = draw((-limit_x, limit_x)) * width, draw((-limit_y, limit_y)) * height

        # In pixels from the centre, input to output: rotation @ shear along y @ shear along x, zoomed and moved.
        a = (angle - shear_y).cos() / shear_y.cos()
        c = (angle - shear_y).sin() / shear_y.cos()
        b = -a * shear_x.tan() - angle.sin()
        d = -c * shear_x.tan() + angle.cos()
        to_unit = torch.stack(
            [
                torch.stack([zoom * a, zoom * b * (height / width), move_x * (2 / width)], dim=1),
                torch.stack([zoom * c * (width / height), zoom * d, move_y * (2 / height)], dim=1),
            ],
            dim=1,
        )
        return _move(SpatialTransform(to_unit).inverse(), device)


@dataclass(frozen=True)
class RandomFlip:
    """Draw a horizontal and a vertical flip of each image, independently.

    They are for images without an up and down, such as those of satellites, tissue and cells. Heatmaps are flipped
    bit for bit, and images up to rounding: see :class:`SpatialTransform`.

    Args:
        horizontal: probability that left and right are exchanged.
        vertical: probability that top and bottom are.

    Example:
        >>> RandomFlip(horizontal=0.0, vertical=1.0).sample(1, (2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[3., 4.],
                 [1., 2.]]])
    """

    horizontal: float = 0.5
    vertical: float = 0.5

    def __post_init__(self) -> None:
        check_probability("horizontal", self.horizontal)
        check_probability("vertical", self.vertical)

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`."""
        check_size("image_size", image_size)
        flips = [_uniform(0, 1, (batch_size,), device, generator) < p for p in (self.horizontal, self.vertical)]
        signs = torch.stack([1 - 2 * flip.float() for flip in flips], dim=1)
        return _move(SpatialTransform(F.pad(torch.diag_embed(signs), (0, 1))), device)


@dataclass(frozen=True)
class RandomQuarterTurn:
    """Draw a rotation of each image by 90, 180 or 270 degrees, each equally likely.

    It is for square images without an up and down. Square heatmaps are turned bit for bit, and images up to rounding:
    see :class:`SpatialTransform`. Composed with :class:`RandomFlip` it reaches all eight positions of a square, each
    equally likely with the defaults.

    Args:
        p: probability of a turn; with 3/4 an upright image is as likely as each of the three turned ones.

    Example:
        >>> tile = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> turned = RandomQuarterTurn(p=1.0).sample(1, (2, 2))(tile)
        >>> [torch.equal(turned, tile.rot90(quarters, dims=(1, 2))) for quarters in range(4)].count(True)
        1
    """

    p: float = 0.75

    def __post_init__(self) -> None:
        check_probability("p", self.p)

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`.

        Raises:
            ValueError: the images are not square, so that a turn would stretch them.
        """
        height, width = check_size("image_size", image_size)
        if height != width:
            raise ValueError(
                "`image_size` must be square for a RandomQuarterTurn, which would stretch other images; got "
                f"{describe(image_size)}. Crop squares first, or pass RandomAffine(degrees=180), which keeps the "
                "proportions."
            )
        turned = _uniform(0, 1, (batch_size,), device, generator) < self.p
        quarters = _uniform(1, 4, (batch_size,), device, generator).floor() * turned
        angle = quarters * (math.pi / 2)
        cos, sin = angle.cos().round(), angle.sin().round()  # exactly -1, 0 or 1
        zero = torch.zeros_like(angle)
        rows = [torch.stack([cos, -sin, zero], dim=1), torch.stack([sin, cos, zero], dim=1)]
        return _move(SpatialTransform(torch.stack(rows, dim=1)), device)


@dataclass(frozen=True)
class Compose:
    """Draw from several samplers, and apply what the first one drew first.

    The order is that of :class:`torchvision.transforms.Compose`. The maps are composed before anything is resampled, so
    that an image is interpolated once. Where a later map looks beyond the box that an earlier one cut out, it sees the
    image around that box, and not the box's border.

    Args:
        samplers: at least one. Each draws for images of the size that ``sample`` is given, as views are as large.

    Example:
        >>> transform = Compose([RandomAffine(degrees=10), RandomFlip()])
        >>> transform.sample(8, (64, 64)).theta.shape
        torch.Size([8, 2, 3])
    """

    samplers: Sequence[TransformSampler]

    def __post_init__(self) -> None:
        if not isinstance(self.samplers, (tuple, list)) or not self.samplers:
            raise ValueError(f"`samplers` must be a list of at least one sampler; got {describe(self.samplers)}.")
        for position, sampler in enumerate(self.samplers):
            check_sampler(f"samplers[{position}]", sampler)
        object.__setattr__(self, "samplers", tuple(self.samplers))  # as frozen as what is in it

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`."""
        first, *others = self.samplers
        composed = first.sample(batch_size, image_size, device=device, generator=generator)
        for sampler in others:
            composed = sampler.sample(batch_size, image_size, device=device, generator=generator) @ composed
        return composed


def _symmetric_range(name: str, value: object) -> tuple[float, float]:
    if is_number(value):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative when it is one number; got {describe(value)}.")
        return -float(value), float(value)
    return check_range(name, value)
