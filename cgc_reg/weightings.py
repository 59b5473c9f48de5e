"""How much each image's loss counts: pure functions of logits and target."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cgc_reg._precision import at_least_float32

Weighting = Callable[[Tensor, Tensor], Tensor]


def confidence(logits: Tensor, target: Tensor) -> Tensor:
    r"""Weigh an image by how far the model is above chance for what its heatmap explains.

    .. math:: w_i = \max\Big(0, \frac{p_i - 1/k}{1 - 1/k}\Big)

    While a network does not know the classes, its heatmaps show nothing, and to make them consistent keeps it from
    learning. p is the softmax's probability of the class explained. Where the target is weights of the scores, or there
    is one score alone, p is the sigmoid of the explained score :math:`\sum_k w_k y_k`, whose chance is 1/2.

    Args:
        logits: y, (n, k).
        target: a class of each image, (n,), or weights of the scores, (n, k).

    Returns:
        (n,), from 0, for a probability of chance or less, to 1, for certainty; without a graph, at least float32.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0, 0]))
        tensor([0.0000, 0.9998, 0.0000])
    """
    logits = at_least_float32(logits.detach())
    chance = 1 / logits.shape[1]
    if target.ndim == 2 or logits.shape[1] == 1:
        score = (logits * target).sum(dim=1) if target.ndim == 2 else logits[:, 0]
        probability, chance = score.sigmoid(), 1 / 2
    else:
        probability = logits.softmax(dim=1).gather(1, target[:, None])[:, 0]
    return ((probability - chance) / (1 - chance)).clamp(min=0)
