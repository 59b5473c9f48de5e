"""Pictures of heatmaps: overlays, galleries, similarities and curves. Needs matplotlib (the ``viz`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_images, check_maps, check_pair, describe, is_number
from cgc_reg._enlarge import enlarge
from cgc_reg._peaks import highest_points
from cgc_reg.losses import unit_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cgc_reg.regularizer import CGCOutput

COLORMAP = "turbo"
GAP = 0.04  # between two images of a column, in widths of one


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo a normalization: images * std + mean, clipped to 0 to 1.

    Args:
        images: (c, H, W) or (n, c, H, W), normalized with ``mean`` and ``std``.
        mean, std: one number for each channel, as given to torchvision's ``Normalize``.

    Returns:
        The images in their shape, from 0 to 1.

    Raises:
        ValueError: ``mean`` or ``std`` has another number of channels.

    Example:
        >>> denormalize(torch.zeros(2, 3, 8, 8), mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]).unique()
        tensor([0.5000])
    """
    if images.ndim not in (3, 4) or not images.is_floating_point() or not len(mean) == len(std) == images.shape[-3]:
        raise ValueError(
            "`mean` and `std` must have one number for each channel of `images`, floating-point and of shape "
            f"(n, c, H, W) or (c, H, W); got {len(mean)} and {len(std)} for {describe(images)}."
        )
    shift, scale = (torch.as_tensor(values).to(images)[:, None, None] for values in (mean, std))
    return (images * scale + shift).clamp(0, 1)


