"""Explainers that make their pass themselves, as those of users do: what they are given, and what they must return."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cgc_reg._checks import AXES, describe
from cgc_reg._precision import at_least_float32
from cgc_reg._targets import as_target, target_of
from cgc_reg.explanation import Explainer, Explanation, in_its_graph
from cgc_reg.model.attention import unfused_attention
from cgc_reg.model.compilation import uncompiled, warn_if_compiled
from cgc_reg.model.extra import is_extra_pass
from cgc_reg.model.given import ordinary
from cgc_reg.model.layers import telling_dimensions
from cgc_reg.model.measure import as_without_gradients
from cgc_reg.model.processes import warn_if_wrapper_is_bypassed
from cgc_reg.model.sharded import through_shards
from cgc_reg.model.turns import in_turn
from cgc_reg.model.wrappers import data_parallel, unwrap, warn_if_one_device


def checked(explainer: Explainer, model: nn.Module, x: Tensor, target: Tensor | None) -> Explanation:
    """Call an explainer that makes its pass itself: give it what ours have, and check what it returns.

    Args:
        explainer: any function (model, x, target) -> Explanation.
        model, x: as for calling it.
        target: of :func:`as_target`.
    """
    trains = torch.is_grad_enabled()
    warn_if_compiled(model)
    warn_if_one_device(model)
    parallel = data_parallel(model)
    if parallel is None and not is_extra_pass():
        warn_if_wrapper_is_bypassed(unwrap(model))
    if parallel is not None and parallel.static_graph and trains:
        raise RuntimeError(
            "The explainer must be one of one layer, such as GradCAM, under DistributedDataParallel with "
            f"`static_graph=True`; got {describe(explainer)}, whose inner gradient would pass for the end of the step. "
            "Leave out `static_graph=True`."
        )
    measuring = nullcontext() if trains else as_without_gradients()
    # Its inner gradient needs a graph, and what can be differentiated twice.
    with (
        in_turn(model),
        telling_dimensions(unwrap(model), x),
        measuring,
        torch.enable_grad(),
        uncompiled(model),
        unfused_attention(),
        through_shards(model, trains=trains) as hold,
    ):
        seen = explainer(unwrap(model) if parallel is None else parallel, ordinary(x), target)
    if not isinstance(seen, Explanation):
        raise TypeError(f"The explainer must return an Explanation; got {describe(seen)}.")
    heatmap, logits, n = seen.heatmap, seen.logits, len(x)
    dims = x.ndim - 2
    if (
        not isinstance(heatmap, Tensor)
        or not heatmap.is_floating_point()
        or heatmap.shape[:1] != (n,)
        or (heatmap.ndim != dims + 1)
    ):
        raise ValueError(f"The explainer must return heatmaps of shape ({n}, {AXES[dims]}); got {describe(heatmap)}.")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        raise ValueError(f"The explainer must return logits of shape ({n}, classes); got {describe(logits)}.")
    if seen.target is None:
        raise TypeError("The explainer must return the target that it explained; got None.")
    target = target_of(as_target(seen.target, n, logits.device), logits)
    if trains and heatmap.requires_grad and not logits.requires_grad:
        raise RuntimeError(
            "The explainer must return logits in the graph, since a cross-entropy on them would train nothing; got "
            "some without. Take them from a pass with gradients, and do not detach them."
        )
    return in_its_graph(Explanation(hold(at_least_float32(heatmap)), logits, target, seen.output), model, x)
