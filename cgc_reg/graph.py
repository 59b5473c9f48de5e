"""Questions about an autograd graph that nothing else answers: what a heatmap would train, and what mixes images."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def check_trainable(heatmaps: Tensor, layer_output: Tensor, model: nn.Module) -> bool:
    """Tell whether heatmaps train something; refuse those that train nothing of a model that has something to train.

    Args:
        heatmaps: (n, h, w), as they go into the loss.
        layer_output: what they were made of; a leaf where nothing below the layer is trained.
        model: whose parameters are to be trained.
    """
    if heatmaps.requires_grad and (
        not layer_output.is_leaf or any(leaf is not layer_output for leaf in leaves(heatmaps))
    ):
        return True
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise RuntimeError(
            "The heatmaps must depend on the model's trainable parameters through autograd; got heatmaps that train "
            "nothing. Remove `detach` or `no_grad` from the model, `heatmap` or `reshape_transform`, or unfreeze a "
            "layer that the heatmaps depend on (a bias behind the target layer is none); to only measure the loss, "
            "call the regularizer under `torch.no_grad()`."
        )
    return False


def warn_if_images_mix(logits: Tensor, layer_output: Tensor, *, stacklevel: int) -> None:
    """Warn of a BatchNorm in training between the layer and the logits, not of one in a branch around the layer.

    Args:
        logits, layer_output: of one pass, with its graph.
        stacklevel: of the warning, as :func:`warnings.warn` counts for the caller.
    """
    for node in _nodes_between(layer_output, logits):
        # An InstanceNorm is the BatchNorm of a batch of one.
        mixing = "BatchNorm" in type(node).__name__ and any(given.shape[0] > 1 for given in node._input_metadata)
        if mixing and getattr(node, "_saved_training", True):
            warnings.warn(
                "A BatchNorm behind `target_layer` normalises with the batch's statistics, so that the score of an "
                "image depends on the other images, and its heatmap too. Put that BatchNorm into evaluation mode with "
                "`.eval()`, or name a layer behind it that puts out maps.",
                stacklevel=stacklevel + 1,
            )
            return


def reentrant_checkpoint(logits: Tensor) -> bool:
    """Tell whether a part of the pass was checkpointed with ``use_reentrant=True``."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes(logits))


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Go through the leaves, such as parameters, that a backward from a tensor reaches."""
    for node in _nodes(tensor):
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """Go through the nodes that a tensor was computed by."""
    seen = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def _nodes_between(source: Tensor, result: Tensor) -> Iterator[Any]:
    """Go through the nodes that computed one tensor from another; none where the first requires no gradient."""
    if not source.requires_grad:
        return
    users = defaultdict(list)
    for node in _nodes(result):
        for following, _ in node.next_functions:
            users[following].append(node)
    seen = set()
    waiting = [get_gradient_edge(source).node]
    while waiting:
        for node in users[waiting.pop()]:
            if node not in seen:
                seen.add(node)
                waiting.append(node)
                yield node
