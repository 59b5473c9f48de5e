"""Find the layer that a person would name."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cgc_reg._checks import check_images, describe
from cgc_reg._precision import without_autocast_cache
from cgc_reg.model.compilation import uncompiled
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.graph import node_of, nodes
from cgc_reg.model.layers import (
    CONVOLUTIONS,
    KEEP_BLOCKS_WHOLE,
    SHAPES,
    TOKENS,
    is_channels_last,
    telling_dimensions,
    without_compilers,
)
from cgc_reg.model.measure import as_without_gradients
from cgc_reg.model.own import own_pass
from cgc_reg.model.settings import evaluation_mode
from cgc_reg.model.sharded import sharded_after
from cgc_reg.model.state import left_as_found
from cgc_reg.model.turns import in_turn
from cgc_reg.model.wrappers import unwrap


@dataclass
class _Map:
    """What a layer put out that may be its map."""

    name: str
    layer: nn.Module
    output: Tensor
    node: Any  # in the graph, as the output left the layer: what follows may change it in place


def suggest_target_layer(model: nn.Module, x: Tensor) -> str:
    """Name the last layer that puts out a map and through which everything goes: the usual choice for Grad-CAM.

    The model runs once on x, in evaluation mode, and is left as it was found. Layers without weights, such as pooling
    and dropout, do not count, nor does a convolution that serves as the head.

    Args:
        model: any image classifier.
        x: images (n, c, h, w), volumes or signals, as large as those to come: on smaller ones the last map may shrink
            to a point.

    Returns:
        The dotted name, for ``CGCRegularizer(target_layer)``.

    Raises:
        ValueError: no layer puts out a map, of as many dimensions as x, with more than one pixel, or the last ones lie
            in branches, or the model is a transformer, whose layers need a ``reshape_transform``.

    Example:
        >>> suggest_target_layer(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
        'layer4'
    """
    check_images("x", x)
    model = unwrap(model)
    with outside_inference_mode(), torch.enable_grad(), in_turn(model):
        x = ordinary(x).detach().clone().requires_grad_()
        images = node_of(x)
        with telling_dimensions(model, x):
            maps, tokens, output = _look(model, x)
    classes = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    while len(maps) > 1 and isinstance(maps[-1].layer, CONVOLUTIONS) and maps[-1].output.shape[1] == classes:
        maps.pop()
    got = f"{type(model).__name__} for {describe(x.detach())}"
    _check(maps, tokens, x.ndim - 2, got)
    grid = maps[-1].output.shape[2:]
    for each in reversed(maps):
        if each.output.shape[2:] == grid and not _is_bypassed(each, images, output):
            return without_compilers(each.name)
    raise ValueError(
        f"`model` must have a layer through which all goes that leads to the logits; got {maps[-1].name!r} as the last "
        f"map, which a branch goes around, in {got}. Name the layer in which the branches meet. "
        f"{KEEP_BLOCKS_WHOLE}"
    )


def _look(model: nn.Module, x: Tensor) -> tuple[list[_Map], list[str], Any]:
    """Run the model; return the maps that layers with weights put out, the layers that put out tokens, its output."""
    maps: list[_Map] = []
    tokens: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters()):

                def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and output.ndim == x.ndim and output.shape[2:].numel() > 1:
                        maps.append(_Map(name, module, output, node_of(output)))
                    elif isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
                        tokens.append(name)

                stack.callback(module.register_forward_hook(keep).remove)
        stack.enter_context(sharded_after(model))
        stack.enter_context(left_as_found(model))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(as_without_gradients())
        stack.enter_context(without_autocast_cache(x))
        stack.enter_context(uncompiled(model))
        stack.enter_context(own_pass())
        output = model(x.clone())  # which it may change in place
    # Tokens inside a layer that puts out a map are that layer's own affair.
    tokens = [name for name in tokens if not any(name.startswith(f"{outer.name}.") for outer in maps)]
    return maps, tokens, output


def _check(maps: list[_Map], tokens: list[str], dims: int, got: str) -> None:
    wanted = SHAPES[dims]
    if len(tokens) > len(maps):
        raise ValueError(
            f"`model` must have layers that put out maps {wanted}; got tokens (n, t, c) from {tokens[-1]!r} in "
            f"{got}. Name a layer, and pass {TOKENS[dims]}."
        )
    if not maps:
        raise ValueError(
            f"`model` must have a layer that puts out a map {wanted} of more than one pixel; got none in {got}. Pass "
            "larger images, or name a layer and a `reshape_transform`."
        )
    if is_channels_last(maps[-1].layer, maps[-1].output):
        raise ValueError(
            f"`model` must have layers that put out maps {wanted}; got channels last, "
            f"{describe(maps[-1].output.detach())}, from {maps[-1].name!r} in {got}. Name a layer, and pass "
            "`reshape_transform=channels_last_to_maps`; or, if dimension 1 holds the channels, `lambda maps: maps`."
        )


def _is_bypassed(each: _Map, images: Any, output: Any) -> bool:
    """Tell whether the images reach the logits by a way around a layer."""
    if each.node is None:
        return False  # inside what hides its graph
    logits = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim == 2]
    return any(node is images for scores in logits for node in nodes(scores, around=each.node))
