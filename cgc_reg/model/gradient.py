"""The inner gradient: of the explained score, by what layers put out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg.model.attention import unfused_attention
from cgc_reg.model.sharded import through_shards


def score_gradients(
    model: nn.Module, logits: Tensor, activations: Sequence[Tensor], target: Tensor, *, create_graph: bool
) -> list[Tensor | None]:
    r"""Differentiate each image's score with respect to its activations: :math:`\partial y / \partial A`.

    Args:
        model: that of the pass, wrapped or not.
        logits: (n, k).
        activations: any tensors in the logits' graph whose first dimension is the batch.
        target: the class whose logit is the score y, (n,); or weights w, (n, k), for :math:`y = \sum_k w_k y_k`.
        create_graph: whether the result can be differentiated again, as training on it needs.

    Returns:
        The gradients in the activations' shapes, at least float32; None where the logits do not depend on one.
    """
    # Float16 loses gradients under 6e-8, and a mean over many pixels makes them that small. It has none above 65504,
    # and a head that scales cosines by 64 or 100 makes them large: the factor leaves room on both sides.
    scale = 16.0 if any(activation.dtype is torch.float16 for activation in activations) else 1.0
    # A checkpoint runs its part again here, and must find the attention that its first run found.
    with torch.enable_grad(), without_autocast(logits), unfused_attention():
        scores = logits.gather(1, target[:, None]) if target.ndim == 1 else logits * target
        score = scores.sum() * scale
        if not score.requires_grad:
            return [None] * len(activations)
        # What is only measured goes as FSDP has it.
        shards = through_shards(model, trains=True) if create_graph else nullcontext(lambda tensor: tensor)
        with shards as hold:
            gradients = torch.autograd.grad(score, activations, create_graph=create_graph, allow_unused=True)
        return [None if gradient is None else hold(at_least_float32(gradient) / scale) for gradient in gradients]
