"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

# What stands between that line and a warning: this package, torch's call of a module, a context manager's generator.
_BETWEEN = (f"{Path(__file__).parent}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)

# What was said of a model.
_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(message: str, model: nn.Module) -> None:
    """Warn at the line that called into this package, unless this was said of the model before."""
    said = _SAID.setdefault(model, set())
    if message not in said:
        said.add(message)
        warn(message)


def warn(message: str) -> None:
    """Warn at the line that called into this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
