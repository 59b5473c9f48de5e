"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

# What stands between that line and a warning: this package, torch's call of a module, a context manager's generator.
_BETWEEN = (f"{Path(__file__).parent}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)


def warn(message: str) -> None:
    """Warn at the line that called into this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
