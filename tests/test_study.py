"""Studies: each training once, intervals by hand, and that the documentation holds what the results say."""

import json
import math
import re
from pathlib import Path

import pytest

from lab import __main__ as command_line
from lab import study, study_report
from lab import train as lab_train
from lab.checkpoint import load_checkpoint, save_checkpoint
from lab.comparison import TITLES
from lab.study_config import Setting, Study, read_study
from tests.tiny import write_images

EXPERIMENTS = Path(study.__file__).parent / "experiments"
ROOT = Path(__file__).parents[1]
STUDIES = sorted(EXPERIMENTS.glob("*.toml"))


def results_of(path):
    return EXPERIMENTS / "results" / f"{path.stem}.jsonl"


MADE = [path for path in STUDIES if results_of(path).exists()]
TINY = """
title = "Tiny"
common = "--data {folder} --arch small_resnet --image-size 32 --batch-size 4 --epochs 1 --workers 0"
seeds = [0, 1]
metrics = ["top1", "cgc"]
evaluate = "--images 2"

[[settings]]
name = "plain"
options = "--lam 0"

[[settings]]
name = "CGC"
options = "--lam 0.5"
baseline = "plain"
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(folder=write_images(tmp_path / "images")))
    return path


@pytest.fixture
def _in_this_process(monkeypatch):
    """Save some ten starts of Python; a training in a process of its own is test_lab_training's."""
    monkeypatch.setattr(study, "run_script", lambda command, **_: command_line.main(list(map(str, command[2:]))))


@pytest.mark.usefixtures("_in_this_process")
def test_study_makes_each_training_once(tiny, tmp_path, capsys):
    command = [str(tiny), "--out", str(tmp_path / "runs"), "--picture", str(tmp_path / "picture.png"), "--jobs", "1"]
    study.main([str(tiny), "--report"])
    assert capsys.readouterr().out == "There are no results yet.\n"
    study.main([*command, "--seeds", "0"])
    first = (tmp_path / "results" / "tiny.jsonl").read_text()
    study.main(command)
    report = capsys.readouterr().out
    both = (tmp_path / "results" / "tiny.jsonl").read_text()
    assert both.startswith(first)
    rows = [json.loads(line) for line in both.splitlines()]
    minutes = sum(row["seconds"] for row in rows) / 60
    assert f"4 trainings of its own, one thread each: {minutes:.0f} min in sequence." in report
    assert sorted((row["setting"], row["seed"]) for row in rows) == [("CGC", 0), ("CGC", 1), ("plain", 0), ("plain", 1)]
    assert "over 2 seeds" in report
    values = [row["found"]["cgc"] for row in rows if row["setting"] == "CGC"]
    assert f"{sum(values) / 2:.3f} ({min(values):.3f} to {max(values):.3f})" in report
    assert (tmp_path / "picture.png").stat().st_size > 5_000
    study.main([*command, "--report"])
    study.main(command)
    assert (tmp_path / "results" / "tiny.jsonl").read_text() == both


@pytest.mark.usefixtures("_in_this_process")
def test_an_interrupted_training_counts_with_the_epochs_that_it_had_made(tiny, tmp_path):
    made = read_study(tiny)
    plain = made.settings[0]
    place = tmp_path / "runs" / "0-0"
    options = made.options_of(plain).split()
    lab_train.main([*options, "--seed", "0", "--out", str(place)])
    (last,) = place.glob("*/last.pt")
    state = load_checkpoint(last, device="cpu")
    state["history"][0]["seconds"] = 12345.0
    save_checkpoint(last, state)
    assert study.train(made, plain, 0, place, print)["seconds"] > 12345


def settings(*names, **options):
    return [Setting(name, f"--{name}", **options) for name in names]


def make(found, metrics=("top1",), **options):
    """Build a study and its runs from setting -> one value a seed; all but the first go beside the first."""
    first, *others = found
    all_settings = [Setting(first, ""), *settings(*others, baseline=first)]
    made = Study("Title", "", [0, 1, 2], list(metrics), all_settings, **options)
    values = {one: {seed: dict.fromkeys(metrics, v) for seed, v in enumerate(found[one.name])} for one in all_settings}
    return made, values


def test_difference_is_paired_and_has_students_interval():
    made, runs = make({"plain": [0.1, 0.2, 0.6], "other": [0.2, 0.4, 0.9]})
    # Differences 0.1, 0.2 and 0.3: mean 0.2, standard deviation 0.1, and t(0.975) with two degrees of freedom is 4.303.
    half = 4.303 * 0.1 / math.sqrt(3)
    assert f"+0.200 ({0.2 - half:+.3f} to {0.2 + half:+.3f})" in study_report.study_report(made, runs)


