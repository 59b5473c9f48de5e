"""Find what makes the score of an image depend on the other images."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from cgc_reg._warn import warn
from cgc_reg.model.graph import nodes_between
from cgc_reg.model.passes import ForwardPass
from cgc_reg.model.statistics import norms_in_training

# The layers of a model behind which norms were looked for, and how many norms were in training then: the walk through
# the graph is not for every step.
_LOOKED_BEHIND: WeakKeyDictionary[nn.Module, set[tuple[str, int]]] = WeakKeyDictionary()


def warn_if_images_mix(model: nn.Module, made: ForwardPass) -> None:
    """Warn of a BatchNorm in training between the layer and the logits, not of one in a branch around the layer.

    Args:
        model: not wrapped.
        made: its pass, with a graph.
    """
    looked_behind, here = _LOOKED_BEHIND.setdefault(model, set()), (made.target_layer, norms_in_training(model))
    if here in looked_behind:
        return
    looked_behind.add(here)
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
