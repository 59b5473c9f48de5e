"""Everything that touches a user's model: find a layer, run a pass that keeps its output, leave all as it was."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cgc_reg._checks import check_images, describe
from cgc_reg._precision import without_autocast_cache

BatchNormMode = Literal["preserve", "update", "eval"]


@dataclass(frozen=True)
class ForwardPass:
    """What one pass through the model left: its class scores, and its layer's output in their graph."""

    logits: Tensor  # (n, k)
    layer_output: Tensor
    channels_last: bool  # whether the layer's output looks like (n, h, w, c)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {describe(model)}.")
    inner: nn.Module = model
    while True:
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = cast(nn.Module, inner.module)
        elif _is_compiled(inner):
            inner = cast(nn.Module, inner._orig_mod)
        else:
            return inner


def without_compilation(model: nn.Module, *, stacklevel: int) -> nn.Module:
    """Return the module to run in place of a compiled one; DistributedDataParallel stays around it.

    Args:
        model: wrapped or not.
        stacklevel: of the warning that a compiled model gets, as :func:`warnings.warn` counts for the caller.
    """
    inner = unwrap(model)
    if any(_is_compiled(module) or module._compiled_call_impl is not None for module in model.modules()):
        warnings.warn(
            "The model is compiled with torch.compile, which can neither differentiate a gradient nor see a hook that "
            "was added after its first call. CGC's passes run through the original, uncompiled module: they give the "
            "same numbers at the speed of eager mode.",
            stacklevel=stacklevel + 1,
        )
    while model is not inner and not isinstance(model, DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if _is_compiled(model) else model.module)
    return model


@contextmanager
def without_broadcast(model: nn.Module) -> Iterator[None]:
    """Keep an extra pass through DistributedDataParallel from broadcasting buffers, which would overwrite them."""
    with _attribute(model, "broadcast_buffers", False) if isinstance(model, DistributedDataParallel) else nullcontext():
        yield


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled inside the model, by `torch.compile(module)` or `module.compile()`, as it was written."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            if module._compiled_call_impl is not None:
                stack.enter_context(_attribute(module, "_compiled_call_impl", None))
            for name, child in module.named_children():
                if _is_compiled(child) and not _is_compiled(module):
                    stack.enter_context(_attribute(module, name, child._orig_mod))
        yield


def _is_compiled(model: nn.Module) -> bool:
    # By the name of its submodule: importing OptimizedModule would load the compiler, which takes seconds.
    return "_orig_mod" in model._modules


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule of an unwrapped model by its dotted name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    while name.startswith(("module.", "_orig_mod.")) and name not in modules:
        name = name.partition(".")[2]
    if name and name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [top for top, _ in model.named_children()]
    raise ValueError(
        f"`target_layer` must be the dotted name of a layer of {type(model).__name__}; got {name!r}. "
        f"Do you mean {' or '.join(repr(match) for match in close)}? All names: `dict(model.named_modules())`."
    )


def forward_pass(
    model: nn.Module,
    x: Tensor,
    target_layer: str,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    bn_mode: BatchNormMode = "update",
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
    """
    kept: list[Tensor] = []
    channels_last = False

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor:
        if kept:
            raise RuntimeError(
                f"`target_layer` must be a layer that the model calls once in a pass; got {target_layer!r}, which "
                "it calls "
                "again. Name a layer that encloses both calls, or one that follows them."
            )
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"`target_layer` must put out one floating-point tensor; got {describe(output)} from {target_layer!r}. "
                "Name a layer inside it or behind it."
            )
        nonlocal channels_last
        channels_last = is_channels_last(module, output)
        # From here upward the pass is differentiated twice in training, which fused attention cannot be.
        from_the_layer_up.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.set_grad_enabled(True)
        kept.append(output if output.requires_grad else output.detach().requires_grad_())
        return kept[0].clone()

    grad_enabled = torch.is_grad_enabled()
    cache = nullcontext() if grad_enabled else without_autocast_cache()
    with ExitStack() as from_the_layer_up, cache, batch_norm_mode(model, bn_mode), _uncompiled(model):
        handle = find_layer(unwrap(model), target_layer).register_forward_hook(keep)
        try:
            output = model(x)
            # Also here gradients are on: `output_fn` may compute something.
            logits = find_logits(output, output_fn, len(x))
        finally:
            handle.remove()
            torch.set_grad_enabled(grad_enabled)
    if not kept:
        raise RuntimeError(
            f"`target_layer` must be a layer that the model's forward calls; got {target_layer!r}, which it did not "
            "call. "
            "Name another, or let `suggest_target_layer(model, x)` do so."
        )
    if not grad_enabled and not logits.requires_grad:
        # A `no_grad` block of the model's own, around the layer, switched gradients off again when it ended.
        with torch.enable_grad():
            return forward_pass(model, x, target_layer, output_fn=output_fn, bn_mode=bn_mode)
    return ForwardPass(logits, kept[0], channels_last)


@contextmanager
def batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Change what normalisation layers in training do to their running statistics, and change it back.

    The statistics are kept by never being written: copying them back afterwards would be seen by autograd as a
    change to what it saved.
    """
    with ExitStack() as stack:
        for module in model.modules() if mode != "update" else ():
            if not isinstance(module, _NormBase) or not module.training or not module.track_running_stats:
                continue
            if mode == "eval":
                stack.enter_context(_attribute(module, "training", False))
                # Autograd keeps these by reference, and a later pass may overwrite them before the backward.
                for name in ("running_mean", "running_var"):
                    stack.enter_context(_attribute(module, name, getattr(module, name).clone()))
            elif isinstance(module, _BatchNorm):
                stack.enter_context(_attribute(module, "track_running_stats", False))
            else:  # InstanceNorm writes to whatever running statistics it holds.
                stack.enter_context(_attribute(module, "running_mean", None))
                stack.enter_context(_attribute(module, "running_var", None))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into evaluation mode, and each back into its own."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_attribute(module, "training", False))
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for ``torch.no_grad``: its tensors cannot take part in any graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: Any) -> Any:
    """Return a copy of a tensor that was made in inference mode, and anything else as it is."""
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor


