"""The lab's command line: its commands, pictures of a trained model, a summary over runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab import __main__ as command_line
from lab import dimensions, explanations, image_data, jobs, summarize, teacher, visualize
from lab import train as lab_train
from tests.tiny import TINY, history, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Two trainings with and without CGC, from different seeds."""
    root = tmp_path_factory.mktemp("trained")
    outs = [root / str(seed) for seed in range(2)]
    for seed, out in enumerate(outs):
        options = ["--data", str(folder), "--out", str(out), "--epochs", "1", "--compare", "--seed", str(seed)]
        lab_train.main([*TINY, *options])
    return outs


def test_help_lists_the_commands_and_each_has_its_own(capsys):
    assert command_line.COMMANDS
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    printed = capsys.readouterr().out
    for name, about in command_line.COMMANDS.items():
        assert f"  {name:12} {about}\n" in printed
        if name != "notebook":  # whose packages warn in ways that are not ours
            with pytest.raises(SystemExit):
                command_line.main([name, "--help"])
            assert f"usage: python -m lab {name} " in capsys.readouterr().out


def test_unknown_command_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["trian"])
    assert "invalid choice: 'trian' (choose from" in capsys.readouterr().err


def test_command_line_runs_as_a_module_of_examples():
    command = [sys.executable, "-m", "lab", "summarize", "nowhere"]
    made = subprocess.run(command, cwd=jobs.EXAMPLES, capture_output=True, text=True)
    assert made.returncode == 1
    missing = Path("nowhere/cross-entropy/metrics.csv")
    assert made.stderr == f"error: {missing} is missing; the run must be made with --compare.\n"


