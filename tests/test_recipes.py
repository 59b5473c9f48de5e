"""Each recipe runs on a few images, CGC reaches what it trains, and its numbers arrive where they are logged."""

import csv
import importlib.util
import io
import math
import re
from pathlib import Path

import pytest
import timm
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
LOGGING = {"lightning_module", "accelerate_loop", "transformers_trainer", "semi_supervised"}
LIGHTNINGS_OWN = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # its use of torch
SCALARS = {"loss", "positive_similarity", "negative_similarity", "margin", "blank_share"}


def run(name, tmp_path, *options):
    """Run a recipe in this process, as its command line does, and return what its `main` returns."""
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", FOLDER / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    torch.manual_seed(0)
    small = ["--images", "16", "--image-size", "64", "--batch-size", "8", "--epochs", "1"]
    if name in LOGGING:
        small += ["--out", str(tmp_path / "out")]
    if name == "semi_supervised":
        small += ["--labeled-fraction", "0.5"]
    return recipe.main([*small, *options])


def model_of(returned):
    """Find the trained model in what a recipe's `main` returns."""
    first = returned[0] if isinstance(returned, tuple) else returned
    return first if isinstance(first, torch.nn.Module) else first.model


def events(folder):
    """Return the numbers of all TensorBoard files in a folder: tag -> values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.rglob("*tfevents*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


@LIGHTNINGS_OWN
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_and_cgc_changes_what_is_trained(name, tmp_path):
    with_cgc = model_of(run(name, tmp_path / "with"))
    without = model_of(run(name, tmp_path / "without", "--lam", "0"))
    again = model_of(run(name, tmp_path / "again", "--lam", "0"))
    pairs = list(zip(with_cgc.parameters(), without.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter, _ in pairs)
    assert any(not parameter.equal(other) for parameter, other in pairs)
    assert all(a.equal(b) for a, b in zip(without.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_added_lines_are_marked(name):
    source = (FOLDER / f"{name}.py").read_text()
    added = [line for line in source.splitlines() if re.search(r"\breg\b|out\.(loss|scalars)|cgc_reg", line)]
    assert len(added) >= 4
    assert [line for line in added if "# CGC" not in line] == []


def test_readme_names_each_recipe():
    page = (FOLDER / "README.md").read_text()
    assert sorted(set(re.findall(r"python examples/recipes/(\w+)\.py", page))) == RECIPES


@LIGHTNINGS_OWN
def test_lightning_logs_to_tensorboard_and_csv_and_measures_in_inference_mode(tmp_path):
    run("lightning_module", tmp_path)
    (path,) = (tmp_path / "out" / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    written = events(tmp_path / "out" / "tensorboard")
    for part in ("train", "val"):
        for name in SCALARS:
            values = [float(row[f"{part}/cgc_{name}"]) for row in rows if row[f"{part}/cgc_{name}"]]
            assert values == pytest.approx(written[f"{part}/cgc_{name}"])
            assert all(map(math.isfinite, values))


def test_accelerate_logs_each_step(tmp_path):
    run("accelerate_loop", tmp_path)
    written = events(tmp_path / "out")
    assert {f"cgc/{name}" for name in SCALARS} <= written.keys()
    assert all(len(written[f"cgc/{name}"]) == 2 for name in SCALARS)


def test_trainer_logs_and_evaluates(tmp_path):
    trainer = run("transformers_trainer", tmp_path)
    written = events(tmp_path / "out")
    assert {f"train/cgc_{name}" for name in SCALARS} <= written.keys()
    assert all(map(math.isfinite, written["eval/loss"]))
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (16, 10)


def test_semi_supervised_writes_a_line_for_each_step(tmp_path):
    run("semi_supervised", tmp_path)
    (row,) = csv.DictReader(io.StringIO((tmp_path / "out" / "steps.csv").read_text()))
    assert row.keys() == SCALARS | {"cross_entropy"}
    assert all(math.isfinite(float(value)) for value in row.values())
    margin = float(row["positive_similarity"]) - float(row["negative_similarity"])
    assert float(row["margin"]) == pytest.approx(margin, abs=1e-6)


def test_average_of_the_weights_lags_behind_them(tmp_path):
    model, ema = run("timm_loop", tmp_path)
    torch.manual_seed(0)
    start = timm.create_model("resnet18", num_classes=10)
    assert all(tensor.isfinite().all() for tensor in ema.module.state_dict().values())
    moved, lagging = ((net.fc.weight - start.fc.weight).norm() for net in (model, ema.module))
    assert 0 < lagging < moved


def test_frozen_trunk_stays_as_it_is(tmp_path):
    model, before = run("frozen_trunk", tmp_path)
    for name, tensor in model.state_dict().items():
        trained = name.startswith(("layer4", "fc"))
        assert tensor.equal(before[name]) != trained, name
