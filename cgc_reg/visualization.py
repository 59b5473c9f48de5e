"""Pictures of heatmaps: overlays on a batch of images, and galleries. Needs matplotlib (the ``viz`` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cgc_reg._checks import check_images, check_maps, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORMAP = "turbo"


def overlay(images: Tensor, heatmaps: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Paint each heatmap over its image, in colours from blue (least) to red (its own peak).

    Args:
        images: (n, 3, H, W), from 0 to 1.
        heatmaps: (n, h, w), at any resolution; enlarged bilinearly.
        alpha: opacity of the heatmap, from 0 to 1.

    Returns:
        (n, 3, H, W), from 0 to 1, on the CPU.

    Example:
        >>> overlay(torch.rand(2, 3, 64, 64), torch.rand(2, 4, 4)).shape
        torch.Size([2, 3, 64, 64])
    """
    check_images("images", images)
    check_maps("heatmaps", heatmaps)
    if len(images) != len(heatmaps) or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be (n, 3, H, W) with one image for each heatmap; got {describe(images)} and "
            f"{describe(heatmaps)}."
        )
    images = images.detach().float().cpu()
    colors = _colorize(heatmaps, (images.shape[2], images.shape[3]))
    return ((1 - alpha) * images + alpha * colors).clamp(0, 1)


def gallery(columns: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """Draw a picture with one row for each image and one titled column for each tensor.

    Args:
        columns: title -> images (n, 3, H, W) from 0 to 1, or heatmaps (n, h, w), each scaled to its own peak.
        title: of the whole picture.

    Returns:
        A matplotlib figure; ``figure.savefig("gallery.png")`` writes it, with or without a display.

    Example:
        >>> figure = gallery({"image": torch.rand(2, 3, 32, 32), "heatmap": torch.rand(2, 4, 4)})
    """
    from matplotlib.figure import Figure

    lengths = {len(tensor) for tensor in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"`columns` must hold tensors of one length, at least 1; got lengths {sorted(lengths)}.")
    (rows,) = lengths
    figure = Figure(figsize=(1.7 * len(columns) + 0.2, 1.7 * rows + (0.9 if title else 0.5)), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, tensor) in enumerate(columns.items()):
        images = _colorize(tensor, None) if tensor.ndim == 3 else tensor.detach().float().cpu().clamp(0, 1)
        for row in range(rows):
            axes[row, column].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
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

    maps = heatmaps.detach().float().cpu().relu()[:, None]
    if size is not None:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    peak = maps.amax(dim=(1, 2, 3), keepdim=True)
    maps = maps / peak.masked_fill(peak == 0, 1)
    return torch.from_numpy(colormaps[COLORMAP](maps[:, 0].numpy())[..., :3]).float().permute(0, 3, 1, 2)
