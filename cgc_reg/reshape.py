"""Ready-made ``reshape_transform``s: layer outputs that are no maps (n, c, h, w), turned into maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cgc_reg._checks import check_size, describe


def channels_last_to_maps(output: Tensor) -> Tensor:
    """Turn (n, h, w, c), as a Swin transformer's stages put out, into (n, c, h, w); those of volumes and signals too.

    Example:
        >>> channels_last_to_maps(torch.zeros(2, 7, 7, 96)).shape
        torch.Size([2, 96, 7, 7])
    """
    if output.ndim not in (3, 4, 5):
        raise ValueError(f"`output` must be of shape (n, h, w, c); got {describe(output)}.")
    return output.movedim(-1, 1)


@dataclass(frozen=True)
class TokensToMaps:
    """Fold the tokens (n, t, c) of a vision transformer into maps (n, c, h, w).

    Where the class is read from the class token, name a layer in front of the last attention, such as torchvision's
    ``"encoder.layers.encoder_layer_11.ln_1"`` or timm's ``"blocks.11.norm1"``: behind it the other tokens have no say,
    and every heatmap is blank.

    Args:
        grid_size: (h, w) of the grid of patches: the image's size over the patch's; (d, h, w) of volumes, (length,) of
            signals.
        prefix_tokens: how many tokens, such as the class token, stand in front of the patches' and are dropped.

    Example:
        >>> TokensToMaps((14, 14))(torch.zeros(2, 197, 768)).shape
        torch.Size([2, 768, 14, 14])
    """

    grid_size: tuple[int, ...]
    prefix_tokens: int = 1

    def __post_init__(self) -> None:
        check_size("grid_size", self.grid_size, dims=None)

    def __call__(self, output: Tensor) -> Tensor:
        """Return (n, c, h, w)."""
        expected = self.prefix_tokens + math.prod(self.grid_size)
        if output.ndim != 3 or output.shape[1] != expected:
            raise ValueError(
                f"`output` must be tokens of shape (n, {expected}, c) for grid_size={self.grid_size} and "
                f"prefix_tokens={self.prefix_tokens}; got {describe(output)}."
            )
        patches = output[:, self.prefix_tokens :].transpose(1, 2)
        return patches.reshape(patches.shape[0], patches.shape[1], *self.grid_size)
