"""Find the layer that a person would name."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._checks import check_images, describe
from cgc_reg._precision import without_autocast_cache
from cgc_reg.model.compilation import uncompiled
from cgc_reg.model.layers import is_channels_last, without_compilers
from cgc_reg.model.settings import evaluation_mode
from cgc_reg.model.wrappers import unwrap


def suggest_target_layer(model: nn.Module, x: Tensor) -> str:
    """Name the last layer that puts out a map: the usual choice for Grad-CAM.

    The model runs once on x, in evaluation mode and without gradients. Layers without weights, such as pooling and
    dropout, do not count, nor does a convolution that serves as the head.

    Args:
        model: any image classifier.
        x: images (n, c, h, w), as large as those to come: on smaller ones the last map may shrink to a point.

    Returns:
        The dotted name, for ``CGCRegularizer(target_layer)``.

    Raises:
        ValueError: no layer puts out a map (n, c, h, w) with more than one pixel, or the model is a transformer, whose
            layers need a ``reshape_transform``.

    Example:
        >>> suggest_target_layer(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
        'layer4'
    """
    check_images("x", x)
    model = unwrap(model)
    maps: list[tuple[str, nn.Module, Tensor]] = []
    tokens: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters()):

                def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                        maps.append((name, module, output))
                    elif isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
                        tokens.append(name)

                stack.callback(module.register_forward_hook(keep).remove)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast_cache())
        stack.enter_context(uncompiled(model))
        output = model(x.clone())  # which it may change in place
    # Tokens inside a layer that puts out a map are that layer's own affair.
    tokens = [name for name in tokens if not any(name.startswith(f"{outer}.") for outer, _, _ in maps)]
    classes = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    while len(maps) > 1 and isinstance(maps[-1][1], nn.Conv2d) and maps[-1][2].shape[1] == classes:
        maps.pop()
    got = f"{type(model).__name__} for {describe(x)}"
    if len(tokens) > len(maps):
        raise ValueError(
            f"`model` must have layers that put out maps (n, c, h, w); got tokens (n, t, c) from {tokens[-1]!r} in "
            f"{got}. Name a layer, and pass `reshape_transform=TokensToMaps((h, w))`."
        )
    if not maps:
        raise ValueError(
            f"`model` must have a layer that puts out a map (n, c, h, w) with h * w > 1; got none in {got}. Pass "
            "larger images, or name a layer and a `reshape_transform`."
        )
    name, layer, last = maps[-1]
    if is_channels_last(layer, last):
        raise ValueError(
            f"`model` must have layers that put out maps (n, c, h, w); got channels last, {describe(last)}, from "
            f"{name!r} in {got}. Name a layer, and pass `reshape_transform=channels_last_to_maps`."
        )
    return without_compilers(name)
