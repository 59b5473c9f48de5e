"""Run a user's model once, and keep what a layer of it puts out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cgc_reg._attention import unfused_attention
from cgc_reg._checks import describe
from cgc_reg._precision import without_autocast_cache
from cgc_reg.graph import leaves, reentrant_checkpoint
from cgc_reg.modes import BatchNormMode, batch_norm_mode, evaluation_mode, extra_pass, take_buffers_out_of_graph
from cgc_reg.reshape import is_channels_last
from cgc_reg.wrappers import ExposedLayer, find_layer, uncompiled, unwrap

# Models that checkpoint modules whose settings an extra pass changes.
_CHECKPOINTED: WeakSet[nn.Module] = WeakSet()
# Models that run a layer without gradients, and the weights that they were seen to train all the same.
_TRAINED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
# The pass of ours that goes on in this thread.
_OWN_PASS: ContextVar[object] = ContextVar("_OWN_PASS", default=None)


@contextmanager
def own_pass() -> Iterator[Callable[[], bool]]:
    """Mark a pass as one of ours, which nobody's loop made.

    Yields:
        A function that tells whether that pass is the one going on, and not one of another thread.
    """
    this = object()
    token = _OWN_PASS.set(this)
    try:
        yield lambda: _OWN_PASS.get() is this
    finally:
        _OWN_PASS.reset(token)


def is_own_pass() -> bool:
    """Tell whether the pass going on is one of ours."""
    return _OWN_PASS.get() is not None


@dataclass(frozen=True)
class ForwardPass:
    """What one pass through the model left: its class scores, and its layer's output in their graph."""

    logits: Tensor  # (n, k), as the model returned them
    inner_logits: Tensor  # the same, from inside DistributedDataParallel
    layer_output: Tensor
    channels_last: bool  # whether the layer's output looks like (n, h, w, c)
    output: Any  # what the model returned


