"""Spatial transforms that are drawn once and applied at any resolution, each image of a batch its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_size, describe
from cgc_reg._precision import at_least_float32, without_autocast


@dataclass(frozen=True, eq=False)
class SpatialTransform:
    r"""A batch of invertible affine maps of the plane, one for each image.

    The output at position u is the input at position

    .. math:: A_i u + b_i, \qquad \theta_i = [A_i \mid b_i],

    with coordinates (x, y) in [-1, 1] from the outer edge of the first pixel to the outer edge of the last one
    (``align_corners=False``), so one theta serves a 224 x 224 image and its 7 x 7 heatmap. Values are
    interpolated bilinearly, without antialiasing; a position outside the input takes the value at the border.

    Flips, and quarter turns of squares, move the pixels of heatmaps bit for bit. Those of images they move up to the
    rounding of a position, which is none where the sides are powers of two.

    Maps in pixels, as other libraries have them, come in by :meth:`from_matrix` and go out by :meth:`matrix`.

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

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, image_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> SpatialTransform:
        r"""Take maps in pixels, from the input to the output, as libraries for augmentation have them.

        The input at position p is the output at position

        .. math:: p' = M_i p, \qquad p = (x, y, 1)^T,

        with x to the right, y down, and (0, 0) at the centre of the first pixel. Such are the ``transform_matrix`` of
        kornia's augmentations, the matrix of OpenCV's ``warpAffine`` (without ``WARP_INVERSE_MAP``), and the ``params``
        of scikit-image's ``AffineTransform``, whose ``inverse`` its ``warp`` takes.

        Args:
            matrix: (n, 2, 3), or (n, 3, 3) with (0, 0, 1) as the last row; computed in at least float32.
            image_size: (H, W) of the input, in pixels.
            output_size: (H, W) of the output; that of the input if None.

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
        height, width = check_size("image_size", image_size)
        output_height, output_width = (height, width) if output_size is None else check_size("output_size", output_size)
        _check_matrix(matrix, height, width)
        (a, b, x), (c, d, y) = (row.unbind(dim=1) for row in at_least_float32(matrix)[:, :2].unbind(dim=1))
        x = x + a * ((width - 1) / 2) + b * ((height - 1) / 2) - (output_width - 1) / 2
        y = y + c * ((width - 1) / 2) + d * ((height - 1) / 2) - (output_height - 1) / 2
        # Now from centre to centre: the coordinates are these pixels, in halves of a side.
        rows = [
            torch.stack([a * (width / output_width), b * (height / output_width), x * (2 / output_width)], dim=1),
            torch.stack([c * (width / output_height), d * (height / output_height), y * (2 / output_height)], dim=1),
        ]
        return cls(torch.stack(rows, dim=1)).inverse()

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

    def matrix(self, image_size: tuple[int, int], output_size: tuple[int, int] | None = None) -> Tensor:
        """Return the maps in pixels, from the input to the output: the inverse of :meth:`from_matrix`.

        Args:
            image_size: (H, W) of the input, in pixels.
            output_size: (H, W) of the output; that of the input if None.

        Returns:
            (n, 3, 3), of theta's type.

        Example:
            >>> transform = RandomAffine(degrees=10).sample(8, (64, 48))
            >>> matrix = transform.matrix(image_size=(64, 48))
            >>> torch.allclose(SpatialTransform.from_matrix(matrix, (64, 48)).theta, transform.theta, atol=1e-5)
            True
        """
        height, width = check_size("image_size", image_size)
        output_height, output_width = (height, width) if output_size is None else check_size("output_size", output_size)
        (a, b, x), (c, d, y) = (row.unbind(dim=1) for row in self.inverse().theta.unbind(dim=1))
        a, b = a * (output_width / width), b * (output_width / height)
        c, d = c * (output_height / width), d * (output_height / height)
        x = x * (output_width / 2) - a * ((width - 1) / 2) - b * ((height - 1) / 2) + (output_width - 1) / 2
        y = y * (output_height / 2) - c * ((width - 1) / 2) - d * ((height - 1) / 2) + (output_height - 1) / 2
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        rows = [torch.stack(row, dim=1) for row in ((a, b, x), (c, d, y), (zero, zero, one))]
        return torch.stack(rows, dim=1)

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


def _check_matrix(matrix: Tensor, height: int, width: int) -> None:
    if not isinstance(matrix, Tensor) or matrix.ndim != 3 or matrix.shape[1:] not in ((2, 3), (3, 3)):
        raise ValueError(
            f"`matrix` must be a tensor of shape (n, 2, 3) or (n, 3, 3); got {describe(matrix)}. Make one of a single "
            "matrix by `torch.as_tensor(matrix)[None]`."
        )
    if not matrix.is_floating_point():
        raise TypeError(f"`matrix` must be floating point; got {describe(matrix)}. Convert with `.float()`.")
    if matrix.device.type != "cpu":  # reading it on a GPU would make that wait
        return
    wide = at_least_float32(matrix)
    (a, b), (c, d) = (row.unbind(dim=1) for row in wide[:, :2, :2].unbind(dim=1))
    determinant, rounding = a * d - b * c, 4 * torch.finfo(wide.dtype).eps * ((a * d).abs() + (b * c).abs())
    singular = ~(determinant.abs() > rounding)  # also where it is not a number
    if singular.any():
        linear = wide[singular][0, :2, :2]
        raise ValueError(f"`matrix` must hold maps that can be inverted; got the linear part {linear.tolist()}.")
    if wide.shape[1] == 3:
        p, q, r = wide[:, 2].unbind(dim=1)
        # What solves for a matrix leaves roundings here. 1e-4 moves a pixel by at most a fiftieth, on 200 of them.
        perspective = p.abs() * width + q.abs() * height + (r - 1).abs() > 1e-4
        if perspective.any():
            raise ValueError(
                "`matrix` must have (0, 0, 1) as its last row, since a perspective is no affine map; got "
                f"{wide[perspective][0, 2].tolist()}."
            )


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