def test_accuracy_is_compared_with_the_best_baseline():
    found = {"one view": [0.5, 0.5], "two views": [0.6, 0.7], "CGC": [0.7, 0.7]}
    made, runs = make(found, metrics=("top1", "cgc"), accuracy_baselines=("one view", "two views"))
    cgc = made.settings[-1]
    assert study_report.differences(runs, cgc, "top1", made.accuracy_baselines) == pytest.approx([0.1, 0.0])
    assert study_report.differences(runs, cgc, "cgc", ["one view"]) == pytest.approx([0.2, 0.2])
    header, _, *rows = study_report.differences_table(made, runs).splitlines()
    own, best, loss = (re.split(r" *\| *", rows[-1])[i] for i in (3, 4, 5))
    assert "| top-1 accuracy | top-1 accuracy (best baseline) | CGC loss |" in header
    assert [one.split(" ")[0] for one in (own, best, loss)] == ["+0.200", "+0.050", "+0.200"]


def test_gain_kept_is_a_share_of_the_whole_gain():
    made, runs = make({"plain": [1.0, 2.0], "whole": [2.0, 4.0], "half": [1.5, 2.5]}, full=("whole",), metrics=("cgc",))
    assert "| half | 0.375 (0.250 to 0.500) |" in study_report.study_report(made, runs)
    # A seed that one setting lacks counts for none; the others stay in step.
    made, runs = make({"plain": [1.0, 2.0], "whole": [2.0, 4.0], "half": [1.5, 2.5]}, full=("whole",), metrics=("cgc",))
    del runs[made.settings[2]][0]
    report = study_report.study_report(made, runs)
    assert "| half | 0.250 (0.250 to 0.250) |" in report
    assert "| whole | 1.000 (1.000 to 1.000) |" in report
    # Of accuracy there is no whole gain to have a share of.
    made, runs = make({"plain": [1.0], "whole": [1.0]}, full=("whole",))
    assert "| whole | 0" not in study_report.study_report(made, runs)


def test_seeds_that_one_side_lacks_are_left_out():
    made, runs = make({"plain": [1.0], "other": [1.5, 9.0]})
    assert study_report.differences(runs, made.settings[1], "top1", ["plain"]) == [0.5]


def test_curves_go_through_the_mean_at_each_place():
    baseline, *others = (
        Setting("plain", ""),
        *(Setting(f"lam {x}", "", "plain", x=x, line="CGC") for x in (2.0, 0.1, 0.5)),
    )
    made = Study("Title", "", [0, 1], ["top1"], [baseline, *others], x_axis="lam")
    runs = {one: {0: {"top1": (one.x or 0.0) - 0.1}, 1: {"top1": (one.x or 0.0) + 0.1}} for one in made.settings}
    (axis,) = study_report.draw_study(made, runs).axes
    curve, level = axis.get_lines()
    assert curve.get_xydata().ravel().tolist() == pytest.approx([0.1, 0.1, 0.5, 0.5, 2.0, 2.0])
    assert level.get_ydata() == pytest.approx([0.0, 0.0])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.1", "0.5", "2"]
    assert (axis.get_xlabel(), axis.get_xscale()) == ("lam", "log")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "is not a study"),
        ("colour = 1", "is not a study .*colour"),
        ('title = "a"\ncommon = ""\nseeds = [0]\nmetrics = []', "must name its settings"),
        (TINY.replace('baseline = "plain"', 'baseline = "plan"'), "must name its settings apart, and their baselines"),
        (TINY.replace('name = "CGC"', 'name = "plain"'), "must name its settings apart"),
    ],
)
def test_bad_study_is_one_sentence(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        study.main([str(tmp_path / "bad.toml"), "--report"])


def test_training_of_another_study_counts_whatever_the_order_of_its_options(tmp_path):
    row = {"options": "--epochs 3 --data shapes --lam 1", "seed": 0, "found": {"top1": 0.5}}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    results = study.Results(tmp_path / "own.jsonl")
    assert results.find("--lam 1.0 --data shapes --epochs 3", 0, ["top1"]) == {"top1": 0.5}
    assert results.find("--lam 1.0 --data shapes --epochs 3", 0, ["top1", "cgc"]) is None
    assert results.find("--lam 1.0 --data shapes --epochs 3", 1, ["top1"]) is None
    assert results.find("--lam 1.0 --data shapes --epochs 4", 0, ["top1"]) is None
    results.add({**row, "seed": 1})
    assert (tmp_path / "other.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_holds_options_and_measures_that_there_are(path):
    made = read_study(path)
    assert len({tuple(study.decisive(made.options_of(one)).items()) for one in made.settings}) == len(made.settings)
    assert set(made.metrics) <= TITLES.keys()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_documentation_holds_the_report_of_each_study(path):
    made, results = read_study(path), study.Results(results_of(path))
    report = study_report.study_report(made, study.runs_of(made, results))
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
    assert [line for line in report.splitlines() if line.startswith("|") and line not in pages] == []


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_recorded_trainings_are_not_made_anew(path, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("a training was made anew"))
    made = read_study(path)
    study.run_study(made, study.Results(results_of(path)), tmp_path, seeds=made.seeds, jobs=1)


def test_unknown_option_in_a_study_is_named_as_one_of_the_training(tmp_path, capsys):
    (tmp_path / "bad.toml").write_text(TINY.replace("--lam 0.5", "--lambda 0.5"))
    with pytest.raises(SystemExit):
        study.main([str(tmp_path / "bad.toml"), "--out", str(tmp_path / "runs")])
    assert "python -m lab train: error: unrecognized arguments: --lambda 0.5" in capsys.readouterr().err
