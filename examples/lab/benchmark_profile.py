"""Where the time of one step on a CPU goes, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cgc_reg import CGCRegularizer, LayerExplainer, RandomResizedCropFlip, SpatialTransform, regularizer
from lab.benchmark_rows import DRAW, HEATMAPS, LOSS, WARP_HEATMAPS, WARP_IMAGES, Work

PARTS = (DRAW, WARP_IMAGES, HEATMAPS, WARP_HEATMAPS, LOSS)
REST = "everything else in `reg.compute`"
MODEL, COMPUTE, STEP = "the model", "reg.compute", "the step"


def profile_step(step: Work, model: nn.Module) -> dict[str, float]:
    """Return each part's share of the time of a step, its backward included."""
    with ExitStack() as stack:
        for owner, name, part in (
            (RandomResizedCropFlip, "sample", DRAW),
            (SpatialTransform, "__call__", ""),
            (SpatialTransform, "coverage", WARP_HEATMAPS),
            (LayerExplainer, "_heatmap", HEATMAPS),
            (regularizer, "info_nce", LOSS),
            (regularizer, "consistency", LOSS),
            (CGCRegularizer, "compute", COMPUTE),
            (type(model), "forward", MODEL),
        ):
            stack.enter_context(patch.object(owner, name, marked(getattr(owner, name), part)))
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
            step()
    return shares(list(profiler.events()))


def marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Let the profiler see the calls of a function as a part; a transform's as what it transforms."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(part or (WARP_IMAGES if args[1].ndim == 4 else WARP_HEATMAPS)):
            return function(*args, **kwargs)

    return call


def shares(events: list[Any]) -> dict[str, float]:
    """Add up the time of each part: its calls, and the backward of the nodes that these made."""
    microseconds = dict.fromkeys((*PARTS, MODEL, COMPUTE, STEP), 0.0)
    calls = [event for event in events if event.name in microseconds]
    for call in calls:
        microseconds[call.name] += call.time_range.elapsed_us()
    rest = microseconds[COMPUTE] - microseconds[MODEL] - sum(microseconds[part] for part in PARTS)

    def part_around(event: Any) -> str | None:
        start = event.time_range.start
        around = (c.name for c in calls if c.name in PARTS and c.time_range.start <= start <= c.time_range.end)
        return next(around, None)

    # An operation and its node in the backward have one number; of several operations the last has made the node.
    operations = [event for event in events if not event.name.startswith("autograd::")]
    maker = {event.sequence_nr: event for event in sorted(operations, key=lambda event: event.time_range.start)}
    for event in events:
        # The inner gradient's nodes run within a part's call and are counted with it.
        if event.name.startswith("autograd::engine::evaluate_function") and part_around(event) is None:
            part = part_around(maker[event.sequence_nr]) if event.sequence_nr in maker else None
            if part is not None:
                microseconds[part] += event.time_range.elapsed_us()
    return {part: microseconds[part] / microseconds[STEP] for part in PARTS} | {REST: rest / microseconds[STEP]}
