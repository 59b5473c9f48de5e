"""The recipes, run as they are and without the lines that they mark as CGC's, on data small enough to wait for."""

import csv
import inspect
import random
import re
import sys
import types
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import Trainer

from cgc_reg import CGCRegularizer, RandomResizedCropFlip
from tests.marked import without_marked_lines, words_of_cgc
from tests.pages import run_blocks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is deprecated in torch and pandas, which it uses when it is imported
    import fastai.vision.all  # noqa: F401 - only so that the recipe finds it imported

try:
    from kornia.augmentation import AugmentationSequential
except ImportError:
    AugmentationSequential = None  # it needs Python 3.11

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
PAGE = FOLDER / "README.md"
# The arguments that make each recipe small.
TINY = {"images": 8, "epochs": 1, "batch_size": 4}
RECIPES = {
    "lightning_module": TINY,
    "accelerate_loop": TINY,
    "transformers_trainer": TINY,
    "timm_loop": TINY,
    "torchvision_v2_loader": {**TINY, "workers": 0},
    "semi_supervised": {"labelled_images": 4, "unlabelled_images": 8, "epochs": 1, "batch_size": 4},
    "frozen_trunk": TINY,
    "segmentation_output": TINY,
    "teacher": TINY,
    "several_labels": TINY,
    "volumes": TINY,
    "clips": TINY,
    "signals": TINY,
    "fastai_learner": TINY,
    "kornia_views": TINY,
}
SCALARS = {"loss", "weight", "positive_similarity", "negative_similarity", "margin", "blank_share"}

pytestmark = [
    # Lightning asks with a class that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # It also advises on the number of workers, of which small data needs none.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # Python's word on a loader's workers, once a logger has started a thread.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def load(name, monkeypatch, *, plain=False):
    """Import a recipe, whole or without CGC."""
    if name == "kornia_views":
        pytest.importorskip("kornia", reason="needs Python 3.11")
    source = (FOLDER / f"{name}.py").read_text()
    module = types.ModuleType(f"recipe_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    code = compile(without_marked_lines(source) if plain else source, str(FOLDER / f"{name}.py"), "exec")
    exec(code, vars(module))  # the recipe itself is under test
    return module


@pytest.fixture(autouse=True)
def _views_of_their_own(monkeypatch):
    """Draw T from a generator of its own, so that with and without CGC the images come in one order."""
    sample = RandomResizedCropFlip.sample

    def draw(self, *args, **kwargs):
        return sample(self, *args, **{**kwargs, "generator": generator})

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(RandomResizedCropFlip, "sample", draw)
    if AugmentationSequential is not None:
        forward, state = AugmentationSequential.forward, [generator.get_state()]

        def view(self, *args, **kwargs):
            with torch.random.fork_rng():
                torch.set_rng_state(state.pop())
                made = forward(self, *args, **kwargs)
                state.append(torch.get_rng_state())
            return made

        monkeypatch.setattr(AugmentationSequential, "forward", view)


@pytest.fixture(autouse=True)
def computed(monkeypatch):
    """List what `compute` returned, with the modes that it was called in."""
    compute, calls = CGCRegularizer.compute, []

    def watched(self, model, *args, **kwargs):
        modes = {"inference": torch.is_inference_mode_enabled(), "training": model.training}
        calls.append((compute(self, model, *args, **kwargs), modes))
        return calls[-1][0]

    monkeypatch.setattr(CGCRegularizer, "compute", watched)
    return calls


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Undo what Accelerate keeps for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Run:
    module: types.ModuleType
    result: object
    folder: Path
    computed: list

    @property
    def model(self):
        first = self.result[0] if isinstance(self.result, tuple) else self.result
        return first.model if isinstance(first, Trainer) else first

    def state(self):
        """Return the weights and, where CGC sees the same images, BatchNorm's statistics."""
        state = self.model.state_dict()
        if self.module.__name__ == "recipe_semi_supervised":  # whose unlabelled images only CGC sees
            return {name: state[name] for name, _ in self.model.named_parameters()}
        return state


@pytest.fixture
def run(monkeypatch, tmp_path_factory, computed):
    """Return a function that runs a recipe from one seed, whole or without CGC."""

    def run(name, *, plain=False, module=None, **changed):
        module = module or load(name, monkeypatch, plain=plain)
        folder = tmp_path_factory.mktemp(name)
        out = {"out": folder} if "out" in inspect.signature(module.main).parameters else {}
        torch.manual_seed(0)
        random.seed(0)  # fastai shuffles by it
        before = len(computed)
        result = module.main(**out, **{**RECIPES[name], **changed})
        return Run(module, result, folder, computed[before:])

    return run


FINISHED = {}


@pytest.fixture
def finished(run):
    """Return a function that gives a recipe's run with CGC, which is made once for all tests that only read it."""

    def finished(name):
        if name not in FINISHED:
            FINISHED[name] = run(name)
        return FINISHED[name]

    return finished


@pytest.fixture(scope="module", autouse=True)
def _forget_the_finished():
    yield
    FINISHED.clear()


@pytest.mark.parametrize("name", RECIPES)
def test_marked_lines_are_all_of_cgc(name, run, finished):
    whole = finished(name)
    weights = inspect.signature(whole.module.main).parameters.keys() & {"lam", "mu"}
    weightless = run(name, **dict.fromkeys(weights, 0.0))
    plain, zero, with_it = (one.state() for one in (run(name, plain=True), weightless, whole))
    assert all(value.isfinite().all() for value in with_it.values())
    for key in plain:
        assert torch.equal(plain[key], zero[key]), key
    trained = [key for key in plain if key.endswith(("weight", "bias"))]
    assert any(not torch.equal(zero[key], with_it[key]) for key in trained)


@pytest.mark.parametrize("name", RECIPES)
def test_unmarked_lines_say_nothing_of_cgc(name):
    assert not words_of_cgc(without_marked_lines((FOLDER / f"{name}.py").read_text()))


@pytest.mark.parametrize("name", RECIPES)
def test_page_lists_each_recipe_with_its_command(name, monkeypatch):
    command = f"python examples/recipes/{name}.py"
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}.py` |"))
    assert row.endswith(f"| `{command}` |")
    assert "| `pip install . " in row or "| `pip install .` |" in row
    module = load(name, monkeypatch)
    assert f"    {command}\n" in module.__doc__
    inspect.signature(module.main).bind()  # the command gives no arguments


def test_every_recipe_is_listed_and_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(RECIPES)
    assert set(re.findall(r"^\| `(\w+)\.py` \|", PAGE.read_text(), re.MULTILINE)) == set(RECIPES)


def test_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torchvision.models.resnet18(num_classes=3)
    names = {
        "model": model,
        "loader": [(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))] * 2,
        "reg": CGCRegularizer("layer4"),
        "lam": 0.5,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "images": torch.rand(2, 3, 64, 64),
        "labels": torch.tensor([0, 1]),
        "masks": torch.ones(2, 64, 64, dtype=torch.bool),
        "device": "cpu",
    }
    run_blocks(PAGE, names)
    assert_scalars(events(tmp_path), "train/cgc_", steps=2)
    (table,) = tmp_path.rglob("*.csv")
    assert_scalars(rows(table), "cgc_", steps=2)


