"""Keep the passes that a loop makes itself, so that an explainer need not repeat them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from cgc_reg._warn import warn_once
from cgc_reg.model.attention import unfused_attention
from cgc_reg.model.compilation import compiled_exposed_layer, is_compiled
from cgc_reg.model.head import weight_in_use, with_weights_of_a_pass
from cgc_reg.model.hooks import forward_hook, forward_pre_hook
from cgc_reg.model.layers import find_layer, is_channels_last
from cgc_reg.model.outputs import OutputFunction, find_logits
from cgc_reg.model.own import is_own_pass
from cgc_reg.model.passes import ForwardPass
from cgc_reg.model.wrappers import unwrap


@dataclass
class KeptPass:
    """A pass as it goes: what the model was given and how it stood, and what it and its layer put out."""

    x: Tensor
    x_state: tuple[object, ...]  # before the pass, which may change x in place
    layer_outputs: list[Tensor] = field(default_factory=list)
    weights: dict[nn.Module, Tensor] = field(default_factory=dict)
    inner_output: Any = None
    output: Any = None
    state: tuple[object, ...] = ()  # after the pass, which may move a teacher
    versions: list[int] = field(default_factory=list)  # of the output's tensors

    def is_as_it_was(self, model: nn.Module) -> bool:
        """Tell whether nothing has changed since the pass."""
        now = (_state_of_x(self.x), _state(model, self.x), _versions(self.output))
        return now == (self.x_state, self.state, self.versions)


class KeptPasses:
    """The passes of one model that show one layer, while :func:`keep_passes` lasts; its methods are hooks."""

    def __init__(self, model: nn.Module, target_layer: str | nn.Module) -> None:
        self.model = model
        self.inner = unwrap(model)
        self.target_layer, self.layer = find_layer(self.inner, target_layer)
        self.passes: list[KeptPass] = []
        self.going: KeptPass | None = None
        self.above_the_layer = ExitStack()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether a pass that begins can be reused."""
        x = _only_input(self.inner, args, kwargs)
        self.going = None
        if x is not None and not x.is_inference() and not is_own_pass():
            self.going = KeptPass(x, _state_of_x(x))

    def keep(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Keep what the layer puts out, and let a clone flow on, as in a pass of ours."""
        if self.going is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        self.going.layer_outputs.append(output)
        self.above_the_layer.enter_context(unfused_attention())
        return output.clone()

    def keep_weight(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the weight that a linear layer has made."""
        if self.going is not None:
            self.going.weights[module] = weight_in_use(module)

    def end_inside(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what the model inside DistributedDataParallel puts out."""
        if self.going is not None:
            self.going.inner_output = output

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep a pass that called the layer once."""
        self.above_the_layer.close()
        going, self.going = self.going, None
        if going is not None and len(going.layer_outputs) == 1:
            going.output, going.versions, going.state = output, _versions(output), _state(self.model, going.x)
            self.passes.append(going)


# What the `keep_passes` of this thread keep. An explainer is a value and has no place for it.
_KEPT: ContextVar[tuple[KeptPasses, ...]] = ContextVar("_KEPT", default=())


def find_kept_pass(
    model: nn.Module, x: Tensor, target_layer: str | nn.Module, output_fn: OutputFunction | None
) -> ForwardPass | None:
    """Return the loop's own pass of this model over this very tensor, since which nothing has changed; None without."""
    if not torch.is_grad_enabled():
        return None
    for passes in (kept for kept in _KEPT.get() if kept.model is model):
        if passes.target_layer != find_layer(unwrap(model), target_layer)[0]:
            continue
        for kept in reversed(passes.passes):
            if kept.x is x and kept.is_as_it_was(model):
                logits = find_logits(kept.output, output_fn, len(x))
                inner_logits = find_logits(kept.inner_output, output_fn, len(x))
                (layer_output,) = kept.layer_outputs
                channels_last = is_channels_last(passes.layer, layer_output)
                return ForwardPass(
                    logits,
                    inner_logits,
                    passes.target_layer,
                    layer_output,
                    channels_last,
                    x.ndim - 2,
                    kept.output,
                    kept.weights,
                )
    return None


def _only_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return x of a call that is ``model(x)``, or that with x by its name; None for any other call."""
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        return None
    if kwargs:
        first = next(iter(signature(model.forward).parameters.values()))
        if first.kind is not Parameter.POSITIONAL_OR_KEYWORD or first.name not in kwargs:
            return None
    return given[0]


def _state_of_x(x: Tensor) -> tuple[object, ...]:
    return x._version, x.requires_grad


def _state(model: nn.Module, x: Tensor) -> tuple[object, ...]:
    """Return what decides a pass besides its input: to be compared, not read."""
    device = x.device.type
    return (
        *((weight._version, weight.data_ptr(), weight.requires_grad) for weight in model.parameters()),
        *(module.training for module in model.modules()),
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device),
    )


def _versions(output: Any) -> list[int]:
    """Return what moves when a tensor of the output is changed in place."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return [tensor._version for tensor in tensors]


@contextmanager
def keep_passes(model: nn.Module, target_layer: str | nn.Module) -> Iterator[None]:
    """Keep each pass of the model that can be reused: over one tensor, with a graph below and above the layer.

    A compiled model is left alone, since hooks would make it compile again; so are passes without gradients, with
    other arguments, or that call the layer never or twice, and those of ours. Explainers make theirs then.

    Args:
        model: wrapped or not.
        target_layer: dotted name in the unwrapped model, or the layer itself.
    """
    kept = KeptPasses(model, target_layer)
    if is_compiled(model, target_layer):
        if torch.is_grad_enabled() and compiled_exposed_layer(model) is None:
            warn_once(
                "The loop's own pass of a compiled model is not reused, since hooks would have it compiled anew: each "
                "heatmap takes a pass of its own, and `bn_mode` holds for that pass too. Take `compute`, which needs "
                "no more than two passes.",
                unwrap(model),
            )
        yield
        return
    with kept.above_the_layer, ExitStack() as hooks:
        hooks.enter_context(forward_pre_hook(model, kept.begin))
        hooks.enter_context(forward_hook(kept.layer, kept.keep))
        for module in with_weights_of_a_pass(kept.inner):
            hooks.enter_context(forward_hook(module, kept.keep_weight))
        hooks.enter_context(forward_hook(kept.inner, kept.end_inside))
        hooks.enter_context(forward_hook(model, kept.end))
        # Fused optimizers change weights without moving their versions.
        hooks.callback(register_optimizer_step_post_hook(lambda *_: kept.passes.clear()).remove)
        _KEPT.set((*_KEPT.get(), kept))
        try:
            yield
        finally:
            # Blocks may end in any order.
            _KEPT.set(tuple(other for other in _KEPT.get() if other is not kept))