def forward_pass(
    model: nn.Module,
    x: Tensor,
    target_layer: str,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    bn_mode: BatchNormMode = "update",
    measuring: bool = False,
) -> ForwardPass:
    """Run the model on x and keep what a layer puts out.

    What flows on behind the layer is a clone, so an in-place operation there leaves the kept tensor alone. Where no
    gradient reaches the layer (a frozen trunk, or ``no_grad``), the graph starts at its output: below it, nothing
    costs more than in a plain pass.

    Args:
        model: wrapped or not.
        x: images (n, c, h, w).
        target_layer: dotted name in the unwrapped model.
        output_fn: takes the model's output to logits (n, k); by default see :func:`find_logits`.
        bn_mode: what the pass does to normalisation layers in training: ``"update"`` as in any pass; ``"preserve"``
            normalises with the batch's statistics, without updating the running ones; ``"eval"`` normalises with the
            running ones.
        measuring: nothing is trained by this pass, although gradients are on.
    """
    kept: list[Tensor] = []
    fresh: list[Tensor] = []  # the layer's output without a graph, and nobody else's
    inner_outputs: list[Any] = []
    channels_last = frozen_block = without_gradients = False

    def begin(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not is_this_pass() or not isinstance(output, Tensor) or output.requires_grad:
            return None
        fresh.append(output.detach())
        return fresh[-1]

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not is_this_pass():
            return None
        if kept:
            raise RuntimeError(
                f"`target_layer` must be a layer that the model calls once in a pass; got {target_layer!r}, which it "
                "calls again. Name a layer that encloses both calls, or one that follows them."
            )
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"`target_layer` must put out one floating-point tensor; got {describe(output)} from {target_layer!r}. "
                "Name a layer inside it or behind it."
            )
        nonlocal channels_last, frozen_block, without_gradients
        channels_last = is_channels_last(module, output)
        without_gradients = not torch.is_grad_enabled()
        frozen_block = not measuring and grad_enabled and without_gradients
        # From here upward the pass is differentiated twice in training, which fused attention cannot be.
        from_the_layer_up.enter_context(unfused_attention())
        torch.set_grad_enabled(True)
        # What hooks of the model's own kept of a fresh tensor is this tensor, so that it counts too.
        own = output.requires_grad or any(output is each for each in fresh)
        kept.append((output if own else output.detach()).requires_grad_())
        return kept[0].clone()

    grad_enabled = torch.is_grad_enabled()
    cache = nullcontext() if grad_enabled else without_autocast_cache()
    inner = unwrap(model)
    replica = bn_mode != "update" and inner in _CHECKPOINTED
    with (
        ExitStack() as from_the_layer_up,
        cache,
        own_pass() as is_this_pass,
        uncompiled(model),
        extra_pass(model, bn_mode, replica=replica) as extra,
    ):
        layer = find_layer(inner, target_layer)
        handles = [layer.register_forward_hook(begin, prepend=True), layer.register_forward_hook(keep)]
        if isinstance(model, DistributedDataParallel):
            # Whose own output starts its synchronisation, with a static graph, at the first gradient that it sees.
            handles.append(inner.register_forward_hook(lambda module, args, output: inner_outputs.append(output)))
        try:
            output = extra.running(x)
            # Also here gradients are on: `output_fn` may compute something.
            logits = find_logits(output, output_fn, len(x))
            inner_logits = find_logits(inner_outputs[0], output_fn, len(x)) if inner_outputs else logits
        finally:
            for handle in handles:
                handle.remove()
            torch.set_grad_enabled(grad_enabled)
            if without_gradients:
                take_buffers_out_of_graph(inner)  # those that the model updates there, with gradients off
    if not kept:
        raise _not_called(inner, target_layer)
    if extra.checkpointed or (extra.without_gradients and reentrant_checkpoint(inner_logits)):
        if not replica:
            _CHECKPOINTED.add(inner)
            return forward_pass(model, x, target_layer, output_fn=output_fn, bn_mode=bn_mode)
        if any(module in extra.changed for module in [*extra.checkpointed, *extra.without_gradients]):
            raise RuntimeError(
                "`bn_mode` must be 'update' for this model, which checkpoints modules that it reaches from outside its "
                f"tree, such as by a list or a patched `forward`; got {bn_mode!r}, which the checkpoint would not heed "
                "when it runs them again in the backward."
            )
    if frozen_block:
        _check_frozen_block(inner, x, target_layer, inner_logits, output_fn)
    if not grad_enabled and not logits.requires_grad:
        # A `no_grad` block of the model's own, around the layer, switched gradients off again when it ended.
        with torch.enable_grad():
            return forward_pass(model, x, target_layer, output_fn=output_fn, bn_mode=bn_mode, measuring=True)
    return ForwardPass(logits, inner_logits, kept[0], channels_last, output)


def _check_frozen_block(
    model: nn.Module, x: Tensor, target_layer: str, logits: Tensor, output_fn: Callable[[Any], Tensor] | None
) -> None:
    """Refuse a `no_grad` block of the model's own that holds weights behind the layer, where gradients are on now."""

    def reached_from(scores: Tensor) -> list[str]:
        reached = {id(leaf) for leaf in leaves(scores)}
        return [name for name, parameter in model.named_parameters() if id(parameter) in reached]

    reached = reached_from(logits)
    if not _TRAINED.get(model, set()).issuperset(reached):
        with own_pass(), uncompiled(model), batch_norm_mode(model, "preserve"):
            _TRAINED[model] = set(reached_from(find_logits(model(x), output_fn, len(x))))
    for name in reached:
        if name not in _TRAINED.get(model, set()):
            raise RuntimeError(
                f"`target_layer` must not be followed by weights in a `no_grad` block of the model: heatmaps need "
                f"gradients from the layer on, and would train what the block freezes; got {target_layer!r}, which "
                f"{name!r} follows. Freeze by `requires_grad_(False)` instead of `no_grad`, or name the block's last "
                "layer."
            )


def _not_called(model: nn.Module, target_layer: str) -> RuntimeError:
    repair = "Name another, or let `suggest_target_layer(model, x)` do so."
    parts = [name for name, _ in find_layer(model, target_layer).named_children()]
    if parts:
        # As timm's gradient checkpointing does, and models that torch.fx has traced.
        last = f"{target_layer}.{parts[-1]}"
        repair = f"Where the model calls the parts of a layer one by one, name the last part: {last!r}."
    return RuntimeError(
        f"`target_layer` must be a layer that the model's forward calls; got {target_layer!r}, which it did not call. "
        f"{repair}"
    )