def events(folder):
    """Read what TensorBoard would show: the values of each name."""
    found = defaultdict(list)
    for path in folder.rglob("events.out.tfevents.*"):
        log = EventAccumulator(str(path)).Reload()
        for name in log.Tags()["scalars"]:
            found[name] += [event.value for event in log.Scalars(name)]
    return found


def rows(path):
    """Read a CSV file: the values of each column, without empty cells."""
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0]}


def assert_scalars(values, prefix, *, steps):
    """All scalars arrived, one for each step, and the margin is what it is by definition."""
    assert {name.removeprefix(prefix) for name in values if name.startswith(prefix)} == SCALARS
    columns = {name: torch.tensor(values[prefix + name]) for name in SCALARS}
    assert all(len(column) == steps and column.isfinite().all() for column in columns.values())
    difference = columns["positive_similarity"] - columns["negative_similarity"]
    assert torch.allclose(columns["margin"], difference, atol=1e-6)


def test_lightning_logs_to_tensorboard_and_csv(finished):
    folder = finished("lightning_module").folder
    (table,) = folder.rglob("metrics.csv")
    for values in (events(folder), rows(table)):
        assert_scalars(values, "train/cgc_", steps=2)
        assert_scalars(values, "val/cgc_", steps=2)  # within `fit`, and after it


def test_lightning_validates_in_inference_mode(finished):
    validation = [(out, modes) for out, modes in finished("lightning_module").computed if not modes["training"]]
    assert {modes["inference"] for _, modes in validation} == {False, True}  # within `fit`, and after it
    assert all(out.loss.isfinite() for out, _ in validation)


def test_lightning_checkpoints_fit_with_and_without_cgc(finished, monkeypatch):
    plain = load("lightning_module", monkeypatch, plain=True).Classifier()
    plain.load_state_dict(finished("lightning_module").result.state_dict())


def test_accelerate_tracks_scalars(finished):
    assert_scalars(events(finished("accelerate_loop").folder), "train/cgc_", steps=2)


def test_accelerate_tracks_scalars_in_mixed_precision(run):
    bfloat16 = run("accelerate_loop", mixed_precision="bf16")
    assert_scalars(events(bfloat16.folder), "train/cgc_", steps=2)
    assert {out.query.dtype for out, _ in bfloat16.computed} == {torch.float32}


def test_trainer_logs_scalars_of_training_alone(finished):
    values = events(finished("transformers_trainer").folder)
    assert_scalars(values, "train/cgc_", steps=2)
    assert "eval/loss" in values
    assert not any(name.startswith("eval/cgc") for name in values)


def test_trainer_keeps_scalars_for_the_next_log_of_training(run):
    trainer = run("transformers_trainer").result
    trainer.scalars.append({"margin": torch.tensor(0.25)})
    trainer.log({"eval_loss": 1.0})
    trainer.scalars.append({"margin": torch.tensor(0.75)})
    trainer.log({"loss": 1.0})
    evaluation, training = trainer.state.log_history[-2:]
    assert "cgc_margin" not in evaluation
    assert training["cgc_margin"] == 0.5


