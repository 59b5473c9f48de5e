"""What lies on the path from the layer to the logits, and beside it.

It is looked at once for each layer of a model: a walk through the graph is not for every step.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from cgc_reg._warn import warn
from cgc_reg.model.graph import node_of, nodes, nodes_between
from cgc_reg.model.passes import ForwardPass
from cgc_reg.model.state import norms_in_training

# The layers that were looked at, and how many norms were in training then.
_LOOKED_AT: WeakKeyDictionary[nn.Module, set[tuple[str, int]]] = WeakKeyDictionary()


def look_at_path(model: nn.Module, made: ForwardPass, heatmap: Tensor, *, of_maps: bool) -> None:
    """Warn of what makes the heatmaps of a layer mean less than they seem to, and refuse what cannot be trained on.

    Args:
        model: not wrapped.
        made: its pass, with a graph.
        heatmap: what an explainer made of it.
        of_maps: whether the layer puts out maps. A transformer's last usual layer, a norm, has a branch around it that
            carries the class token.
    """
    looked_at, here = _LOOKED_AT.setdefault(model, set()), (made.target_layer, norms_in_training(model))
    if here in looked_at:
        return
    _check_second_derivative(made, heatmap)  # an error each time, not the first alone
    looked_at.add(here)
    _warn_if_images_mix(made)
    if of_maps:
        _warn_if_bypassed(made)


def _warn_if_images_mix(made: ForwardPass) -> None:
    """Warn of a BatchNorm in training between the layer and the logits, not of one in a branch around the layer."""
    for node in nodes_between(made.layer_output, made.inner_logits):
        # An InstanceNorm is the BatchNorm of a batch of one.
        mixing = "BatchNorm" in type(node).__name__ and any(given.shape[0] > 1 for given in node._input_metadata)
        if mixing and getattr(node, "_saved_training", True):
            warn(
                "A BatchNorm behind `target_layer` normalises with the batch's statistics, so that the score of an "
                "image depends on the other images, and its heatmap too. Put that BatchNorm into evaluation mode with "
                "`.eval()`, or name a layer behind it that puts out maps."
            )
            return


def _warn_if_bypassed(made: ForwardPass) -> None:
    """Warn of a branch that takes to the logits, around the layer, what was computed before it."""
    layer = node_of(made.layer_output)
    before = {node for node in nodes(made.layer_output) if node is not layer and not hasattr(node, "variable")}
    if any(node in before for node in nodes(made.inner_logits, around=layer)):
        warn(
            f"A branch of the model goes around {made.target_layer!r}, as it does around a convolution in a residual "
            "block: the heatmap shows only what goes through that layer. Name the layer in which the branches meet, "
            "such as the whole block."
        )


def _check_second_derivative(made: ForwardPass, heatmap: Tensor) -> None:
    """Refuse what lies behind the layer and can be differentiated only once, before the step's backward meets it."""
    for node in nodes(heatmap, around=node_of(made.layer_output)):
        refusal = _refusal(node)
        if refusal:
            between = nodes_between(made.layer_output, made.inner_logits)
            own = sorted({type(each).__name__ for each in between if isinstance(each, BackwardCFunction)})
            found = ", ".join([refusal, *own])
            raise RuntimeError(
                "What lies behind `target_layer` must have a second derivative, since the heatmap is made of the first "
                f"one; got {made.target_layer!r}, and behind it: {found}. Take `CAM`, which needs no derivative, or "
                "name a layer behind that operation. Compile modules, which can run as written, and no function there. "
                "For attention leave out what forces a kernel, or take `sdpa_kernel(SDPBackend.MATH)`. To only "
                "measure, make the call under `torch.no_grad()`."
            )


def _refusal(node: Any) -> str | None:
    """Return what a node says that only raises; None of any other."""
    name = node.name()
    if name.endswith(("::NotImplemented", "::Error")):
        try:
            node(*(torch.zeros(given.shape, dtype=given.dtype, device=given.device) for given in node._input_metadata))
        except RuntimeError as error:
            return str(error)
    if name == "CompiledFunctionBackwardBackward":
        return "a function compiled by torch.compile"
    # Torchvision's gradients of operations, which cannot be asked.
    if "torchvision__" in name or ("vision::ops" in name and "BackwardFunction" in name):
        return str(name)
    return None
