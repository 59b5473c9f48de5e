"""Views made while a DataLoader's workers load images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from cgc_reg._checks import check_sampler, check_size, describe
from cgc_reg.images import as_shown, pixels
from cgc_reg.samplers import RandomResizedCropFlip, TransformSampler


class ContrastiveTransforms:
    """Turn an image of a data set into (image, view, theta), with view = T(image).

    Pass it as the ``transform`` of a data set. A DataLoader's default collation stacks the three, and
    ``SpatialTransform(theta)`` is the T of the batch.

    Args:
        image_transform: from what the data set holds to the final image, which T is relative to: resizing and cropping
            belong here, random ones too. It may return a PIL image or a tensor: (c, h, w), a volume (c, d, h, w) or a
            signal (c, length).
        transform: draws T; random resized crop and flip by default.
        value_transform: applied to the image and to the view, each alone: what changes colours and not places, such as
            ``Normalize`` or ``ColorJitter``. torchvision's take the third dimension from the end for channels: for
            volumes and signals pass a function such as ``lambda v: (v - mean) / std``.
        view_size: (H, W) of the view; as large as the image if None.

    PIL images are read as their viewer shows them, by `cgc_reg.images.as_shown`: grey ones have one channel, and all
    others three. Grey of 16 bits has 8 in ``image_transform``, and keeps all of them without one. Tensors are taken as
    they are.

    Randomness comes from torch's global generator, which a DataLoader seeds for each worker.

    Example:
        >>> image, view, theta = ContrastiveTransforms()(torch.rand(3, 64, 64))
        >>> image.shape, view.shape, theta.shape
        (torch.Size([3, 64, 64]), torch.Size([3, 64, 64]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        image_transform: Callable[[Any], Any] | None = None,
        *,
        transform: TransformSampler | None = None,
        value_transform: Callable[[Tensor], Tensor] | None = None,
        view_size: tuple[int, ...] | None = None,
    ) -> None:
        for name, function in (("image_transform", image_transform), ("value_transform", value_transform)):
            if function is not None and (not callable(function) or isinstance(function, type)):
                raise TypeError(
                    f"`{name}` must be a function of one image, such as a torchvision transform; got "
                    f"{describe(function)}. What draws T is passed as `transform`."
                )
        self.image_transform = image_transform
        self.transform = RandomResizedCropFlip() if transform is None else transform
        check_sampler("transform", self.transform)
        self.value_transform = value_transform
        self.view_size = None if view_size is None else check_size("view_size", view_size, dims=None)

    def __call__(self, image: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image (c, h, w), its view (c, H, W) and theta (2, 3), all float32; see :class:`SpatialTransform`.

        Pixels go from 0 to 1 before ``value_transform``.
        """
        if self.image_transform is not None:
            image = self.image_transform(as_shown(image) if isinstance(image, Image.Image) else image)
        if isinstance(image, Image.Image):
            image = pixels(image)
        if not isinstance(image, Tensor):
            raise TypeError(f"`image` must be a PIL image or a tensor (c, h, w); got {describe(image)}.")
        image = image.as_subclass(Tensor)
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                "`image` must be a PIL image, or a tensor (c, h, w), (c, d, h, w) of a volume or (c, length) of a "
                f"signal; got {describe(image)}."
            )
        if image.dtype in (torch.int16, torch.int32, torch.int64):
            raise TypeError(
                "`image` must hold pixels from 0 to the largest of their type, or floats from 0 to 1; got "
                f"{describe(image)}, whose range is hardly full. Convert it, such as by `image.to(torch.uint8)` or "
                "`image / 65535`."
            )
        image = TF.convert_image_dtype(image, torch.float32)
        if self.view_size is not None:
            check_size("view_size", self.view_size, dims=image.ndim - 1)
        transform = self.transform.sample(1, tuple(image.shape[1:]))
        view = transform(image[None], self.view_size)[0]
        if self.value_transform is not None:
            image, view = self._change_values(image), self._change_values(view)
        return image, view, transform.theta[0].float()

    def _change_values(self, image: Tensor) -> Tensor:
        assert self.value_transform is not None
        changed = self.value_transform(image)
        if changed.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"`value_transform` must not move pixels; got an image of {tuple(changed.shape[1:])} from one of "
                f"{tuple(image.shape[1:])}. Put resizing and cropping into `image_transform`."
            )
        return changed
