"""Input checks, and the wording of every error: what must hold, what was got, what to do.

Only shapes, types and Python numbers are checked. Looking at the values inside a tensor would make a GPU wait.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeIs


def describe(value: object) -> str:
    """Say what a value is, in the words an error needs.

    >>> describe(torch.zeros(2, 3))
    'a float32 tensor of shape (2, 3)'
    >>> describe("keys")
    "'keys'"
    >>> describe((torch.zeros(2, 3), None))
    '(a float32 tensor of shape (2, 3), None)'
    """
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        entries = [describe(entry) for entry in value[:6]] + ["..."] * (len(value) > 6)
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        return f"{opening}{', '.join(entries)}{',' * (opening == '(' and len(entries) == 1)}{closing}"
    if isinstance(value, (str, int, float, bool)) or value is None:
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__qualname__} itself"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}; got {describe(value)}.")


def check_option(name: str, value: object, choices: Iterable[str]) -> None:
    """As `check_choice`, for an option that may also be the user's own function."""
    if callable(value):
        return
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, or a function; got {describe(value)}.")


def check_function(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be a function, or None; got {describe(value)}.")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {describe(value)}.")


def check_generator(name: str, value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"`{name}` must be a torch.Generator, or None; got {describe(value)}. Make one by "
            "`torch.Generator().manual_seed(seed)`."
        )


def is_number(value: object) -> TypeIs[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(name: str, value: object) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive number; got {describe(value)}.")


def check_probability(name: str, value: object) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a probability from 0 to 1; got {describe(value)}.")


def check_range(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
    """Return (minimum, maximum), both within [low, high]."""
    bounds = (
        "" if low == -math.inf else f" with {low:g} <= minimum" + ("" if high == math.inf else f", maximum <= {high:g}")
    )
    if not isinstance(value, Sequence) or len(value) != 2 or not all(is_number(v) for v in value):
        raise ValueError(f"`{name}` must be two numbers (minimum, maximum){bounds}; got {describe(value)}.")
    minimum, maximum = float(value[0]), float(value[1])
    if minimum > maximum:
        raise ValueError(f"`{name}` must be (minimum, maximum); got {describe(value)}. Swap the two.")
    if minimum < low or maximum > high:
        raise ValueError(f"`{name}` must be two numbers (minimum, maximum){bounds}; got {describe(value)}.")
    return minimum, maximum


MISSING_DIMENSION = "Of one image without its batch pass `x[None]`, of a batch without channels `x[:, None]`."
AXES = {1: "length", 2: "h, w", 3: "d, h, w"}  # of a heatmap, by the number of spatial dimensions
SIZES = {
    1: "one positive integer (length,)",
    2: "two positive integers (height, width)",
    3: "three positive integers (depth, height, width)",
}


def check_size(name: str, value: object, *, dims: int | None = 2) -> tuple[int, ...]:
    """Return the sides along the axes, of so many dimensions, or of any number that we know if None."""
    if (
        not isinstance(value, Sequence)
        or len(value) not in (SIZES if dims is None else (dims,))
        or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    ):
        wanted = ", or ".join(SIZES.values()) if dims is None else SIZES[dims]
        raise ValueError(f"`{name}` must be {wanted}; got {describe(value)}.")
    return tuple(value)


def check_images(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor of images (n, c, h, w); got {describe(value)}.")
    if value.ndim not in (3, 4, 5):
        repair = f" {MISSING_DIMENSION}" if value.ndim == 2 else ""
        raise ValueError(
            f"`{name}` must be images of shape (n, c, h, w), volumes (n, c, d, h, w) or signals (n, c, length); got "
            f"{describe(value)}.{repair}"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"`{name}` must hold floating-point images; got {describe(value)}. Convert and normalise them as for the "
            "model, for example `x.float() / 255`."
        )


def check_sampler(name: str, value: object) -> None:
    if isinstance(value, type) or not callable(getattr(value, "sample", None)):
        raise TypeError(
            f"`{name}` must draw transforms with a method `sample`; got {describe(value)}. Pass "
            "RandomResizedCropFlip(...), RandomAffine(...), RandomFlip(...) or RandomQuarterTurn(...), or several in a "
            "Compose([...])."
        )


def check_maps(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor of heatmaps (n, h, w); got {describe(value)}.")
    if value.ndim not in (2, 3, 4) or not value.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point heatmaps of shape (n, h, w), of volumes (n, d, h, w), of signals "
            f"(n, length); got {describe(value)}."
        )


def check_pair(query: Any, key: Any) -> None:
    check_maps("query", query)
    check_maps("key", key)
    if query.shape != key.shape:
        raise ValueError(f"`query` and `key` must have one shape; got {describe(query)} and {describe(key)}.")


def check_activation(activation: Any, gradient: Any) -> None:
    for name, value in (("activation", activation), ("gradient", gradient)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor (n, c, h, w); got {describe(value)}.")
    if activation.ndim not in (3, 4, 5) or activation.shape != gradient.shape:
        raise ValueError(
            "`activation` and `gradient` must have one shape (n, c, h, w), of volumes (n, c, d, h, w), of signals "
            f"(n, c, length); got {describe(activation)} and {describe(gradient)}."
        )