def find_logits(output: Any, output_fn: Callable[[Any], Tensor] | None, batch_size: int) -> Tensor:
    """Return the logits (n, k) in a model's output.

    Without ``output_fn`` these are the output itself, its ``logits`` (attribute or entry) or the first tensor of a
    tuple
    or list.
    """
    logits: object = output
    if output_fn is not None:
        logits = output_fn(output)
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size:
        source = "`output_fn` must return" if output_fn is not None else "The model's output must be, or hold,"
        got = describe(logits if isinstance(logits, Tensor) else output)
        raise ValueError(
            f"{source} logits of shape ({batch_size}, classes); got {got}. "
            "Pass `output_fn`, a function from the model's output to those logits."
        )
    return logits


def find_head(model: nn.Module, name: str | None, *, channels: int, classes: int) -> Tensor:
    """Return the weight (classes, channels) of the linear layer that turns pooled channels into logits."""
    modules = dict(unwrap(model).named_modules())

    def weight_of(module: nn.Module) -> Tensor | None:
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        ):
            weight = module.weight.flatten(1)
            return weight if weight.shape == (classes, channels) else None
        return None

    if name is not None:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.5)
            hint = f" Do you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"`head` must be the dotted name of a linear layer of the model; got {name!r}.{hint}")
        weight = weight_of(modules[name])
        if weight is None:
            raise ValueError(
                f"`head` must be a linear layer from the {channels} channels of the target layer to the {classes} "
                "classes; "
                f"got {name!r}, {modules[name]}. Use the rule 'grad_cam', which works with any head."
            )
        return weight
    fits = {found: weight for found, module in modules.items() if (weight := weight_of(module)) is not None}
    if len(fits) != 1:
        raise ValueError(
            f"`heatmap='class_activation'` must find one linear layer from {channels} channels to {classes} "
            "classes; got "
            f"{', '.join(map(repr, fits)) or 'none'}. Name it with `head`, or use the rule 'grad_cam', which works "
            "with any head."
        )
    return next(iter(fits.values()))


def is_channels_last(layer: nn.Module, output: Tensor) -> bool:
    """Tell whether a layer's output is (n, h, w, c) rather than (n, c, h, w).

    It is when the last layer inside that has weights works on the last dimension, and its width is found there alone.
    """
    last = [module for module in layer.modules() if any(True for _ in module.parameters(recurse=False))][-1:]
    width = next(
        (
            m.out_features if isinstance(m, nn.Linear) else m.normalized_shape[-1]
            for m in last
            if isinstance(m, (nn.Linear, nn.LayerNorm))
        ),
        None,
    )
    return output.ndim == 4 and output.shape[3] == width != output.shape[1]


def suggest_target_layer(model: nn.Module, x: Tensor) -> str:
    """Name the last layer that puts out a map: the usual choice for Grad-CAM.

    The model runs once on x, in evaluation mode and without gradients. Layers without weights, such as pooling and
    dropout, do not count, nor does a convolution that serves as the head.

    Args:
        model: any image classifier.
        x: images (n, c, h, w), as large as those to come: on smaller ones the last map may shrink to a point.

    Returns:
        The dotted name, for ``CGCRegularizer(target_layer)``.

    Raises:
        ValueError: no layer puts out a map (n, c, h, w) with more than one pixel, or the model is a transformer, whose
            layers need a ``reshape_transform``.

    Example:
        >>> suggest_target_layer(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
        'layer4'
    """
    check_images("x", x)
    model = unwrap(model)
    maps: list[tuple[str, nn.Module, Tensor]] = []
    tokens: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters()):

                def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                        maps.append((name, module, output))
                    elif isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
                        tokens.append(name)

                stack.callback(module.register_forward_hook(keep).remove)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast_cache())
        stack.enter_context(_uncompiled(model))
        output = model(x)
    classes = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    while len(maps) > 1 and isinstance(maps[-1][1], nn.Conv2d) and maps[-1][2].shape[1] == classes:
        maps.pop()
    got = f"{type(model).__name__} for {describe(x)}"
    if len(tokens) > len(maps):
        raise ValueError(
            f"`model` must have layers that put out maps (n, c, h, w); got tokens (n, t, c) from {tokens[-1]!r} in "
            f"{got}. "
            "Name a layer, and pass `reshape_transform=TokensToMaps((h, w))`."
        )
    if not maps:
        raise ValueError(
            f"`model` must have a layer that puts out a map (n, c, h, w) with h * w > 1; got none in {got}. "
            "Pass larger images, or name a layer and a `reshape_transform`."
        )
    name, layer, last = maps[-1]
    if is_channels_last(layer, last):
        raise ValueError(
            f"`model` must have layers that put out maps (n, c, h, w); got channels last, {describe(last)}, from "
            f"{name!r} in "
            f"{got}. Name a layer, and pass `reshape_transform=channels_last_to_maps`."
        )
    return name
