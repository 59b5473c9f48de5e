"""Evaluation of trained models: known insertion, deletion and scores of Quantus, random weights, table and picture."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lab import evaluate, image_data
from lab import train as lab_train
from lab.models import build_model
from lab.quantus_measures import quantus_measures
from tests.tiny import TINY

torchcam = pytest.importorskip("torchcam", reason="needs Python 3.11")


class Brightness(nn.Module):
    """Its class 0 is the more likely, the more there is of the image; the map is the image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, kernel_size=1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.fc = nn.Linear(1, 2, bias=False)
        self.fc.weight.data[:] = torch.tensor([[1.0], [-1.0]])

    def forward(self, x):
        return self.fc(self.layer(x).mean(dim=(2, 3)))


def test_insertion_and_deletion_by_hand():
    # Bright in one of four pixels: its heatmap puts that first. Uncovered first, its class is sure from there on.
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 1] = 8
    areas = evaluate.insertion_and_deletion(Brightness(), "layer", [x])
    bright, blank = (torch.tensor([value, -value]).softmax(dim=0)[0].item() for value in (2.0, 0.0))
    # Probabilities at 0, 1/4, 1/2, 3/4 and 1 of the pixels, by the trapezoid rule.
    assert areas["insertion"] == pytest.approx((blank / 2 + 3.5 * bright) / 4)
    assert areas["deletion"] == pytest.approx((bright / 2 + 3.5 * blank) / 4)


def test_blank_heatmaps_have_no_areas():
    blank, bright = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 8.0)
    areas = evaluate.insertion_and_deletion(Brightness(), "layer", [blank])
    assert all(value != value for value in areas.values())
    alone, beside = (
        evaluate.insertion_and_deletion(Brightness(), "layer", [x]) for x in (bright, torch.cat([blank, bright]))
    )
    assert beside == pytest.approx(alone)


def test_random_weights_are_new_where_asked_and_leave_the_model_alone():
    torch.manual_seed(1)
    model = build_model("small_resnet", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    head = evaluate.randomize(model, model.fc).state_dict()
    whole = evaluate.randomize(model, model).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(head[name], value) == (not name.startswith("fc."))
    weights = [name for name in before if name.endswith("weight") and before[name].ndim > 1]
    assert not any(torch.equal(whole[name], before[name]) for name in weights)


def test_rank_correlation_is_that_of_ranks_and_leaves_out_flat_heatmaps():
    rising = torch.arange(4.0).reshape(1, 2, 2)
    maps = torch.cat([rising, rising, torch.zeros(1, 2, 2)])
    others = torch.cat([rising.exp(), -rising, rising])
    assert evaluate.rank_correlations(maps, others) == [pytest.approx(1), pytest.approx(-1)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    small = image_data.load_shapes(image_size=32, seed=0, train=16, validation=8)
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (lab_train, evaluate):
            patch.setattr(module, "load_data", lambda *_, **__: small)
        lab_train.main([*TINY, "--data", "shapes", "--epochs", "1", "--out", str(out), "--compare"])
        yield [str(out / name / "last.pt") for name in ("cross-entropy", "cgc")]


def test_two_models_are_evaluated_side_by_side(checkpoints, tmp_path, capsys):
    picture, found = tmp_path / "picture.png", tmp_path / "found.json"
    capsys.readouterr()
    evaluate.main([*checkpoints, "--out", str(picture), "--json", str(found), "--batch-size", "4"])
    printed = capsys.readouterr().out
    assert printed.startswith("| validation | cross-entropy | cgc |")
    titles = ["top-1 accuracy", "content heatmap", "object coverage", "pointing game", "insertion area"]
    for title in (*titles, "heatmaps of a random model"):
        assert title in printed
    assert picture.stat().st_size > 10_000
    values = json.loads(found.read_text())
    trained = torch.load(checkpoints[1], weights_only=True)["history"][-1]
    for name in ("top1", "cgc", "content_heatmap", "object_coverage", "pointing_game"):
        assert values["cgc"][name] == pytest.approx(trained[f"val_{name}"], abs=1e-5)


def test_evaluation_without_torchcam_says_what_is_left_out(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcam.methods", None)
    evaluate.main([checkpoints[0], "--out", str(tmp_path / "picture.png"), "--batch-size", "4"])
    printed = capsys.readouterr().out
    assert evaluate.NOT_INSTALLED in printed
    assert "insertion area" not in printed


def test_bad_input_is_one_sentence(checkpoints, tmp_path, monkeypatch):
    other = tmp_path / "other.pt"
    torch.save({**torch.load(checkpoints[0], weights_only=True), "image_size": 64}, other)
    few = tmp_path / "few.pt"
    torch.save({**torch.load(checkpoints[0], weights_only=True), "classes": ["a", "b"]}, few)
    cases = {
        "there is no checkpoint": [str(tmp_path / "none.pt")],
        "differ in image_size": [checkpoints[0], str(other)],
        "differ in classes": [checkpoints[0], str(few)],
        "must be the dotted name": [checkpoints[0], "--layer", "layer9"],
    }
    for message, command in cases.items():
        with pytest.raises(SystemExit, match=message):
            evaluate.main([*command, "--out", str(tmp_path / "picture.png")])
    assert not (tmp_path / "picture.png").exists()


# Grey of 1 to 2, of which the heatmap is a multiple, and so is what each pixel gives to the score.
GREY = 1 + torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
BRIGHTEST = GREY[:, 0] > GREY[:, 0].flatten(1).median(dim=1).values[:, None, None]


def measured(x, *masks):
    data = TensorDataset(x, torch.zeros(len(x)), *masks)
    return quantus_measures(Brightness(), "layer", DataLoader(data, 2), device="cpu")


def test_heatmaps_that_are_known_get_the_scores_that_they_must():
    found = measured(GREY, BRIGHTEST)
    assert found["faithfulness"] == pytest.approx(1, abs=1e-4)
    assert found["localisation"] == 1
    assert measured(GREY, ~BRIGHTEST)["localisation"] == 0
    noise = 0.2 / 3**0.5  # the deviation of what is uniform between -0.2 and 0.2
    expected = (noise * 16 / GREY.flatten(1).norm(dim=1)).mean().item()
    assert found["sensitivity"] == pytest.approx(expected, rel=0.05)


def test_blank_heatmaps_are_left_out():
    blank = torch.zeros_like(GREY)
    beside = measured(torch.stack([GREY, blank], dim=1).flatten(0, 1))
    assert beside == pytest.approx(measured(GREY), rel=0.05)
    assert set(beside) == {"faithfulness", "sensitivity"}  # no masks, no localisation
    assert measured(blank) == {}


def test_evaluation_shows_what_quantus_measures(checkpoints, tmp_path, capsys):
    found = tmp_path / "found.json"
    options = ["--quantus", "--images", "2", "--out", str(tmp_path / "picture.png"), "--json", str(found)]
    evaluate.main([*checkpoints, *options])
    assert "| relevance rank accuracy |" in capsys.readouterr().out
    for values in json.loads(found.read_text()).values():
        assert 0 <= values["localisation"] <= 1


def test_evaluation_without_quantus_says_what_to_install(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "quantus", None)
    with pytest.raises(SystemExit, match=r'error: --quantus needs quantus; run pip install "\.\[evaluation\]"'):
        evaluate.main([checkpoints[0], "--quantus", "--out", str(tmp_path / "picture.png")])
