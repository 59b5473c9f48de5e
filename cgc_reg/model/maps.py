"""A layer's output as maps: (n, c, h, w), or what volumes and signals have."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cgc_reg._checks import describe
from cgc_reg._precision import at_least_float32
from cgc_reg.model.given import ordinary
from cgc_reg.model.layers import SHAPES, TOKENS
from cgc_reg.model.passes import ForwardPass

ReshapeTransform = Callable[[Tensor], Tensor]


def activation_maps(made: ForwardPass, reshape_transform: ReshapeTransform | None) -> Tensor:
    """Return what the layer put out in a pass, in at least float32: one map for each image."""
    if made.channels_last and reshape_transform is None and made.layer_output.ndim == made.dims + 2:
        raise ValueError(
            f"`target_layer` must put out maps of shape {SHAPES[made.dims]}; got channels last, "
            f"{describe(made.layer_output)}, from {made.target_layer!r}. Pass "
            "`reshape_transform=channels_last_to_maps`; or, if dimension 1 holds the channels, `lambda maps: maps`."
        )
    activation = at_least_float32(as_maps(made.layer_output, reshape_transform, made))
    if len(activation) != len(made.logits):
        raise ValueError(
            f"`target_layer` must put out one map for each of the {len(made.logits)} images; got "
            f"{describe(activation)} from {made.target_layer!r}. Name a layer outside of what changes the batch, or do "
            "that outside of the model."
        )
    return activation


def as_maps(layer_output: Tensor, reshape_transform: ReshapeTransform | None, made: ForwardPass) -> Tensor:
    """Return a layer's output, or its gradient, as maps of as many dimensions as the images of the pass have."""
    maps = ordinary(layer_output if reshape_transform is None else reshape_transform(layer_output))
    if not isinstance(maps, Tensor) or maps.ndim != made.dims + 2:
        whose = "`target_layer` must put out" if reshape_transform is None else "`reshape_transform` must return"
        repair = (
            "Name a layer in front of the pooling."
            if layer_output.ndim == 2
            else f"For tokens (n, t, c) pass {TOKENS[made.dims]}, for channels last "
            "`reshape_transform=channels_last_to_maps`, for frames (n * t, c, h, w) a function that puts them together."
        )
        raise ValueError(
            f"{whose} maps of shape {SHAPES[made.dims]}; got {describe(maps)} from {made.target_layer!r}. {repair}"
        )
    return maps
