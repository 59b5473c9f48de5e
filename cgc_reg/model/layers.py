"""Find a layer of the user's model, and tell what its output is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from cgc_reg._checks import AXES, MISSING_DIMENSION, describe
from cgc_reg.model.replica import is_same

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of one, two and three spatial dimensions
# By the number of spatial dimensions: the shape of maps, and what makes them of tokens.
SHAPES = {dims: f"(n, c, {axes})" for dims, axes in AXES.items()}
TOKENS = {dims: f"`reshape_transform=TokensToMaps(({axes}{',' * (dims == 1)}))`" for dims, axes in AXES.items()}


@contextmanager
def telling_dimensions(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Where the model fails on images of other dimensions than its convolutions have, say that first.

    Such is an image without its batch. A model may also take clips frame by frame, or signals as images of one row.
    """
    try:
        yield
    except Exception as error:  # whatever a model's code raises; it is raised again, or from here
        known = {
            dims
            for dims, kind in enumerate(CONVOLUTIONS, start=1)
            if any(isinstance(module, kind) for module in model.modules())
        }
        if not known or x.ndim - 2 in known:
            raise
        shapes = " or ".join(SHAPES[dims] for dims in sorted(known))
        repair = f"{MISSING_DIMENSION} " if x.ndim - 1 in known else ""
        raise ValueError(
            f"`x` must be images of shape {shapes}, as the convolutions of `model` take them; got {describe(x)}. "
            f"{repair}With it the model gave {type(error).__name__}: {error}"
        ) from error


def check_layer(target_layer: object, *, or_none: bool = False) -> None:
    """Refuse what names no layer."""
    named = isinstance(target_layer, nn.Module) or (isinstance(target_layer, str) and target_layer)
    if not named and not (or_none and target_layer is None):
        raise ValueError(
            f"`target_layer` must be the dotted name of a layer, {'' if or_none else 'or '}the layer itself"
            f"{', or None' if or_none else ''}; got {describe(target_layer)}. Names: `dict(model.named_modules())`."
        )


def find_layer(model: nn.Module, target_layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Return the name of a layer, and the layer.

    Args:
        model: not wrapped.
        target_layer: dotted name, or the layer itself.

    Raises:
        ValueError: the model has no such layer.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(without_compilers(name), module)  # what `torch.compile` made of a layer comes before it
    if isinstance(target_layer, nn.Module):
        for name, module in modules.items():
            if is_same(_original(module), _original(target_layer)):
                return name, module
        raise ValueError(
            f"`target_layer` must be a layer of the model that is looked at, a {type(model).__name__}; got a "
            f"{type(target_layer).__name__} of another model, or of a copy. Take the layer from this model, or pass "
            "its name, which holds for copies too."
        )
    name = without_compilers(target_layer)
    if name not in modules:
        name = name.removeprefix("module.")  # as in a wrapper
    # An average of weights, such as torch's AveragedModel, holds the model as its `module`.
    for known in (name, f"module.{name}"):
        if known in modules:
            return known, modules[known]
    raise ValueError(
        f"`target_layer` must be the dotted name of a layer of {type(model).__name__}; got {name!r}."
        f"{did_you_mean(name, modules) or did_you_mean_any(top for top, _ in model.named_children())} All names: "
        "`dict(model.named_modules())`."
    )


def _original(module: nn.Module) -> nn.Module:
    return module._modules.get("_orig_mod") or module


# What to do where torch.fx traced a model, and no layer is left that its blocks were.
KEEP_BLOCKS_WHOLE = (
    "Where torch.fx traced the model, trace it with its blocks whole, such as by "
    '`create_feature_extractor(..., tracer_kwargs={"leaf_modules": [BasicBlock]})`, and name the last block.'
)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a sentence with the names that look like one; nothing if none does."""
    return did_you_mean_any(difflib.get_close_matches(name, names, n=3, cutoff=0.5))


def did_you_mean_any(names: Iterable[str]) -> str:
    """Return a sentence with the names; nothing if there is none."""
    listed = " or ".join(map(repr, names))
    return f" Do you mean {listed}?" if listed else ""


def without_compilers(name: str) -> str:
    """Return a module's dotted name as it was before it, or what holds it, was compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_channels_last(layer: nn.Module, output: Tensor) -> bool:
    """Tell whether a layer's output is (n, h, w, c) rather than (n, c, h, w), whatever the number of dimensions.

    It is when a layer inside that has weights works on the last dimension, and its width is found there alone. Beside
    convolutions only the last of these layers tells, since squeeze-and-excitation has linear layers of any width. A
    single vector of weights, such as a LayerScale's, does not tell.
    """
    weighted = [
        module
        for module in layer.modules()
        if isinstance(module, nn.LayerNorm) or any(weight.ndim > 1 for weight in module.parameters(recurse=False))
    ]
    if any(weight.ndim > 2 for weight in layer.parameters()):
        weighted = weighted[-1:]
    widths = {width for module in weighted if (width := _width_of_the_last_dimension(module)) is not None}
    return output.ndim > 2 and output.shape[-1] in widths and output.shape[1] not in widths


def _width_of_the_last_dimension(layer: nn.Module) -> int | None:
    """Return how wide a layer makes the last dimension; None if it works on another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    return None
