"""What draws the transforms: an independent map for each image, and the whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_probability, check_range, check_sampler, check_size, describe, is_number
from cgc_reg.transforms import SpatialTransform, by_side


class TransformSampler(Protocol):
    """What draws transforms: anything with this ``sample`` can be a regularizer's ``transform``."""

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, ...],
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

    In a volume, whose axes may differ in what a pixel is, and in a signal, a box has the proportions of the whole,
    stretched along each axis by a factor of its own; these are drawn in ``ratio``, divided by their geometric mean, and
    brought nearer to 1 where the box would not fit. Boxes are of whole pixels, so that along an axis of two or three
    the share is a rough one.

    Args:
        scale: (minimum, maximum) of the box's area, as a share of the image's; of its volume, or of its length.
        ratio: (minimum, maximum) of the box's width / height, drawn uniformly in its logarithm.
        flip_p: probability of a flip along the last axis, which is the horizontal one of images; or one for each axis,
            the last one last.

    Example:
        >>> transform = RandomResizedCropFlip().sample(32, (224, 224))
        >>> transform(torch.rand(32, 3, 224, 224)).shape, transform(torch.rand(32, 7, 7)).shape
        (torch.Size([32, 3, 224, 224]), torch.Size([32, 7, 7]))
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, 1)
        if self.scale[1] == 0:
            raise ValueError(f"`scale` must allow boxes larger than nothing; got {describe(self.scale)}.")
        check_range("ratio", self.ratio, 0)
        if self.ratio[0] == 0:
            raise ValueError(f"`ratio` must be two positive numbers; got {describe(self.ratio)}.")
        for chance in self._flip_chances():
            check_probability("flip_p", chance)

    def _flip_chances(self) -> Sequence[float]:
        """Return those of the last axis, or of each."""
        return self.flip_p if isinstance(self.flip_p, (tuple, list)) else (self.flip_p,)

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image.

        Args:
            batch_size: n, the number of maps.
            image_size: (H, W) of the images that the transform will be applied to, in pixels; (D, H, W) of volumes,
                (L,) of signals.
            device: where the transform is wanted; drawn there, unless the generator lives elsewhere.
            generator: source of randomness; torch's global one if None.
        """
        start, size = self.sample_boxes(batch_size, image_size, device=device, generator=generator)
        dims, chances = start.shape[1], self._flip_chances()
        if len(chances) != dims and not is_number(self.flip_p):
            raise ValueError(
                f"`flip_p` must be a number, or one for each of the {dims} axes; got {describe(self.flip_p)}."
            )
        flips = by_side(torch.lt, _uniform(0, 1, (batch_size, len(chances)), device, generator), chances)
        flips = F.pad(flips, (dims - len(chances), 0))
        return _move(SpatialTransform.from_crop(start, size, flips, image_size=image_size), device)

    def sample_boxes(
        self,
        batch_size: int,
        image_size: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw the boxes alone: start and size of :meth:`SpatialTransform.from_crop`, (n, d), whole numbers of pixels.

        The arguments are those of :meth:`sample`; the boxes, float32, stay on the device that they are drawn on.
        """
        sides = check_size("image_size", image_size, dims=None)
        draw = partial(_uniform, device=device, generator=generator)
        extents, fits = (
            self._rectangles(batch_size, sides, draw) if len(sides) == 2 else self._boxes(batch_size, sides, draw)
        )
        starts = []
        for extent, side in zip(extents, sides, strict=True):
            room = side - extent
            start = torch.minimum((draw(0, 1, (batch_size,)) * (room + 1)).floor(), room)
            starts.append(start.where(fits, (room / 2).floor()))
        return torch.stack(starts, dim=1), torch.stack(extents, dim=1)

    def _rectangles(self, n: int, sides: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[list[Tensor], Tensor]:
        """Draw heights and widths; tell which of them are drawn, and not the largest box in place of one that fits."""
        area = draw(*self.scale, (n, 10)) * math.prod(sides)
        ratio = draw(math.log(self.ratio[0]), math.log(self.ratio[1]), (n, 10)).exp()
        tries = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        inside = [(extent >= 1) & (extent <= side) for extent, side in zip(tries, sides, strict=True)]
        fits = torch.logical_and(*inside)
        first = fits.int().argmax(dim=1, keepdim=True)  # of equals, argmax takes the first
        *extents, fits = (value.gather(1, first)[:, 0] for value in (*tries, fits))
        largest = self._largest(sides)
        return [extent.masked_fill(~fits, most) for extent, most in zip(extents, largest, strict=True)], fits

    def _boxes(self, n: int, sides: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[list[Tensor], Tensor]:
        """Draw the extents of volumes and signals, which all fit: a large box has little room to be stretched in."""
        share = draw(*self.scale, (n, 1))
        stretch = draw(math.log(self.ratio[0]), math.log(self.ratio[1]), (n, len(sides)))
        stretch = stretch - stretch.mean(dim=1, keepdim=True)
        most = stretch.amax(dim=1, keepdim=True).clamp(min=torch.finfo(stretch.dtype).tiny)
        stretch = stretch * (-share.log() / len(sides) / most).clamp(max=1)
        factors = (share.pow(1 / len(sides)) * stretch.exp()).unbind(dim=1)
        extents = [(factor * side).round().clamp(1, side) for factor, side in zip(factors, sides, strict=True)]
        return extents, torch.ones_like(extents[0], dtype=torch.bool)

    def _largest(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Return the largest height and width of an allowed ratio."""
        height, width = sides
        if width / height < self.ratio[0]:
            return max(1, round(width / self.ratio[0])), width
        if width / height > self.ratio[1]:
            return height, max(1, round(height * self.ratio[1]))
        return sides


@dataclass(frozen=True)
class RandomAffine:
    """Draw a rotation, translation, zoom and shear of each image about its centre.

    The arguments mean what they mean in :class:`torchvision.transforms.RandomAffine`; translations are not rounded
    to whole pixels. A rotation is one in pixels, also when the image is not square. A volume is rotated about x, then
    y, then z, the lines through its centre along its last, its middle and its first axis; a signal has no rotation.

    Args:
        degrees: (minimum, maximum) of the clockwise angle in degrees; a number d stands for (-d, d), and 0 for none. In
            volumes that of each angle, or three such ranges, about x, y and z.
        translate: largest horizontal and vertical shift, as shares of the image's width and height; in volumes a third
            one, of the depth, and in signals one.
        scale: (minimum, maximum) of the zoom; above 1 enlarges.
        shear: in degrees, of images; a number s stands for (-s, s) along x, two numbers for a range along x, four for
            ranges along x and y.
        spacing: what a pixel measures along each axis, (D, H, W) of volumes, in any unit, so that a rotation is one in
            space instead of one in pixels; as much along each if None.

    Example:
        >>> RandomAffine(degrees=15, translate=(0.1, 0.1)).sample(8, (224, 160)).theta.shape
        torch.Size([8, 2, 3])
        >>> RandomAffine(degrees=15, spacing=(5.0, 0.7, 0.7)).sample(8, (32, 224, 224)).theta.shape
        torch.Size([8, 3, 4])
    """

    degrees: float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    translate: tuple[float, ...] | None = None
    scale: tuple[float, float] | None = None
    shear: float | tuple[float, float] | tuple[float, float, float, float] | None = None
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self._degrees()
        self._shear()
        if self.translate is not None and not _are_numbers(self.translate, lambda v: 0 <= v <= 1):
            raise ValueError(
                "`translate` must be shares from 0 to 1, two for images (of the width, of the height), three for "
                f"volumes, one for signals; got {describe(self.translate)}."
            )
        if self.scale is not None and check_range("scale", self.scale, 0)[0] == 0:
            raise ValueError(f"`scale` must be two positive numbers; got {describe(self.scale)}.")
        if self.spacing is not None and not _are_numbers(self.spacing, lambda v: v > 0):
            raise ValueError(
                f"`spacing` must be a positive number for each axis, or None; got {describe(self.spacing)}."
            )

    def _degrees(self) -> list[tuple[float, float]]:
        """Return the range of the angle, or of each of the three."""
        degrees = self.degrees
        if isinstance(degrees, (tuple, list)) and len(degrees) == 3 and not any(map(is_number, degrees)):
            return [check_range("degrees", limits) for limits in degrees]
        if isinstance(degrees, (tuple, list)) and (len(degrees) != 2 or not all(map(is_number, degrees))):
            raise ValueError(
                "`degrees` must be a number, two numbers (minimum, maximum), or three such pairs for the angles of "
                f"volumes; got {describe(degrees)}."
            )
        return [_symmetric_range("degrees", degrees)]

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
        image_size: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`.

        Raises:
            ValueError: an option does not go with so many dimensions.
        """
        sides = check_size("image_size", image_size, dims=None)
        dims = len(sides)
        self._check_dims(dims)

        def draw(limits: tuple[float, float]) -> Tensor:
            return _uniform(*limits, (batch_size,), device, generator)

        # In space, from the centre, input to output, with the coordinates x, y, z; then zoomed and moved.
        linear = self._linear(dims, draw)
        zoom = draw(self.scale or (1.0, 1.0))
        moves = [draw((-limit, limit)) for limit in self.translate or [0.0] * dims]
        extents = [side * unit for side, unit in zip(sides, self.spacing or [1.0] * dims, strict=True)][::-1]
        rows = []
        for row, move, side, extent in zip(linear, moves, reversed(sides), extents, strict=True):
            turned = [zoom * value * (other / extent) for value, other in zip(row, extents, strict=True)]
            rows.append(torch.stack([*turned, move * side * (2 / side)], dim=1))
        return _move(SpatialTransform(torch.stack(rows, dim=1)).inverse(), device)

    def _linear(self, dims: int, draw: Callable[[tuple[float, float]], Tensor]) -> list[list[Tensor]]:
        """Draw the rotation and the shear: the rows of a matrix, (n,) each entry."""
        if dims == 1:
            return [[draw((1.0, 1.0))]]
        if dims == 2:  # rotation @ shear along y @ shear along x
            (angle,) = (draw(limits).deg2rad() for limits in self._degrees())
            shear_x, shear_y = (draw(limits).deg2rad() for limits in self._shear())
            a = (angle - shear_y).cos() / shear_y.cos()
            c = (angle - shear_y).sin() / shear_y.cos()
            return [[a, -a * shear_x.tan() - angle.sin()], [c, -c * shear_x.tan() + angle.cos()]]
        ranges = self._degrees()
        angles = [draw(limits).deg2rad() for limits in (ranges if len(ranges) == 3 else ranges * 3)]
        (cos_x, cos_y, cos_z), (sin_x, sin_y, sin_z) = ([a.cos() for a in angles], [a.sin() for a in angles])
        return [  # about z @ about y @ about x
            [cos_z * cos_y, cos_z * sin_y * sin_x - sin_z * cos_x, cos_z * sin_y * cos_x + sin_z * sin_x],
            [sin_z * cos_y, sin_z * sin_y * sin_x + cos_z * cos_x, sin_z * sin_y * cos_x - cos_z * sin_x],
            [-sin_y, cos_y * sin_x, cos_y * cos_x],
        ]

    def _check_dims(self, dims: int) -> None:
        for name, value in (("translate", self.translate), ("spacing", self.spacing)):
            if value is not None and len(value) != dims:
                raise ValueError(f"`{name}` must be as long as `image_size`, {dims}; got {describe(value)}.")
        if dims != 3 and len(self._degrees()) == 3:
            raise ValueError(f"`degrees` must be one range, but for volumes; got {describe(self.degrees)}.")
        if dims == 1 and self._degrees() != [(0.0, 0.0)]:
            raise ValueError(f"`degrees` must be 0 for signals, which have no rotation; got {describe(self.degrees)}.")
        if dims != 2 and self.shear is not None:
            raise ValueError(f"`shear` must be None, but for images; got {describe(self.shear)}.")


@dataclass(frozen=True)
class RandomFlip:
    """Draw a horizontal and a vertical flip of each image, independently, and one in depth of each volume.

    They are for images without an up and down, such as those of satellites, tissue and cells. Heatmaps are flipped
    bit for bit, and images up to rounding: see :class:`SpatialTransform`.

    Args:
        horizontal: probability that left and right are exchanged, along the last axis. A signal's only one is time, so
            that its heatmaps must not care for the direction: mostly not what is wanted.
        vertical: probability that top and bottom are, along the axis before that.
        depth: probability that front and back are, along the first axis of a volume; in a clip that is time.

    Example:
        >>> RandomFlip(horizontal=0.0, vertical=1.0).sample(1, (2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[3., 4.],
                 [1., 2.]]])
    """

    horizontal: float = 0.5
    vertical: float = 0.5
    depth: float = 0.5

    def __post_init__(self) -> None:
        check_probability("horizontal", self.horizontal)
        check_probability("vertical", self.vertical)
        check_probability("depth", self.depth)

    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`."""
        dims = len(check_size("image_size", image_size, dims=None))
        chances = (self.horizontal, self.vertical, self.depth)[:dims]
        flips = [_uniform(0, 1, (batch_size,), device, generator) < chance for chance in chances]
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
        image_size: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> SpatialTransform:
        """Draw one map for each image; the arguments are those of :meth:`RandomResizedCropFlip.sample`.

        Raises:
            ValueError: the images are not square, so that a turn would stretch them, or they are volumes or signals.
        """
        sides = check_size("image_size", image_size, dims=None)
        if len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(
                "`image_size` must be that of square images for a RandomQuarterTurn, which would stretch others; got "
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
        image_size: tuple[int, ...],
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


def _are_numbers(value: object, hold: Callable[[float], bool]) -> bool:
    return isinstance(value, (tuple, list)) and 1 <= len(value) <= 3 and all(is_number(v) and hold(v) for v in value)


def _symmetric_range(name: str, value: object) -> tuple[float, float]:
    if is_number(value):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative when it is one number; got {describe(value)}.")
        return -float(value), float(value)
    return check_range(name, value)
