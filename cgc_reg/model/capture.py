"""Keep what a layer puts out in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._checks import describe
from cgc_reg.model.attention import unfused_attention
from cgc_reg.model.given import ordinary
from cgc_reg.model.layers import KEEP_BLOCKS_WHOLE, find_layer, is_channels_last
from cgc_reg.model.measure import as_without_gradients
from cgc_reg.model.own import own_pass
from cgc_reg.model.settings import attribute


class Capture:
    """A layer, and what it put out once the pass has come that far."""

    target_layer: str  # its name
    output: Tensor
    channels_last: bool  # whether the output looks like (n, h, w, c)
    without_gradients: bool  # whether gradients were off there, which they are not from there on
    called = False
    called_elsewhere = False  # outside of this pass
    is_going: Callable[[], bool]  # whether the pass that goes on in this thread is this one

    def is_past(self) -> bool:
        """Tell whether the pass going on has come past the layer's output."""
        return self.called and self.is_going()


@contextmanager
def capture(model: nn.Module, target_layer: str | nn.Module) -> Iterator[Capture]:
    """Keep what a layer puts out in the pass that is made inside this context.

    What flows on behind the layer is a clone, so an in-place operation there leaves the kept tensor alone. From the
    layer upward gradients are on, and attention is in the form that can be differentiated twice. Where no gradient
    reaches the layer (a frozen trunk, or ``no_grad``), the graph starts at its output: below it, nothing costs more
    than in a plain pass.

    Args:
        model: not wrapped.
        target_layer: dotted name of its layer, or the layer itself.

    Raises:
        RuntimeError: the layer is not called once in the pass.
        TypeError: it puts out something else than one floating-point tensor.
    """
    kept = Capture()
    fresh: list[Tensor] = []  # the layer's output without a graph, and nobody else's

    def begin(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.requires_grad:
            return None
        fresh.append(ordinary(output).detach())
        return fresh[-1]

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not kept.is_going():
            kept.called_elsewhere = True
            return None
        _check(kept.target_layer, output, called_before=kept.called)
        kept.called, kept.without_gradients = True, not torch.is_grad_enabled()
        kept.channels_last = is_channels_last(module, output)
        from_the_layer_up.enter_context(unfused_attention())
        if kept.without_gradients:
            from_the_layer_up.enter_context(as_without_gradients())
        torch.set_grad_enabled(True)
        output = ordinary(output)
        # What hooks of the model's own kept of a fresh tensor is this tensor, so that it counts too.
        own = output.requires_grad or any(output is each for each in fresh)
        kept.output = (output if own else output.detach()).requires_grad_()
        return kept.output.clone()

    kept.target_layer, layer = find_layer(model, target_layer)
    grad_enabled = torch.is_grad_enabled()
    with (
        own_pass() as kept.is_going,
        ExitStack() as from_the_layer_up,
        _on_output(layer, begin, keep),
    ):
        try:
            yield kept
        finally:
            torch.set_grad_enabled(grad_enabled)
            if kept.called and kept.without_gradients:
                _take_buffers_out_of_graph(model)  # those that the model updates there, with gradients off
    if not kept.called:
        raise not_called(kept.target_layer, layer, called_elsewhere=kept.called_elsewhere)


@contextmanager
def _on_output(layer: nn.Module, begin: Callable[..., Any], keep: Callable[..., Any]) -> Iterator[None]:
    """Run two forward hooks on a layer's output, the first before and the other after those of the model's own.

    A layer that ``layer.compile()`` has compiled with its hooks gets them around that.
    """
    compiled: Callable[..., Any] | None = layer._compiled_call_impl
    with ExitStack() as stack:
        if compiled is None:
            stack.callback(layer.register_forward_hook(begin, prepend=True).remove)
            stack.callback(layer.register_forward_hook(keep).remove)
        else:
            stack.enter_context(attribute(layer, "_compiled_call_impl", _followed(compiled, layer, [begin, keep])))
        yield


def _followed(call: Callable[..., Any], layer: nn.Module, hooks: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Return a layer's call with forward hooks behind it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        for hook in hooks:
            changed = hook(layer, args, output)
            output = output if changed is None else changed
        return output

    return run


def _check(target_layer: str, output: object, *, called_before: bool) -> None:
    if called_before:
        raise RuntimeError(
            f"`target_layer` must be a layer that the model calls once in a pass; got {target_layer!r}, which it "
            "calls again. Name a layer that encloses both calls, or one that follows them."
        )
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            f"`target_layer` must put out one floating-point tensor; got {describe(output)} from {target_layer!r}. "
            "Name a layer inside it or behind it."
        )


def not_called(name: str, layer: nn.Module, *, called_elsewhere: bool = False) -> RuntimeError:
    """Return the error for a layer that a pass has not called; it may have been called outside of this pass."""
    repair = "Name another, or let `suggest_target_layer(model, x)` do so."
    parts = [name for name, _ in layer.named_children()]
    if called_elsewhere:
        repair = (
            "It ran in another thread, which may be the loop's. If the forward starts that thread, let it run the "
            "layer by `contextvars.copy_context().run(layer, x)`, with the context copied in the forward."
        )
    elif type(layer) is nn.Module:  # what torch.fx leaves of one, whose parts it calls
        repair = KEEP_BLOCKS_WHOLE
    elif isinstance(layer, nn.Sequential) and parts:  # as timm's gradient checkpointing calls one
        last = f"{name}.{parts[-1]}"
        repair = f"Where the model calls the parts of a layer one by one, name the last part: {last!r}."
    return RuntimeError(
        f"`target_layer` must be a layer that the model's forward calls; got {name!r}, which it did not call. {repair}"
    )


def _take_buffers_out_of_graph(model: nn.Module) -> None:
    """Detach each buffer that has a gradient to hand on, which no buffer should."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.grad_fn is not None and buffer._is_view():  # cannot be detached in place
                setattr(module, name, buffer.detach())
            elif buffer.grad_fn is not None:
                buffer.detach_()
