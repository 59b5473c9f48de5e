"""Spatial transforms that are drawn once and applied at any resolution, each image of a batch its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import AXES, check_size, describe
from cgc_reg._precision import at_least_float32, without_autocast


@dataclass(frozen=True, eq=False)
class SpatialTransform:
    r"""A batch of invertible affine maps of space, one for each image, volume or signal.

    The output at position u is the input at position

    .. math:: A_i u + b_i, \qquad \theta_i = [A_i \mid b_i],

    with coordinates (x), (x, y) or (x, y, z), that of the last axis first, in [-1, 1] from the outer edge of the first
    pixel to the outer edge of the last one (``align_corners=False``), so one theta serves a 224 x 224 image and its
    7 x 7 heatmap. Values are interpolated linearly along each axis, without antialiasing; a position outside the input
    takes the value at the border.

    Flips, and quarter turns of squares, move the pixels of heatmaps bit for bit. Those of images they move up to the
    rounding of a position, which is none where the sides are powers of two.

    Maps in pixels, as other libraries have them, come in by :meth:`from_matrix` and go out by :meth:`matrix`.

    Args:
        theta: (n, d, d + 1), float32 or float64, from output to input coordinates as in
            :func:`torch.nn.functional.affine_grid`; d is 1 for signals, 2 for images, 3 for volumes and clips.

    Example:
        >>> mirror = SpatialTransform(torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
        >>> mirror(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[3., 2., 1.]]])
        >>> backwards = SpatialTransform(torch.tensor([[[-1.0, 0.0]]]))
        >>> backwards(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[3., 2., 1.]])
    """

    theta: Tensor

    def __post_init__(self) -> None:
        theta = self.theta
        if not isinstance(theta, Tensor) or theta.ndim != 3 or theta.shape[1:] not in ((1, 2), (2, 3), (3, 4)):
            raise ValueError(
                "`theta` must be a tensor of shape (n, d, d + 1), with d = 1 for signals, 2 for images, 3 for volumes; "
                f"got {describe(theta)}."
            )
        if theta.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"`theta` must be float32 or float64; got {describe(theta)}. Convert with `.float()`.")

    @property
    def dims(self) -> int:
        """The number of spatial dimensions, d."""
        return self.theta.shape[1]

    @classmethod
    def identity(cls, n: int, *, dims: int = 2, device: torch.device | str | None = None) -> SpatialTransform:
        """Return n maps of so many spatial dimensions that change nothing."""
        return cls(torch.eye(dims, dims + 1, device=device, dtype=torch.float32).repeat(n, 1, 1))

    @classmethod
    def from_crop(
        cls, start: Tensor, size: Tensor, flip: Tensor | None = None, *, image_size: Sequence[int]
    ) -> SpatialTransform:
        """Cut a box out of each image, stretch it over the whole output, then mirror it where asked.

        Args:
            start: (n, d), where the box begins along each axis, in pixels of the image that the transform is applied
                to: (top, left) in an image.
            size: (n, d), its extent along each axis, in pixels: (height, width).
            flip: (n, d), bool: along which axes it is mirrored; along none if None.
            image_size: (H, W) of that image, in pixels; (D, H, W) of a volume, (L,) of a signal.

        Raises:
            ValueError: an argument is not as described.

        Example:
            >>> top_left, size = torch.tensor([[0, 0]]), torch.tensor([[2, 2]])
            >>> left_half = SpatialTransform.from_crop(top_left, size, image_size=(2, 4))
            >>> left_half(torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]), size=(2, 2))
            tensor([[[1., 2.],
                     [5., 6.]]])
        """
        sides = check_size("image_size", image_size, dims=None)
        for name, value in (("start", start), ("size", size)):
            if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != len(sides):
                raise ValueError(
                    f"`{name}` must be a tensor of shape (n, {len(sides)}), for an `image_size` of {tuple(sides)}; "
                    f"got {describe(value)}."
                )
        if size.shape != start.shape:
            raise ValueError(f"`size` must be as long as `start`, {len(start)}; got {describe(size)}.")
        if flip is None:
            flip = torch.zeros_like(start, dtype=torch.bool)
        if not isinstance(flip, Tensor) or flip.shape != start.shape or flip.dtype != torch.bool:
            raise ValueError(
                f"`flip` must be a bool tensor of shape {tuple(start.shape)}, or None; got {describe(flip)}."
            )
        start, size = at_least_float32(start), at_least_float32(size)
        scale = by_side(torch.div, size, sides)
        scale = torch.where(flip, -scale, scale)
        shift = by_side(torch.div, 2 * start + size, sides) - 1
        return cls(torch.cat([torch.diag_embed(scale.flip(1)), shift.flip(1)[:, :, None]], dim=2))

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, image_size: Sequence[int], output_size: Sequence[int] | None = None
    ) -> SpatialTransform:
        r"""Take maps in pixels, from the input to the output, as libraries for augmentation have them.

        The input at position p is the output at position

        .. math:: p' = M_i p, \qquad p = (x, y, 1)^T,

        with x to the right, y down, and (0, 0) at the centre of the first pixel. Such are the ``transform_matrix`` of
        kornia's augmentations (in three dimensions with ``align_corners=True``), the matrix of OpenCV's ``warpAffine``
        (without ``WARP_INVERSE_MAP``), and the ``params`` of scikit-image's ``AffineTransform``, whose ``inverse`` its
        ``warp`` takes. In volumes p is (x, y, z, 1).

        Args:
            matrix: (n, d, d + 1), or (n, d + 1, d + 1) with (0, ..., 0, 1) as the last row; computed in at least
                float32.
            image_size: (H, W) of the input, in pixels; (D, H, W) of a volume, (L,) of a signal.
            output_size: that of the output; that of the input if None.

        Raises:
            ValueError: ``matrix`` has another shape. On the CPU also: a map cannot be inverted, or its last row is that
                of a perspective by more than rounding. On a GPU the values are not looked at.
            TypeError: ``matrix`` is not floating point.

        Example:
            >>> one_to_the_right = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
            >>> transform = SpatialTransform.from_matrix(one_to_the_right, image_size=(1, 4))
            >>> transform(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
            tensor([[[1., 1., 2., 3.]]])
        """
        size = check_size("image_size", image_size, dims=None)
        output = size if output_size is None else check_size("output_size", output_size, dims=len(size))
        _check_matrix(matrix, size)
        *linear, shift = at_least_float32(matrix)[:, : len(size)].unbind(dim=2)
        inputs, outputs = size[::-1], output[::-1]  # as coordinates go
        for column, n in zip(linear, inputs, strict=True):
            shift = shift + column * ((n - 1) / 2)
        # Now from centre to centre: the coordinates are these pixels, in halves of a side.
        shift = by_side(torch.mul, by_side(torch.sub, shift, [(m - 1) / 2 for m in outputs]), [2 / m for m in outputs])
        linear = [
            by_side(torch.mul, column, [n / m for m in outputs]) for column, n in zip(linear, inputs, strict=True)
        ]
        return cls(torch.stack([*linear, shift], dim=2)).inverse()

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
        linear, shift = self.theta.tensor_split([self.dims], dim=2)
        adjugate = _adjugate(linear)
        linear = adjugate / _determinant(linear, adjugate).view(-1, 1, 1)
        return SpatialTransform(torch.cat([linear, -(linear * shift.mT).sum(dim=2, keepdim=True)], dim=2))

    def matrix(self, image_size: Sequence[int], output_size: Sequence[int] | None = None) -> Tensor:
        """Return the maps in pixels, from the input to the output: the inverse of :meth:`from_matrix`.

        Args:
            image_size: (H, W) of the input, in pixels; (D, H, W) of a volume, (L,) of a signal.
            output_size: that of the output; that of the input if None.

        Returns:
            (n, d + 1, d + 1), of theta's type.

        Example:
            >>> transform = RandomAffine(degrees=10).sample(8, (64, 48))
            >>> matrix = transform.matrix(image_size=(64, 48))
            >>> torch.allclose(SpatialTransform.from_matrix(matrix, (64, 48)).theta, transform.theta, atol=1e-5)
            True
        """
        size = check_size("image_size", image_size, dims=self.dims)
        output = size if output_size is None else check_size("output_size", output_size, dims=self.dims)
        *linear, shift = self.inverse().theta.unbind(dim=2)
        inputs, outputs = size[::-1], output[::-1]  # as coordinates go
        linear = [
            by_side(torch.mul, column, [m / n for m in outputs]) for column, n in zip(linear, inputs, strict=True)
        ]
        shift = by_side(torch.mul, shift, [m / 2 for m in outputs])
        for column, n in zip(linear, inputs, strict=True):
            shift = shift - column * ((n - 1) / 2)
        shift = by_side(torch.add, shift, [(m - 1) / 2 for m in outputs])
        result = F.pad(torch.stack([*linear, shift], dim=2), (0, 0, 0, 1))
        result[:, -1, -1] = 1
        return result

    def __matmul__(self, other: SpatialTransform) -> SpatialTransform:
        """Compose: ``(t @ u)(x)`` is ``t(u(x))``, with one resampling instead of two."""
        if not isinstance(other, SpatialTransform):
            return NotImplemented
        if self.theta.shape != other.theta.shape:
            raise ValueError(
                "`t @ u` must be of one batch size and as many dimensions; got thetas of shapes "
                f"{tuple(self.theta.shape)} and {tuple(other.theta.shape)}."
            )
        # Sums of products, not a matrix product: TF32 or autocast would round that to three digits.
        linear = (other.theta[:, :, :-1, None] * self.theta[:, None, :, :]).sum(dim=2)
        shift = F.pad(other.theta[:, :, -1:], (self.dims, 0))
        return SpatialTransform(linear + shift)

    def __call__(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Transform images or heatmaps.

        Args:
            x: images (n, c, h, w) or heatmaps (n, h, w), floating point; computed in at least float32. Volumes are
                (n, c, d, h, w) and theirs (n, d, h, w), signals (n, c, length) and (n, length).
            size: (height, width) of the result, or what a volume or a signal has instead; that of x if None.

        Returns:
            A tensor with x's type, number of dimensions and memory format.
        """
        dims = self.dims
        if not isinstance(x, Tensor) or x.ndim not in (dims + 1, dims + 2):
            raise ValueError(
                f"`x` must be images (n, c, {AXES[dims]}) or heatmaps (n, {AXES[dims]}), for thetas of shape "
                f"(n, {dims}, {dims + 1}); got {describe(x)}."
            )
        if not x.is_floating_point():
            raise TypeError(f"`x` must be floating point; got {describe(x)}. Convert with `.float()`.")
        if len(x) != len(self):
            raise ValueError(f"`x` must hold one image for each of the {len(self)} maps; got {describe(x)}.")
        size = tuple(x.shape[-dims:]) if size is None else check_size("size", size, dims=dims)
        # grid_sample is the fastest for images, but its CUDA backward does not repeat bit for bit, and its
        # normalised grid cannot hit a pixel's centre exactly: heatmaps, which are small, go another way. It also
        # refuses an empty batch.
        repeatable = x.requires_grad and torch.are_deterministic_algorithms_enabled()
        with without_autocast(x):
            wide = at_least_float32(x)
            if x.ndim == dims + 1:
                return _gather_linear(wide.unsqueeze(1), self.theta, size).squeeze(1).to(x.dtype)
            resample = _gather_linear if repeatable or len(x) == 0 else _grid_sample
            result = resample(wide, self.theta, size)
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
        if channels_last is not None and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
            return result.to(x.dtype, memory_format=channels_last)
        return result.to(x.dtype)

    def coverage(self, size: Sequence[int]) -> Tensor:
        """Mark the output pixels that show something of the input.

        Returns:
            (n, height, width), or what a volume or a signal has instead: 1 where the output pixel's centre falls inside
            the input and 0 elsewhere.
        """
        size = check_size("size", size, dims=self.dims)
        # On a grid of two pixels a side, the input reaches from -0.5 to 1.5.
        inside = [(p - 0.5).abs() <= 1 for p in _source_pixels(self.theta, [2] * self.dims, size)]
        return reduce(torch.logical_and, inside).to(self.theta.dtype)


def by_side(operation: Callable[..., Tensor], x: Tensor, sides: Sequence[float]) -> Tensor:
    """Change each column of (n, d) by a number of its own, where a tensor of numbers would make a GPU wait."""
    if len(set(sides)) == 1:
        return operation(x, sides[0])
    return torch.stack([operation(column, side) for column, side in zip(x.unbind(dim=1), sides, strict=True)], dim=1)


def _adjugate(linear: Tensor) -> Tensor:
    """Return what a matrix (n, d, d) times it is its determinant, d = 1, 2 or 3."""
    rows = linear.unbind(dim=1)
    if len(rows) == 1:
        return torch.ones_like(linear)
    if len(rows) == 2:
        (a, b), (c, d) = (row.unbind(dim=1) for row in rows)
        return torch.stack([torch.stack([d, -b], dim=1), torch.stack([-c, a], dim=1)], dim=1)
    first, second, third = rows
    columns = [torch.linalg.cross(*pair) for pair in ((second, third), (third, first), (first, second))]
    return torch.stack(columns, dim=2)


def _determinant(linear: Tensor, adjugate: Tensor) -> Tensor:
    return (linear[:, 0] * adjugate[:, :, 0]).sum(dim=1)


def _check_matrix(matrix: Tensor, size: Sequence[int]) -> None:
    dims = len(size)
    shapes = (dims, dims + 1), (dims + 1, dims + 1)
    if not isinstance(matrix, Tensor) or matrix.ndim != 3 or matrix.shape[1:] not in shapes:
        short, square = (f"(n, {rows}, {columns})" for rows, columns in shapes)
        raise ValueError(
            f"`matrix` must be a tensor of shape {short} or {square}, for an `image_size` of {tuple(size)}; got "
            f"{describe(matrix)}. Make one of a single matrix by `torch.as_tensor(matrix)[None]`."
        )
    if not matrix.is_floating_point():
        raise TypeError(f"`matrix` must be floating point; got {describe(matrix)}. Convert with `.float()`.")
    if matrix.device.type != "cpu":  # reading it on a GPU would make that wait
        return
    wide = at_least_float32(matrix)
    if not wide.isfinite().all():
        broken = ~wide.flatten(1).isfinite().all(dim=1)
        raise ValueError(f"`matrix` must hold finite numbers; got {wide[broken][0].tolist()}.")
    linear = wide[:, :dims, :dims]
    largest = linear.norm(dim=2).prod(dim=1)  # of all determinants of rows so long: Hadamard's inequality
    singular = _determinant(linear, _adjugate(linear)).abs() <= 4 * torch.finfo(wide.dtype).eps * largest
    if singular.any():
        raise ValueError(
            f"`matrix` must hold maps that can be inverted; got the linear part {linear[singular][0].tolist()}."
        )
    if wide.shape[1] > dims:
        *skew, one = wide[:, dims].unbind(dim=1)
        # What solves for a matrix leaves roundings here. 1e-4 moves a pixel by at most a fiftieth, on 200 of them.
        moved = [value.abs() * side for value, side in zip(skew, reversed(size), strict=True)]
        perspective = torch.stack([*moved, (one - 1).abs()]).sum(dim=0) > 1e-4
        if perspective.any():
            row = ", ".join(["0"] * dims + ["1"])
            raise ValueError(
                f"`matrix` must have ({row}) as its last row, since a perspective is no affine map; got "
                f"{wide[perspective][0, dims].tolist()}."
            )


def _source_pixels(theta: Tensor, source: Sequence[int], size: Sequence[int]) -> Iterator[Tensor]:
    """Yield the input position of every output pixel along each axis in turn, in pixels, (n, *size).

    Offsets from the centre are half-integers, so flips and the identity land on pixels exactly.
    """
    offsets = [
        torch.arange(0.5 - n / 2, n / 2, device=theta.device, dtype=theta.dtype).view(n, *[1] * later)
        for n, later in zip(size, reversed(range(len(size))), strict=True)
    ]
    rows = theta.view(*theta.shape, *[1] * len(size)).unbind(dim=1)
    for row, extent in zip(reversed(rows), source, strict=True):
        *linear, shift = row.unbind(dim=1)
        first, *others = (
            a * (extent / n) * offset for a, n, offset in zip(linear, reversed(size), reversed(offsets), strict=True)
        )
        yield sum(others, first) + (shift + 1) * (extent / 2) - 0.5


def _gather_linear(x: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate between gathered neighbours; the backward repeats bit for bit where that is asked for."""
    n, c, *source = x.shape
    flat = x.flatten(2)
    neighbours = []  # along each axis: the pixel before, the one behind, and the share of the latter
    for axis, position in enumerate(_source_pixels(theta.to(x.dtype), source, size)):
        stride, last = math.prod(source[axis + 1 :]), source[axis] - 1
        position = position.flatten(1).unsqueeze(1).clamp(0, last)
        before = position.long() * stride
        neighbours.append((before, (before + stride).clamp(max=last * stride), position.frac()))
    return _between(flat, neighbours).view(n, c, *size)


def _between(flat: Tensor, neighbours: Sequence[tuple[Tensor, Tensor, Tensor]], *chosen: Tensor) -> Tensor:
    """Interpolate along the axes whose pixel is not chosen yet."""
    if len(chosen) == len(neighbours):
        return flat.gather(2, reduce(torch.add, chosen).expand(-1, flat.shape[1], -1))
    before, behind, share = neighbours[len(chosen)]
    first = _between(flat, neighbours, *chosen, before) * (1 - share)
    return first + _between(flat, neighbours, *chosen, behind) * share


def _grid_sample(x: Tensor, theta: Tensor, size: Sequence[int]) -> Tensor:
    theta = theta.to(x.dtype)
    if len(size) != 2:
        grid = _grid(theta, size)
    elif torch.compiler.is_compiling():  # which fuses this, and warns of complex numbers
        grid = F.affine_grid(theta, [len(x), 1, *size], align_corners=False)
    else:
        # A position x + iy is one complex number, and the grid a sum of two of them: it is written once, where
        # `affine_grid` multiplies matrices and takes several times as long.
        by_x, by_y, shift = torch.view_as_complex(theta.mT.contiguous())[:, :, None].unbind(dim=1)
        v, u = (torch.arange(1 - extent, extent, 2, device=x.device, dtype=x.dtype) / extent for extent in size)
        grid = torch.view_as_real((by_y * v + shift)[:, :, None] + (by_x * u)[:, None, :])
    if len(size) == 1:  # an image of one row
        x, grid = x[:, :, None], F.pad(grid, (0, 1))[:, None]
    result = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return result[:, :, 0] if len(size) == 1 else result


def _grid(theta: Tensor, size: Sequence[int]) -> Tensor:
    """Return the input position of each output pixel, in [-1, 1]: (n, *size, d). TF32 would round `affine_grid`'s."""
    n, dims, _ = theta.shape
    *linear, grid = (column.view(n, *[1] * dims, dims) for column in theta.unbind(dim=2))
    for axis, column in enumerate(reversed(linear)):
        offset = torch.arange(1 - size[axis], size[axis], 2, device=theta.device, dtype=theta.dtype) / size[axis]
        grid = grid + column * offset.view([-1 if other == axis else 1 for other in range(-1, dims + 1)])
    return grid