def test_visualize_draws_images_and_folders(folder, trained, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    image = folder / "val" / "n01440764" / "0.JPEG"
    visualize.main([str(trained[0] / "cgc" / "last.pt"), str(image), str(folder / "train"), "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    assert f"{image}: n0" in capsys.readouterr().out


def test_visualize_refuses_bad_input(folder, trained, tmp_path):
    good, picture = str(trained[0] / "cgc" / "last.pt"), tmp_path / "picture.png"
    (tmp_path / "empty").mkdir()
    not_a_checkpoint = tmp_path / "text.pt"
    not_a_checkpoint.write_text("text")
    cut_off = tmp_path / "cut.pt"
    cut_off.write_bytes(Path(good).read_bytes()[:-1000])
    cases = {
        "cut.pt is not a checkpoint": [str(cut_off), str(folder)],
        "there is no checkpoint": [str(tmp_path / "none.pt"), str(folder)],
        "text.pt is not a checkpoint": [str(not_a_checkpoint), str(folder)],
        "there is no file or folder": [good, str(tmp_path / "none")],
        "no images found": [good, str(tmp_path / "empty")],
        "text.pt cannot be read": [good, str(not_a_checkpoint)],
        "must be the dotted name": [good, str(folder), "--layer", "layer9"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit, match=message):
            visualize.main([*arguments, "--out", str(picture)])
    assert not picture.exists()


def test_visualize_reads_as_a_viewer_shows(trained, tmp_path, monkeypatch):
    """A ramp of grey, in files of 8 and of 16 bits, and turned; hidden files are left out."""
    ramp = np.arange(40, dtype=np.uint8)[None].repeat(40, axis=0) * 6
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "0.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "1.tif")
    Image.fromarray(np.rot90(ramp).copy()).save(tmp_path / "2.png", exif=turned)
    (tmp_path / "._0.png").write_bytes(b"of macOS")
    drawn = {}
    monkeypatch.setattr(visualize, "gallery", drawn.update)
    monkeypatch.setattr(visualize, "write_figure", lambda path, figure: None)
    visualize.main([str(trained[0] / "cgc" / "last.pt"), str(tmp_path)])
    first, second, third = drawn["image"]
    assert first.max() - first.min() > 0.8
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_visualize_knows_its_rules(folder, trained, capsys):
    with pytest.raises(SystemExit):
        visualize.main([str(trained[0] / "cgc" / "last.pt"), str(folder), "--heatmap", "cam"])
    assert "invalid choice: 'cam' (choose from" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:FullGrad looks through every BatchNorm")
def test_each_explanation_is_measured_as_itself(tmp_path, capsys, monkeypatch):
    few = image_data.load_shapes(image_size=64, seed=0, train=64, validation=64)
    for module in (lab_train, explanations):
        monkeypatch.setattr(module, "load_data", lambda *_, **__: few)
    command = ["--epochs", "2", "--train-images", "64", "--rules", "layer_cam", "full_grad", "--out", str(tmp_path)]
    explanations.main(command)
    *_, header, _, layer_cam, full_grad = capsys.readouterr().out.strip().splitlines()
    assert header.startswith(
        "| explanation | CGC loss, cross-entropy | CGC loss, + CGC | content heatmap, cross-entropy"
    )
    found = [[float(value) for value in row.split("|")[2:-1]] for row in (layer_cam, full_grad)]
    # Both were measured on one network without CGC, whose accuracy is one, and differ in all that is of heatmaps.
    assert found[0][4] == found[1][4]
    assert found[0][0] != found[1][0]
    assert {path.name for path in tmp_path.iterdir()} == {"cross-entropy", "layer_cam", "full_grad"}


def test_students_learn_from_one_teacher_with_and_without_its_heatmaps(tmp_path, capsys, monkeypatch):
    few = image_data.load_shapes(image_size=64, seed=0, train=64, validation=64)
    monkeypatch.setattr(lab_train, "load_data", lambda *_, **__: few)
    monkeypatch.setattr(teacher, "load_shapes", lambda **_: few)
    teach, weights = teacher.taught, []

    def watched(net, data, args, lam, seed):
        weights.append({name: value.clone() for name, value in net.state_dict().items()})
        student = teach(net, data, args, lam, seed)
        assert all(torch.equal(value, weights[0][name]) for name, value in net.state_dict().items())
        return student

    monkeypatch.setattr(teacher, "taught", watched)
    command = ["--seeds", "0", "--epochs", "2", "--student-epochs", "30", "--fraction", "0.5", "--out", str(tmp_path)]
    teacher.main([*command, "--lam", "5"])
    *_, header, _, without, with_heatmaps, difference = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| student | predicts as its teacher | similarity of its heatmaps and the teacher's |")
    values = [[float(cell.split()[0]) for cell in row.split("|")[2:-1]] for row in (without, with_heatmaps, difference)]
    assert len(weights) == 2
    assert values[1][1] > values[0][1]  # of what it is trained for
    assert values[2] == pytest.approx([b - a for a, b in zip(*values[:2], strict=True)], abs=2e-3)


def test_recipes_of_other_dimensions_are_put_side_by_side(capsys):
    dimensions.main(["--recipes", "signals", "--seeds", "0", "1", "--images", "256"])
    *_, title, _, header, _, without, with_cgc, difference = capsys.readouterr().out.strip().splitlines()
    assert title == "signals"
    assert header == "| training | accuracy | CGC loss | margin | content heatmap | object coverage |"
    values = [[float(cell.split()[0]) for cell in row.split("|")[2:-1]] for row in (without, with_cgc, difference)]
    assert values[1][1] < values[0][1]  # of what it is trained for
    assert values[2] == pytest.approx([b - a for a, b in zip(*values[:2], strict=True)], abs=2e-3)


def test_summary_is_the_mean_and_range_over_runs(trained, capsys):
    summarize.main([str(out) for out in trained])
    losses = [history(out / "cgc")[0]["val_cgc"] for out in trained]
    expected = f"{sum(losses) / 2:.3f} ({min(losses):.3f} to {max(losses):.3f})"
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| CGC loss"))
    assert expected in row


def test_summary_of_a_single_training_is_refused(trained, tmp_path):
    shutil.copytree(trained[0] / "cgc", tmp_path / "cgc")
    with pytest.raises(SystemExit, match="must be made with --compare"):
        summarize.main([str(tmp_path)])
