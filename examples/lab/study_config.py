"""The file of a study: what is trained, and how it is compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: how the report calls it.
        options: of `python -m lab train`, beside the study's own.
        baseline: the setting that it is compared with, seed by seed.
        x: its place on the axis of the picture, in studies that vary a number.
        line: the curve that it is a point of.
    """

    name: str
    options: str
    baseline: str | None = None
    x: float | None = None
    line: str | None = None


@dataclass(frozen=True)
class Study:
    """What a file of experiments/ says.

    Attributes:
        title: of the report.
        common: options of all trainings.
        seeds: of data, initialisation and order.
        metrics: the columns of the report, by the names that `python -m lab evaluate` gives them.
        settings: what is compared.
        evaluate: options of `python -m lab evaluate`. A training of another study with the same options, of which as
            much was measured, counts here too, so studies that share trainings must evaluate them alike.
        x_axis: what `x` is.
        accuracy_baselines: accuracies are compared with the best of these, instead of with each setting's baseline.
        full: settings whose gain over their baseline is the whole gain, where the report tells what others beside the
            same baseline keep of it.
    """

    title: str
    common: str
    seeds: list[int]
    metrics: list[str]
    settings: list[Setting]
    evaluate: str = "--images 128"
    x_axis: str | None = None
    accuracy_baselines: tuple[str, ...] = ()
    full: tuple[str, ...] = ()

    def options_of(self, setting: Setting) -> str:
        return f"{self.common} {setting.options}".strip()


def read_study(path: Path) -> Study:
    """Read a study, or say in one sentence what is wrong with it."""
    try:
        content = tomllib.loads(path.read_text())
        study = Study(**content | {"settings": [Setting(**setting) for setting in content.get("settings", [])]})
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise SystemExit(f"error: {path} is not a study ({error}).") from None
    names = [setting.name for setting in study.settings]
    mentioned = {*(setting.baseline for setting in study.settings), *study.full, *study.accuracy_baselines}
    if not names or len(set(names)) < len(names) or mentioned - {*names, None}:
        raise SystemExit(f"error: {path} must name its settings apart, and their baselines as them; got {names}.")
    return study
