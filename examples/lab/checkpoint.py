"""Files of a run, each written whole or not at all."""

from __future__ import annotations

import csv
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and then rename it: a crash leaves the previous one.

    Several processes may write the same file, as trainings side by side do their gallery: one of them writes it last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_figure(path: Path, figure: Figure) -> None:
    """Write a picture, in the format that its name ends in."""
    write_whole(path, lambda partial: figure.savefig(partial, format=path.suffix[1:] or "png", dpi=120))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint."""
    write_whole(path, lambda partial: torch.save(content, partial))


def load_checkpoint(path: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, or say in one sentence why that fails."""
    if not path.exists():
        raise SystemExit(f"error: there is no checkpoint {path}.")
    # torch.save writes a zip archive; of other files torch.load says all kinds of things.
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"error: {path} is not a checkpoint of this script.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"error: {path} cannot be read as a checkpoint ({type(error).__name__}).") from None
    if not isinstance(content, dict) or not {"model", "arch", "classes"} <= content.keys():
        raise SystemExit(f"error: {path} is not a checkpoint of this script.")
    return content


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Write one CSV row for each epoch."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in history for name in row)))
            writer.writeheader()
            writer.writerows(history)

    write_whole(path, write)