def overlay(
    images: Tensor,
    heatmaps: Tensor,
    *,
    alpha: float = 0.5,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> Tensor:
    """Paint each heatmap over its image, in colours from blue (least) to red (its own peak).

    Args:
        images: (n, 3, H, W), from 0 to 1, or normalized with ``mean`` and ``std``.
        heatmaps: (n, h, w), at any resolution; enlarged bilinearly.
        alpha: opacity of the heatmap, from 0 to 1.
        mean, std: what the images were normalized with; by default they were not.

    Returns:
        (n, 3, H, W), from 0 to 1, on the CPU.

    Raises:
        ValueError: the images are not as many as the heatmaps or have not three channels, or ``alpha`` lies elsewhere.

    Example:
        >>> overlay(torch.rand(2, 3, 64, 64), torch.rand(2, 4, 4)).shape
        torch.Size([2, 3, 64, 64])
    """
    check_images("images", images)
    check_maps("heatmaps", heatmaps)
    if len(images) != len(heatmaps) or images.ndim != 4 or heatmaps.ndim != 3 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be (n, 3, H, W) with one image for each heatmap; got {describe(images)} and "
            f"{describe(heatmaps)}. Of volumes take `peak_slices`."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be from 0 (the image alone) to 1 (the heatmap alone); got {alpha}.")
    images = denormalize(images.detach().float().cpu(), mean, std)
    colors = _colorize(heatmaps, (images.shape[2], images.shape[3]))
    return (1 - alpha) * images + alpha * colors


def peak_slices(
    volumes: Tensor,
    heatmaps: Tensor,
    *,
    alpha: float = 0.5,
    mean: Sequence[float] = (0,),
    std: Sequence[float] = (1,),
    spacing: Sequence[float] = (1, 1, 1),
) -> dict[str, Tensor]:
    """Return the columns of a :func:`gallery` of volumes: the three slices through each heatmap's highest point.

    Args:
        volumes: (n, 1, D, H, W) or (n, 3, D, H, W), from 0 to 1, or normalized with ``mean`` and ``std``.
        heatmaps: (n, d, h, w), at any resolution; enlarged trilinearly, and painted over the slices.
        alpha: opacity of the heatmap, from 0 to 1.
        mean, std: what the volumes were normalized with, for each channel or for all; by default they were not. Of
            values from low to high, such as those of a CT's window, -low / (high - low) and 1 / (high - low).
        spacing: what a voxel measures along each axis, (D, H, W), in any unit: slices are stretched to the proportions
            that they have in space.

    Returns:
        title -> images (n, 3, height, width), on the CPU: the slice at the point's depth, at its row, at its column.

    Raises:
        ValueError: the volumes are not as many as the heatmaps or have not one or three channels, or ``mean``, ``std``
            or ``spacing`` is not as described.

    Example:
        >>> volumes, heatmaps = torch.rand(2, 1, 16, 32, 32), torch.rand(2, 2, 4, 4)
        >>> slices = peak_slices(volumes, heatmaps, spacing=(2.0, 1.0, 1.0))
        >>> [tuple(images.shape[2:]) for images in slices.values()]
        [(32, 32), (32, 32), (32, 32)]
        >>> figure = gallery(slices)
    """
    check_images("volumes", volumes)
    check_maps("heatmaps", heatmaps)
    if len(volumes) != len(heatmaps) or volumes.ndim != 5 or heatmaps.ndim != 4 or volumes.shape[1] not in (1, 3):
        raise ValueError(
            "`volumes` must be (n, 1, D, H, W) or (n, 3, D, H, W) with one volume for each heatmap (n, d, h, w); got "
            f"{describe(volumes)} and {describe(heatmaps)}."
        )
    if len(spacing) != 3 or not all(is_number(unit) and unit > 0 for unit in spacing):
        raise ValueError(f"`spacing` must be three positive numbers; got {describe(spacing)}.")
    sides = [round(side * unit / min(spacing)) for side, unit in zip(volumes.shape[2:], spacing, strict=True)]
    mean, std = (list(values) * (3 if len(values) == 1 else 1) for values in (mean, std))
    volumes = volumes.detach().float().cpu().expand(-1, 3, -1, -1, -1)
    heatmaps = heatmaps.detach().float().cpu()
    large = enlarge(heatmaps, volumes.shape[2:])
    peaks = highest_points(heatmaps, volumes.shape[2:]).long().tolist()
    columns = {}
    for axis, name in enumerate(("depth", "row", "column")):
        images = torch.stack([volume.select(axis + 1, peak[axis]) for volume, peak in zip(volumes, peaks, strict=True)])
        maps = torch.stack([one.select(axis, peak[axis]) for one, peak in zip(large, peaks, strict=True)])
        images = F.interpolate(images, sides[:axis] + sides[axis + 1 :], mode="bilinear", align_corners=False)
        columns[f"at the peak's {name}"] = overlay(images, maps, alpha=alpha, mean=mean, std=std)
    return columns


def pair_columns(
    x: Tensor,
    out: CGCOutput,
    *,
    count: int = 8,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> dict[str, Tensor]:
    """Return the columns of a :func:`gallery` of what CGC compared: images, views and their heatmaps.

    Args:
        x: the images given to :meth:`CGCRegularizer.compute`, (n, 3, H, W), from 0 to 1, or normalized.
        out: what it returned.
        count: how many images, from the first.
        mean, std: what the images were normalized with; by default they were not.

    Returns:
        title -> images (n, 3, H, W) or heatmaps (n, h, w), on the CPU; in the last two, the query and the key, what the
        loss makes alike.

    Raises:
        ValueError: ``x`` has not as many images as ``out``, or ``mean`` or ``std`` another number of channels.

    Example:
        >>> import torchvision
        >>> from cgc_reg import CGCRegularizer
        >>> x = torch.rand(4, 3, 64, 64)
        >>> out = CGCRegularizer("layer4").compute(torchvision.models.resnet18(), x)
        >>> figure = gallery(pair_columns(x, out))
    """
    check_images("x", x)
    if x.ndim != 4:
        raise ValueError(f"`x` must be images (n, 3, H, W); got {describe(x)}. Of volumes take `peak_slices`.")
    if len(x) != len(out.heatmap):
        raise ValueError(
            f"`x` must be the images that `out` was computed from; got {len(x)} images, and `out` has "
            f"{len(out.heatmap)}."
        )
    images, views, heatmap, query, key = (
        each[:count].detach().float().cpu() for each in (x, out.view, out.heatmap, out.query, out.key)
    )
    images, views = denormalize(images, mean, std), denormalize(views, mean, std)
    return {
        "x": images,
        "overlay of g(x)": overlay(images, heatmap),
        "g(x)": heatmap,
        "T(x)": views,
        "overlay of g(T(x))": overlay(views, key),
        "query T(g(x))": query,
        "key g(T(x))": key,
    }


def gallery(columns: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """Draw a picture with one row for each image and one titled column for each tensor.

    Args:
        columns: title -> images (n, 3, H, W) or grey ones (n, 1, H, W), from 0 to 1, or heatmaps (n, h, w), each scaled
            to its own peak.
        title: of the whole picture.

    Returns:
        A matplotlib figure; ``figure.savefig("gallery.png")`` writes it, with or without a display.

    Raises:
        ValueError: a tensor is neither images nor heatmaps, or they are of several lengths.

    Example:
        >>> figure = gallery({"image": torch.rand(2, 3, 32, 32), "heatmap": torch.rand(2, 4, 4)})
    """
    from matplotlib.figure import Figure

    for name, tensor in columns.items():
        if tensor.ndim != 3 and (tensor.ndim != 4 or tensor.shape[1] not in (1, 3)):
            raise ValueError(
                f"`columns` must hold images (n, 3, H, W), grey ones (n, 1, H, W) or heatmaps (n, h, w); got "
                f"{describe(tensor)} as {name!r}. Of volumes take `peak_slices`."
            )
    lengths = {len(tensor) for tensor in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"`columns` must hold tensors of one length, at least 1; got lengths {sorted(lengths)}.")
    (rows,) = lengths
    tallest = max(tensor.shape[-2] / tensor.shape[-1] for tensor in columns.values())  # in widths of a column
    size = (1.7 * len(columns) + 0.2, 1.7 * tallest * rows + (0.9 if title else 0.5))
    figure = Figure(figsize=size, layout="constrained")
    # One axis a column: most of matplotlib's time goes into axes.
    for axis, (name, tensor) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        images = _colorize(tensor, None) if tensor.ndim == 3 else tensor.detach().float().cpu().clamp(0, 1)
        if images.shape[1] == 1:  # which matplotlib would colour
            images = images.expand(-1, 3, -1, -1)
        half = images.shape[2] / images.shape[3] / 2
        for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            middle = tallest / 2 + row * (tallest + GAP)
            axis.imshow(image, interpolation="nearest", extent=(0, 1, middle + half, middle - half))
        axis.set(xlim=(0, 1), ylim=(rows * (tallest + GAP) - GAP, 0))
        axis.set_axis_off()
        axis.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def similarity_matrix(query: Tensor, key: Tensor, *, title: str | None = None) -> Figure:
    """Draw the cosine of each query with each key, sim(q_i, k_j): what info-NCE compares.

    A model that CGC has taught shows a bright diagonal, of pairs that agree, on a dark ground.

    Args:
        query: T(g(x)), (n, h, w), such as ``out.query``.
        key: g(T(x)), (n, h, w), such as ``out.key``.
        title: of the picture; default: the means of the diagonal and of the rest.

    Returns:
        A matplotlib figure, with query i in row i and key j in column j.

    Raises:
        ValueError, TypeError: query and key are not heatmaps of one shape.

    Example:
        >>> figure = similarity_matrix(torch.rand(8, 7, 7), torch.rand(8, 7, 7))
    """
    from matplotlib.figure import Figure

    check_pair(query, key)
    similarity = (unit_maps(query.detach()) @ unit_maps(key.detach()).T).float().cpu()
    if title is None:
        own = torch.eye(len(query), dtype=torch.bool)
        title = f"own pairs {similarity[own].mean():.2f}, others {similarity[~own].mean():.2f}"
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(similarity.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("key g(T(x)) of image j")
    axis.set_ylabel("query T(g(x)) of image i")
    figure.colorbar(picture, label="cosine similarity")
    return figure


def curves(history: list[dict[str, float]], panels: Mapping[str, list[str]]) -> Figure:
    """Draw logged values against the epoch.

    Args:
        history: one dictionary for each epoch, with ``"epoch"`` and the values; a missing value leaves a gap.
        panels: title of a panel -> the names of the values in it.

    Returns:
        A matplotlib figure.

    Example:
        >>> figure = curves([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5}], {"loss": ["loss"]})
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    epochs = [row["epoch"] for row in history]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(epochs, [row.get(name, float("nan")) for row in history], marker=".", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _colorize(heatmaps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Turn heatmaps (n, h, w) into colours (n, 3, H, W), each scaled by its own peak; a blank one is all least."""
    from matplotlib import colormaps

    maps = heatmaps.detach().float().cpu().relu()
    if size is not None:
        maps = enlarge(maps, size)
    peak = maps.amax(dim=(1, 2), keepdim=True)
    maps = maps / peak.masked_fill(peak == 0, 1)
    return torch.from_numpy(colormaps[COLORMAP](maps.numpy())[..., :3]).float().permute(0, 3, 1, 2)
