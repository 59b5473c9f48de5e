"""Run a user's model once, with its gradients, and keep what a layer of it puts out."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._precision import without_autocast_cache
from cgc_reg.model.capture import Capture, capture
from cgc_reg.model.compilation import compiled_below, regions
from cgc_reg.model.frozen import check_frozen_block
from cgc_reg.model.head import Weights, used_weights
from cgc_reg.model.layers import find_layer, is_channels_last, telling_dimensions
from cgc_reg.model.measure import as_without_gradients
from cgc_reg.model.outputs import OutputFunction, find_logits
from cgc_reg.model.state import left_as_found
from cgc_reg.model.wrappers import ExposedLayer, data_parallel, unwrap, warn_if_one_device


@dataclass(frozen=True)
class ForwardPass:
    """What one pass through the model left: its class scores, and its layer's output in their graph."""

    logits: Tensor  # (n, k), as the model returned them
    inner_logits: Tensor  # the same, from inside DistributedDataParallel
    target_layer: str  # the layer's name in the unwrapped model
    layer_output: Tensor
    channels_last: bool  # whether the layer's output looks like (n, h, w, c)
    dims: int  # how many spatial dimensions the images have
    output: Any  # what the model returned
    weights: Weights = field(default_factory=dict)  # of linear layers that make theirs in each pass


def forward_pass(
    model: nn.Module, x: Tensor, target_layer: str | nn.Module, output_fn: OutputFunction | None
) -> ForwardPass:
    """Run the model on x, what is compiled of it up to a layer's output, and keep that output.

    Args:
        model: wrapped or not; the pass goes through DistributedDataParallel, which arms its synchronisation.
        x: images (n, c, h, w).
        target_layer: dotted name in the unwrapped model, or the layer itself.
        output_fn: takes the model's output to logits (n, k); by default see :func:`find_logits`.
    """
    if not torch.is_grad_enabled():
        made, _ = _run(model, x, target_layer, output_fn)
        if made.logits.requires_grad:
            return made
        # A `no_grad` block of the model's own, around the layer, switched gradients off again when it ended. The
        # model has had its pass, and this one leaves no trace in it.
        with torch.enable_grad(), as_without_gradients(), left_as_found(unwrap(model)):
            made, _ = _run(model, x, target_layer, output_fn)
        return made
    warn_if_one_device(model)
    made, kept = _run(model, x, target_layer, output_fn)
    if kept.without_gradients:
        check_frozen_block(unwrap(model), x, made.target_layer, made.inner_logits, output_fn)
    return made


def _run(
    model: nn.Module, x: Tensor, target_layer: str | nn.Module, output_fn: OutputFunction | None
) -> tuple[ForwardPass, Capture]:
    inner, parallel = unwrap(model), data_parallel(model)
    weights: dict[nn.Module, Tensor] = {}
    inner_outputs: list[Any] = []
    with (
        nullcontext() if torch.is_grad_enabled() else without_autocast_cache(x),
        used_weights(inner, weights, besides=regions(model, target_layer)),
        capture(inner, target_layer) as kept,
        compiled_below(model, target_layer, kept.is_past, lambda part: used_weights(part, weights)),
        ExitStack() as hook,
    ):
        if parallel is not None:
            # Whose own output starts the synchronisation of a static graph, at the first gradient that it sees.
            hook.callback(inner.register_forward_hook(lambda *given: inner_outputs.append(given[-1])).remove)
        with telling_dimensions(inner, x):
            output = inner(x) if parallel is None else parallel(x)
            # Also here gradients are on: `output_fn` may compute something.
            logits = find_logits(output, output_fn, len(x))
        inner_logits = logits if parallel is None else find_logits(inner_outputs[0], output_fn, len(x))
    dims = x.ndim - 2
    made = ForwardPass(logits, inner_logits, kept.target_layer, kept.output, kept.channels_last, dims, output, weights)
    return made, kept


def exposed_pass(model: nn.Module, x: Tensor, exposed: ExposedLayer, output_fn: OutputFunction | None) -> ForwardPass:
    """Run a compiled model that puts out its layer's output itself, for a heatmap in closed form.

    Args:
        model: ``torch.compile(exposed)``, in DistributedDataParallel or not.
        x, output_fn: as for :func:`forward_pass`.
        exposed: what was compiled.
    """
    with nullcontext() if torch.is_grad_enabled() else without_autocast_cache(x):
        output, layer_output = model(x)
    name, layer = find_layer(unwrap(exposed), exposed.target_layer)
    logits = find_logits(output, output_fn, len(x))
    channels_last = is_channels_last(layer, layer_output)
    return ForwardPass(logits, logits, name, layer_output, channels_last, x.ndim - 2, output)
