"""Does a heatmap reach something that can be trained?"""

from __future__ import annotations

from torch import Tensor, nn

from cgc_reg.model.graph import leaves


def check_trainable(heatmap: Tensor, model: nn.Module, x: Tensor) -> bool:
    """Tell whether a heatmap trains something; refuse one that trains nothing of a model that has something to train.

    It does if its graph reaches a parameter, or what x was made of.

    Args:
        heatmap: (n, h, w), as it was made where gradients are on.
        model: that made it.
        x: images that it was made of.
    """
    wanted = {id(leaf) for leaf in (*model.parameters(), *leaves(x))}
    if any(id(leaf) in wanted or isinstance(leaf, nn.Parameter) for leaf in leaves(heatmap)):
        return True
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise RuntimeError(
            "The heatmaps must depend on the model's trainable parameters through autograd; got heatmaps that train "
            "nothing. Remove `detach` or `no_grad` from the model, the explainer's rule or its `reshape_transform`, or "
            "unfreeze a layer that the heatmaps depend on (a bias behind the target layer is none); to only measure, "
            "make the call under `torch.no_grad()`."
        )
    return False
