"""Spatial transforms that are drawn once and applied at any resolution, each image of a batch its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_range, check_size, describe, is_number
from cgc_reg._precision import at_least_float32, without_autocast


@dataclass(frozen=True, eq=False)
class SpatialTransform:
    r"""A batch of invertible affine maps of the plane, one for each image.

    The output at position u is the input at position

    .. math:: A_i u + b_i, \qquad \theta_i = [A_i \mid b_i],

    with coordinates (x, y) in [-1, 1] from the outer edge of the first pixel to the outer edge of the last one
    (``align_corners=False``), so one theta serves a 224 x 224 image and its 7 x 7 heatmap. Values are
    interpolated bilinearly, without antialiasing; a position outside the input takes the value at the border.

    Args:
        theta: (n, 2, 3), float32 or float64, from output to input coordinates as in
            :func:`torch.nn.functional.affine_grid`.

    Example:
        >>> mirror = SpatialTransform(torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
        >>> mirror(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[3., 2., 1.]]])
    """

    theta: Tensor

    def __post_init__(self) -> None:
        theta = self.theta
        if not isinstance(theta, Tensor) or theta.ndim != 3 or theta.shape[1:] != (2, 3):
            raise ValueError(f"`theta` must be a tensor of shape (n, 2, 3); got {describe(theta)}.")
        if theta.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"`theta` must be float32 or float64; got {describe(theta)}. Convert with `.float()`.")

    @classmethod
    def identity(cls, n: int, *, device: torch.device | str | None = None) -> SpatialTransform:
        """Return n maps that change nothing."""
        return cls(torch.eye(2, 3, device=device, dtype=torch.float32).repeat(n, 1, 1))

    @classmethod
    def from_crop(
        cls,
        top: Tensor,
        left: Tensor,
        height: Tensor,
        width: Tensor,
        horizontal_flip: Tensor,
        *,
        image_size: tuple[int, int],
    ) -> SpatialTransform:
        """Cut a box out of each image, stretch it over the whole output, then mirror it where asked.

        Args:
            top, left, height, width: (n,), in pixels of the image that the transform is applied to.
            horizontal_flip: (n,), bool.
            image_size: (H, W) of that image, in pixels.

        Example:
            >>> left_half = SpatialTransform.from_crop(
            ...     *torch.tensor([[0], [0], [2], [2]]), torch.tensor([False]), image_size=(2, 4)
            ... )
            >>> left_half(torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]), size=(2, 2))
            tensor([[[1., 2.],
                     [5., 6.]]])
        """
        for name, value in (("top", top), ("left", left), ("height", height), ("width", width)):
            if not isinstance(value, Tensor) or value.ndim != 1:
                raise ValueError(f"`{name}` must be a tensor of shape (n,); got {describe(value)}.")
            if value.shape != top.shape:
                raise ValueError(f"`{name}` must be as long as `top`, {len(top)}; got {describe(value)}.")
        if (
            not isinstance(horizontal_flip, Tensor)
            or horizontal_flip.shape != top.shape
            or horizontal_flip.dtype != torch.bool
        ):
            raise ValueError(
                f"`horizontal_flip` must be a bool tensor of shape ({len(top)},); got {describe(horizontal_flip)}."
            )
        image_height, image_width = check_size("image_size", image_size)
        top, left, height, width = (at_least_float32(value) for value in (top, left, height, width))
        scale_x = width / image_width
        scale_x = torch.where(horizontal_flip, -scale_x, scale_x)
        zero = torch.zeros_like(scale_x)
        return cls(
            torch.stack(
                [
                    torch.stack([scale_x, zero, (2 * left + width) / image_width - 1], dim=1),
                    torch.stack([zero, height / image_height, (2 * top + height) / image_height - 1], dim=1),
                ],
                dim=1,
            )
        )

    def __len__(self) -> int:
        return len(self.theta)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> SpatialTransform:
        """Return one map as a batch of one, or those of a slice, a list or a tensor of indices, or a mask."""
        theta = self.theta[index]
        return SpatialTransform(theta[None] if theta.ndim == 2 else theta)

    def to(self, device: torch.device | str) -> SpatialTransform:
        """Return the same maps on another device."""
        return SpatialTransform(self.theta.to(device, non_blocking=True))

    def inverse(self) -> SpatialTransform:
        r"""Return the maps that undo these: :math:`[A^{-1} \mid -A^{-1} b]`.

        On pixels this is exact for flips alone: what a crop cut away does not come back, and resampling smooths.
        """
        (a, b, x), (c, d, y) = (row.unbind(dim=1) for row in self.theta.unbind(dim=1))
        determinant = a * d - b * c
        a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
        rows = [torch.stack([a, b, -(a * x + b * y)], dim=1), torch.stack([c, d, -(c * x + d * y)], dim=1)]
        return SpatialTransform(torch.stack(rows, dim=1))

    def __matmul__(self, other: SpatialTransform) -> SpatialTransform:
        """Compose: ``(t @ u)(x)`` is ``t(u(x))``, with one resampling instead of two."""
        if not isinstance(other, SpatialTransform):
            return NotImplemented
        if len(self) != len(other):
            raise ValueError(f"`t @ u` must be of one batch size; got {len(self)} and {len(other)}.")
        # Sums of products, not a matrix product: TF32 or autocast would round that to three digits.
        linear = (other.theta[:, :, :2, None] * self.theta[:, None, :, :]).sum(dim=2)
        shift = F.pad(other.theta[:, :, 2:], (2, 0))
        return SpatialTransform(linear + shift)

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Transform images or heatmaps.

        Args:
            x: images (n, c, h, w) or heatmaps (n, h, w), floating point; computed in at least float32.
            size: (height, width) of the result; that of x if None.

        Returns:
            A tensor with x's type, number of dimensions and memory format.
        """
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            raise ValueError(f"`x` must be images (n, c, h, w) or heatmaps (n, h, w); got {describe(x)}.")
        if not x.is_floating_point():
            raise TypeError(f"`x` must be floating point; got {describe(x)}. Convert with `.float()`.")
        if len(x) != len(self):
            raise ValueError(f"`x` must hold one image for each of the {len(self)} maps; got {describe(x)}.")
        size = (x.shape[-2], x.shape[-1]) if size is None else check_size("size", size)
        # grid_sample is the fastest for images, but its CUDA backward does not repeat bit for bit, and its
        # normalised grid cannot hit a pixel's centre exactly: heatmaps, which are small, go another way. It also
        # refuses an empty batch.
        repeatable = x.requires_grad and torch.are_deterministic_algorithms_enabled()
        with without_autocast(x):
            wide = at_least_float32(x)
            if x.ndim == 3:
                return _gather_bilinear(wide[:, None], self.theta, size)[:, 0].to(x.dtype)
            resample = _gather_bilinear if repeatable or len(x) == 0 else _grid_sample
            result = resample(wide, self.theta, size)
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return result.to(x.dtype, memory_format=torch.channels_last)
        return result.to(x.dtype)

    def coverage(self, size: tuple[int, int]) -> Tensor:
        """Mark the output pixels that show something of the input.

        Returns:
            (n, height, width), 1 where the output pixel's centre falls inside the input and 0 elsewhere.
        """
        x, y = _source_pixels(self.theta, (2, 2), check_size("size", size))
        # On a grid of two pixels a side, the input reaches from -0.5 to 1.5.
        inside = ((x - 0.5).abs() <= 1) & ((y - 0.5).abs() <= 1)
        return inside.to(self.theta.dtype)