def exposed_pass(
    model: nn.Module,
    x: Tensor,
    exposed: ExposedLayer,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    bn_mode: BatchNormMode = "update",
) -> ForwardPass:
    """Run a compiled model that puts out its layer's output itself, for a heatmap in closed form.

    Args:
        model: ``torch.compile(exposed)``, in DistributedDataParallel or not.
        x, output_fn, bn_mode: as for :func:`forward_pass`.
        exposed: what was compiled.
    """
    cache = nullcontext() if torch.is_grad_enabled() else without_autocast_cache()
    with cache, own_pass(), batch_norm_mode(model, bn_mode):
        output, layer_output = model(x)
    layer = find_layer(exposed.model, exposed.target_layer)
    logits = find_logits(output, output_fn, len(x))
    return ForwardPass(logits, logits, layer_output, is_channels_last(layer, layer_output), output)


def find_logits(output: Any, output_fn: Callable[[Any], Tensor] | None, batch_size: int) -> Tensor:
    """Return the logits (n, k) in a model's output.

    Without ``output_fn`` these are the output itself, its ``logits`` (attribute or entry) or the only tensor of that
    shape in a tuple or list.
    """
    logits: object = output
    if output_fn is not None:
        logits = output_fn(output)
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)):
        fitting = [
            entry
            for entry in output
            if isinstance(entry, Tensor) and entry.is_floating_point() and entry.shape[:-1] == (batch_size,)
        ]
        if len(fitting) > 1:
            raise ValueError(
                f"The model's output must hold one tensor of shape ({batch_size}, classes); got {len(fitting)}, "
                f"{describe(output)}, of which an embedding may be one. Pass `output_fn`, such as `lambda output: "
                "output[0]`."
            )
        logits = fitting[0] if fitting else output
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size:
        source = "`output_fn` must return" if output_fn is not None else "The model's output must be, or hold,"
        got = describe(logits if isinstance(logits, Tensor) else output)
        raise ValueError(
            f"{source} logits of shape ({batch_size}, classes); got {got}. Pass `output_fn`, a function from the "
            "model's output to those logits."
        )
    return logits


def find_head(model: nn.Module, name: str | None, *, channels: int, classes: int) -> Tensor:
    """Return the weight (classes, channels) of the linear layer that turns pooled channels into logits."""
    modules = dict(unwrap(model).named_modules())

    def fits(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return (module.out_features, module.in_features) == (classes, channels)
        return (
            isinstance(module, nn.Conv2d)
            and (module.out_channels, module.in_channels) == (classes, channels)
            and module.kernel_size == (1, 1)
            and module.groups == 1
        )

    if name is not None:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.5)
            hint = f" Do you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"`head` must be the dotted name of a linear layer of the model; got {name!r}.{hint}")
        if not fits(modules[name]):
            raise ValueError(
                f"`head` must be a linear layer from the {channels} channels of the target layer to the {classes} "
                f"classes; got {name!r}, {modules[name]}. Use the rule 'grad_cam', which works with any head."
            )
        return _weight(modules[name])
    found = [each for each, module in modules.items() if fits(module)]
    if len(found) != 1:
        raise ValueError(
            f"`heatmap='class_activation'` must find one linear layer from {channels} channels to {classes} classes; "
            f"got {', '.join(map(repr, found)) or 'none'}. Name it with `head`, or use the rule 'grad_cam', which "
            "works with any head."
        )
    return _weight(modules[found[0]])


def _weight(head: nn.Module) -> Tensor:
    # In evaluation mode a parametrization such as spectral norm's gives the weight of the pass that was.
    with evaluation_mode(head):
        weight = head.weight
    assert isinstance(weight, Tensor)  # says so to the type checker
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "`head` must not be sharded when `heatmap='class_activation'` reads its weight, after the forward; got a "
            "sharded one. Set `reshard_after_forward=False` in the `fully_shard` of the module that holds it."
        )
    return weight.flatten(1)