class Unlabelled(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 64, 64), index / 5)}


def test_trainer_evaluates_as_ever(run):
    one = run("transformers_trainer")
    trainer, data = one.result, one.module.ToyImages(5)  # in batches of 4 the last one holds one image
    assert trainer.predict(Unlabelled()).predictions.shape == (5, 3)
    plain = Trainer(trainer.model, trainer.args, eval_dataset=data, compute_metrics=one.module.accuracy)
    for key in ("eval_loss", "eval_accuracy"):
        assert trainer.evaluate(data)[key] == plain.evaluate(data)[key]


def test_trainer_takes_a_last_batch_of_one_image(run):
    trainer = run("transformers_trainer", images=5).result
    assert [set(log) >= {"loss", "cgc_loss"} for log in trainer.state.log_history[:2]] == [True, False]
    assert trainer.state.log_history[1]["loss"] > 0


def test_trainer_smooths_labels_as_ever(run):
    one = run("transformers_trainer", lam=0.0)
    trainer, data = one.result, one.module.ToyImages(4)
    trainer.args.label_smoothing_factor = 0.2
    plain = Trainer(trainer.model, trainer.args, eval_dataset=data)
    trainer.model.train()
    losses = [each.compute_loss(trainer.model, {"pixel_values": data.x, "labels": data.y}) for each in (trainer, plain)]
    assert torch.allclose(*losses)


def test_trainer_averages_over_accumulated_steps(run, monkeypatch):
    """Where all images are one, the gradient of an accumulated step is that of a single one."""
    module = load("transformers_trainer", monkeypatch)

    class OneImage(module.ToyImages):
        def __init__(self, count):
            super().__init__(1)
            self.x, self.y = self.x.expand(count, -1, -1, -1), self.y.expand(count)

    monkeypatch.setattr(module, "ToyImages", OneImage)
    trainings = [
        run("transformers_trainer", module=module, accumulate=accumulate, lam=0.0).result for accumulate in (1, 2)
    ]
    for key in ("grad_norm", "loss"):
        single, accumulated = (trainer.state.log_history[0][key] for trainer in trainings)
        assert single == pytest.approx(accumulated, rel=1e-4)


def test_timm_average_of_weights_lags_behind(finished):
    model, ema = finished("timm_loop").result
    average, last = ema.module.state_dict(), model.state_dict()
    assert average.keys() == last.keys()
    assert all(value.isfinite().all() for value in average.values())
    assert all(not torch.equal(average[name], last[name]) for name, _ in model.named_parameters())


def test_timm_loop_makes_heatmaps_in_float32(finished):
    made = [out for out, _ in finished("timm_loop").computed]
    assert {out.logits.dtype for out in made} == {torch.float16 if torch.cuda.is_available() else torch.bfloat16}
    assert {tensor.dtype for out in made for tensor in (out.query, out.key, out.loss)} == {torch.float32}


def test_workers_give_images_and_the_device_draws_views(run):
    one = run("torchvision_v2_loader", workers=1)
    device = next(one.model.parameters()).device
    made = [out for out, _ in one.computed]
    assert {tensor.device for out in made for tensor in (out.view, out.transform.theta)} == {device}
    thetas = torch.cat([out.transform.theta for out in made])
    assert len(thetas.unique(dim=0)) == len(thetas) == RECIPES["torchvision_v2_loader"]["images"]


def test_semi_supervised_writes_scalars_beside_the_cross_entropy(finished):
    values = rows(finished("semi_supervised").folder / "metrics.csv")
    assert values["step"] == [0, 1]
    assert_scalars(values, "cgc_", steps=2)
    assert len(values["cross_entropy"]) == 2


def test_frozen_trunk_is_bit_identical(finished):
    model, before = finished("frozen_trunk").result
    trained = ("layer4", "fc")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(trained), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(trained), name


def test_segmentation_runs_the_model_twice_a_step(run, monkeypatch):
    module = load("segmentation_output", monkeypatch)
    make, training = module.lraspp_mobilenet_v3_large, []

    def watched(**options):
        model = make(**options)
        model.register_forward_hook(lambda model, args, output: training.append(model.training))
        return model

    monkeypatch.setattr(module, "lraspp_mobilenet_v3_large", watched)
    run("segmentation_output", module=module)
    assert training.count(True) == 2 * 2  # in two steps


def test_fastai_takes_two_passes_a_step_and_keeps_no_hook(run, monkeypatch):
    module, seen = load("fastai_learner", monkeypatch), []
    whole = module.resnet18

    def watched(**options):
        model = whole(**options)
        model.register_forward_hook(lambda model, args, output: seen.append(model.training))
        return model

    module.resnet18 = watched
    made = run("fastai_learner", module=module)
    assert seen == [True] * 4 + [False]  # the Learner's pass over x and CGC's over the view, in both steps; validation
    assert not made.model._forward_pre_hooks
    (row,) = csv.DictReader((made.folder / "metrics.csv").read_text().splitlines())
    assert float(row["valid_loss"]) > 0