def _source_pixels(theta: Tensor, source: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the input position, in pixels, of every output pixel: x and y, each (n, height, width).

    Offsets from the centre are half-integers, so flips and the identity land on pixels exactly.
    """
    v, u = [torch.arange(n, device=theta.device, dtype=theta.dtype) + (0.5 - n / 2) for n in size]
    v, u = v[None, :, None], u[None, None, :]
    position = []
    for row, extent in ((theta[:, 0, :, None, None], source[1]), (theta[:, 1, :, None, None], source[0])):
        a, b, shift = row.unbind(dim=1)
        position.append(a * (extent / size[1]) * u + b * (extent / size[0]) * v + (shift + 1) * (extent / 2) - 0.5)
    return position[0], position[1]


def _gather_bilinear(x: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate between four gathered neighbours; the backward repeats bit for bit where that is asked for."""
    n, c, height, width = x.shape
    u, v = _source_pixels(theta.to(x.dtype), (height, width), size)
    u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
    left, top = u.floor(), v.floor()
    u, v = (u - left).flatten(1)[:, None], (v - top).flatten(1)[:, None]
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    flat = x.flatten(2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return flat.gather(2, (row * width + column).flatten(1)[:, None].expand(-1, c, -1))

    upper = at(top, left) * (1 - u) + at(top, right) * u
    lower = at(bottom, left) * (1 - u) + at(bottom, right) * u
    return (upper * (1 - v) + lower * v).view(n, c, *size)


def _grid_sample(x: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    theta = theta.to(x.dtype)
    if torch.compiler.is_compiling():  # which fuses this, and warns of complex numbers
        grid = F.affine_grid(theta, [len(x), 1, *size], align_corners=False)
    else:
        # A position x + iy is one complex number, and the grid a sum of two of them: it is written once, where
        # `affine_grid` multiplies matrices and takes several times as long.
        by_x, by_y, shift = torch.view_as_complex(theta.mT.contiguous())[:, :, None].unbind(dim=1)
        v, u = (torch.arange(1 - extent, extent, 2, device=x.device, dtype=x.dtype) / extent for extent in size)
        grid = torch.view_as_real((by_y * v + shift)[:, :, None] + (by_x * u)[:, None, :])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


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
        if not is_number(self.flip_p) or not 0 <= self.flip_p <= 1:
            raise ValueError(f"`flip_p` must be a probability from 0 to 1; got {describe(self.flip_p)}.")

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


def _symmetric_range(name: str, value: object) -> tuple[float, float]:
    if is_number(value):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative when it is one number; got {describe(value)}.")
        return -float(value), float(value)
    return check_range(name, value)
