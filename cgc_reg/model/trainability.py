"""Does a heatmap reach something that can be trained?"""

from __future__ import annotations

from torch import Tensor, nn

from cgc_reg.model.graph import leaves


def check_trainable(heatmap: Tensor, model: nn.Module, x: Tensor, layer_output: Tensor | None) -> bool:
    """Tell whether a heatmap trains something; refuse one that trains nothing of a model that has something to train.

    Args:
        heatmap: (n, h, w), as it was made where gradients are on.
        model: that made it.
        x: images that it was made of.
        layer_output: what a pass of ours made of them, where the graph may start: any other leaf is one to train. For a
            pass that is not ours, whose graph may start anywhere, None: to train are parameters, and what made x.
    """
    if layer_output is not None:
        trains = any(leaf is not layer_output for leaf in leaves(heatmap))
    else:
        wanted = {id(leaf) for leaf in leaves(x)}
        trains = any(id(leaf) in wanted or isinstance(leaf, nn.Parameter) for leaf in leaves(heatmap))
    if trains:
        return True
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise RuntimeError(
            "The heatmaps must depend on the model's trainable parameters through autograd; got heatmaps that train "
            "nothing. Remove `detach` or `no_grad` from the model, the explainer's rule or its `reshape_transform`; "
            "take an inner gradient of your own with `create_graph=True`; or unfreeze a layer that the heatmaps depend "
            "on (a bias behind the target layer is none). To only measure, make the call under `torch.no_grad()`."
        )
    return False
