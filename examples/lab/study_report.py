"""Tables and a picture of a study's results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from scipy.stats import t as student

from lab.comparison import TITLES
from lab.study_config import Setting, Study

Runs = Mapping[Setting, Mapping[int, Mapping[str, float]]]  # setting -> seed -> what was found
ACCURACIES = ("top1", "top5", "balanced_accuracy")
GAINS = ("cgc", "margin", "content_heatmap")  # what CGC raises or lowers in each study: a share of it can be kept


def study_report(study: Study, runs: Runs) -> str:
    """Write the tables in Markdown."""
    runs = {setting: found for setting, found in runs.items() if found}
    if not runs:
        return "There are no results yet."
    parts = [f"{study.title}. Mean (lowest to highest) over {count_seeds(runs)} seeds:", values_table(study, runs)]
    differences = differences_table(study, runs)
    if differences:
        parts += ["Difference from the baseline, paired by seed, with its 95 % confidence interval:", differences]
    if study.full:
        parts += ["Share kept of the whole gain over the baseline, seed by seed:", gains_table(study, runs)]
    return "\n\n".join(parts)


def count_seeds(runs: Runs) -> str:
    counts = sorted({len(found) for found in runs.values()})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def values_table(study: Study, runs: Runs) -> str:
    rows = [
        [setting.name, *(spread([one[metric] for one in found.values()]) for metric in study.metrics)]
        for setting, found in runs.items()
    ]
    return table(["training", *(TITLES[metric] for metric in study.metrics)], rows)


def differences_table(study: Study, runs: Runs) -> str:
    """Compare each setting with its baseline, and its accuracy with the best one too; "" where none has a baseline."""
    rows = [
        [
            setting.name,
            setting.baseline,
            *(
                interval(differences(runs, setting, metric, baselines or [setting.baseline]))
                for _, metric, baselines in comparisons(study)
            ),
        ]
        for setting in runs
        if setting.baseline is not None
    ]
    return table(["training", "baseline", *(title for title, _, _ in comparisons(study))], rows) if rows else ""


def comparisons(study: Study) -> list[tuple[str, str, Sequence[str]]]:
    """Return title, metric and baselines of each difference in the report; no baselines stand for the setting's own."""
    found: list[tuple[str, str, Sequence[str]]] = []
    for metric in study.metrics:
        found.append((TITLES[metric], metric, ()))
        if metric in ACCURACIES and study.accuracy_baselines:
            found.append((f"{TITLES[metric]} (best baseline)", metric, study.accuracy_baselines))
    return found


def differences(runs: Runs, setting: Setting, metric: str, baselines: Sequence[str]) -> list[float]:
    """Return a metric's difference from the best of the baselines, for the seeds that both have."""
    candidates = [values for other, values in runs.items() if other.name in baselines]
    if not candidates:
        return []
    baseline = max(candidates, key=lambda values: statistics.mean(one[metric] for one in values.values()))
    own = runs[setting]
    return [own[seed][metric] - baseline[seed][metric] for seed in own if seed in baseline]


def gains_table(study: Study, runs: Runs) -> str:
    """Tell what share of the whole gain over its baseline each setting keeps, for the seeds that all settings have."""
    whole = {setting.baseline: setting for setting in runs if setting.name in study.full}
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    runs = {setting: {seed: found[seed] for seed in seeds} for setting, found in runs.items()}
    metrics = [metric for metric in study.metrics if metric in GAINS]
    rows = []
    for setting in runs:
        if seeds and setting.baseline in whole:
            cells = []
            for metric in metrics:
                full, own = (
                    differences(runs, one, metric, [one.baseline or ""]) for one in (whole[setting.baseline], setting)
                )
                cells.append(spread([a / b for a, b in zip(own, full, strict=True)]))
            rows.append([setting.name, *cells])
    return table(["training", *(TITLES[metric] for metric in metrics)], rows) if rows else ""


def spread(values: Sequence[float]) -> str:
    """Write the mean, and the lowest and highest value."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def interval(values: Sequence[float]) -> str:
    """Write the mean and Student's interval that holds the true one with 95 % confidence."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def draw_study(study: Study, runs: Runs) -> Figure:
    """Draw a panel for each metric, at most four side by side: curves over x where settings have one, else dots."""
    runs = {setting: found for setting, found in runs.items() if found}
    curves = [setting for setting in runs if setting.x is not None]
    places = sorted({setting.x for setting in curves if setting.x is not None})
    rows = -(-len(study.metrics) // 4)
    columns = -(-len(study.metrics) // rows)
    width, height = 3.4 * columns + (0 if curves else 2.2), 3.4 if curves else 0.32 * len(runs) + 1.1
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=not curves).flatten().tolist()
    for axis in axes[len(study.metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes, study.metrics, strict=False):
        values = {setting: [one[metric] for one in found.values()] for setting, found in runs.items()}
        if curves:
            for line in dict.fromkeys(setting.line for setting in curves):
                points = sorted((one.x or 0.0, values[one]) for one in curves if one.line == line)
                x = [place for place, _ in points]
                axis.plot(x, [statistics.mean(several) for _, several in points], marker="o", label=line)
                axis.fill_between(x, *zip(*((min(v), max(v)) for _, v in points), strict=True), alpha=0.15)
            for setting in runs:
                if setting.x is None:
                    axis.axhline(statistics.mean(values[setting]), color="grey", linestyle="--", label=setting.name)
            axis.set_xlabel(study.x_axis or "")
            axis.set_xscale("log" if places[0] > 0 else "linear")
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.minorticks_off()
        else:
            for row, several in enumerate(values.values()):
                axis.plot(several, [row] * len(several), "o", alpha=0.5, color="C0")
                axis.plot(statistics.mean(several), row, "|", markersize=14, color="black")
            axis.set_yticks(range(len(runs)), [setting.name for setting in runs])
        axis.set_title(TITLES[metric], fontsize=10)
        axis.grid(alpha=0.3)
    if curves:
        axes[0].legend(fontsize=7)
    else:
        axes[0].invert_yaxis()
    return figure
