"""Trainings of the lab, run as a person would, on data small enough to wait for."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torchvision
from tqdm import tqdm

from lab import epoch, image_data, jobs, side_by_side
from lab import train as lab_train
from lab.checkpoint import write_whole
from lab.data_sets import load_data
from tests.tiny import TINY, checkpoint, history, interrupted, without_times, write_images

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = [*TINY, "--lam-warmup-epochs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    """Train with and without CGC, as a person would, with pictures."""
    out = tmp_path_factory.mktemp("compared")
    with redirect_stdout(io.StringIO()) as printed:
        lab_train.main([*SMALL, "--data", str(folder), "--out", str(out), "--compare"])
    return out, printed.getvalue()


@pytest.fixture
def _no_pictures(monkeypatch):
    """Leave out what takes most of so small a training's time."""
    for name in ("curves", "gallery", "heatmap_columns"):
        monkeypatch.setattr(lab_train, name, lambda *_, **__: {})
    monkeypatch.setattr(lab_train, "write_figure", lambda *_: None)


pytestmark = pytest.mark.usefixtures("_no_pictures")


def train(*arguments):
    lab_train.main([*SMALL, *map(str, arguments)])


def refused(capsys, *arguments):
    """Run what must fail, and return its message."""
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    message = str(stop.value) if not isinstance(stop.value.code, int) else capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code != 0
    assert "Traceback" not in message
    return message


def test_training_writes_everything_and_prints_the_table(compared):
    out, printed = compared
    assert "| validation, last epoch | cross-entropy | cross-entropy + CGC |" in printed
    assert re.search(r"\| CGC loss \| \d", printed)
    assert (out / "gallery.png").stat().st_size > 10_000
    for name in ("cross-entropy", "cgc"):
        run = out / name
        assert {path.name for path in run.iterdir()} == {"last.pt", "best.pt", "metrics.csv", "curves.png"}
        rows = history(run)
        assert [row["epoch"] for row in rows] == [1, 2]
        for column in ("train_cross_entropy", "train_top1", "train_top5", "val_cross_entropy", "val_top1", "val_top5"):
            assert column in rows[-1]
        assert {"val_cgc", "val_similarity", "val_margin"} <= rows[-1].keys()
        assert ("train_cgc" in rows[-1]) == (name == "cgc")


def test_trainings_side_by_side_are_those_one_after_the_other(folder, compared, tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    after, printed = compared
    # As many threads for each, since other numbers of them add up in another order.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)
    train("--data", folder, "--out", tmp_path, "--compare", "--side-by-side")
    beside = capsys.readouterr().out.splitlines()
    assert any("cross-entropy + CGC: epoch 2/2" in line for line in beside)
    assert not any("step" in line or "Continuing" in line for line in beside)  # it is a log, and they are done
    loss, loss_beside = ([s for s in lines if s.startswith("| CGC loss")] for lines in (printed.splitlines(), beside))
    assert len(loss) == 1
    assert loss == loss_beside
    for name in ("cross-entropy", "cgc"):
        weights = [checkpoint(out / name / "last.pt")["model"] for out in (after, tmp_path)]
        torch.testing.assert_close(*weights)


def test_bar_of_a_training_knows_its_steps_and_what_was_made_before(capsys):
    bar = tqdm(file=io.StringIO(), smoothing=0)
    for line in ["Continuing runs/a after epoch 1.", "step 33/96", "step 34/96", "epoch 2/3  val_top1 0.5", "other"]:
        side_by_side.show("a", bar, line)
    assert (bar.n, bar.total, bar.initial) == (34, 96, 33)
    bar.start_t -= 2.0  # the step from 33 to 34 took two seconds, so 62 steps take 124
    assert re.search(r"34/96 \[00:02<02:0[0-4]", str(bar))
    bar.close()
    printed = capsys.readouterr().out
    assert printed == "a: Continuing runs/a after epoch 1.\na: epoch 2/3  val_top1 0.5\n"


def test_failure_side_by_side_is_that_of_the_training(folder, compared, capsys):
    command = ["--data", folder, "--out", compared[0], "--compare", "--side-by-side", "--resume", "--epochs", "3"]
    assert "--epochs was 2 and is 3" in refused(capsys, *command)


def test_side_by_side_is_for_two(folder, tmp_path, capsys):
    assert "--side-by-side is for" in refused(capsys, "--data", folder, "--out", tmp_path, "--side-by-side")


def test_validation_may_be_rarer_than_epochs(folder, tmp_path):
    train("--data", folder, "--out", tmp_path / "each", "--epochs", "3")
    train("--data", folder, "--out", tmp_path / "some", "--epochs", "3", "--validate-every", "2")
    each, some = (history(tmp_path / name / "cgc") for name in ("each", "some"))
    assert ["val_top1" in row for row in some] == [False, True, True]
    assert {**each[-1], "seconds": 0} == {**some[-1], "seconds": 0}


@pytest.mark.parametrize(
    "options",
    [["--loss", "mse_and_info_nce"], ["--heatmap", "layer_cam"], ["--official"]],
    ids=lambda options: options[0],
)
def test_each_way_to_regularize_trains(folder, compared, tmp_path, options):
    train("--data", folder, "--out", tmp_path, *options)
    plain, other = (checkpoint(out / "cgc" / "last.pt")["model"]["fc.weight"] for out in (compared[0], tmp_path))
    assert not torch.equal(plain, other)


def test_official_goes_with_none_of_what_it_sets(folder, tmp_path, capsys):
    message = refused(capsys, "--data", folder, "--out", tmp_path, "--official", "--heatmap", "layer_cam")
    assert "--official sets what" in message


def test_shapes_training_measures_the_content_heatmap(tmp_path, monkeypatch):
    small = image_data.load_shapes(image_size=32, seed=0, train=16, validation=8)
    monkeypatch.setattr(lab_train, "load_data", lambda *_, **__: small)
    train("--data", "shapes", "--out", tmp_path, "--epochs", "1")
    (row,) = history(tmp_path / "cgc")
    assert 0 < row["val_content_heatmap"] < 1
    assert 0 < row["val_object_coverage"] < 1


def test_shapes_are_as_many_as_asked_for(folder, tmp_path, capsys, monkeypatch):
    few, many = (load_data("shapes", root=tmp_path, size="", image_size=16, seed=1, train_images=n) for n in (32, 48))
    assert (len(few.train), len(many.train)) == (32, 48)
    assert len(few.validation) == len(many.validation)
    asked = []
    monkeypatch.setattr(lab_train, "load_data", lambda *_, train_images, **__: asked.append(train_images) or few)
    train("--data", "shapes", "--train-images", "32", "--out", tmp_path / "run", "--epochs", "1", "--image-size", "16")
    assert asked == [32]
    assert "--train-images is for --data shapes" in refused(
        capsys, "--data", folder, "--train-images", "32", "--out", tmp_path
    )


@pytest.fixture
def _few_shapes(monkeypatch):
    """Draw few of the shapes that are asked for, with their masks where those are."""

    def load_few(name, *, seed, train_masks, **_):
        context = 0.9 if name == "shapes_context" else None
        return image_data.load_shapes(
            image_size=32, seed=seed, train=28, validation=8, train_masks=train_masks, context=context
        )

    monkeypatch.setattr(lab_train, "load_data", load_few)


GUIDED = ["--data", "shapes_context", "--guidance", "1", "--guided-fraction", "0.25"]


@pytest.mark.usefixtures("_few_shapes")
@pytest.mark.parametrize(
    "options",
    [["--lam", "0"], ["--lam", "0.5"], ["--official"], ["--cgc-every", "2"], ["--guided-class", "label"]],
    ids=str,
)
def test_guidance_trains_beside_each_loss(tmp_path, options):
    weights = {}
    for name, guided in (("plain", ["--data", "shapes_context"]), ("guided", GUIDED)):
        train(*guided, *options, "--out", tmp_path / name, "--epochs", "2")
        (run,) = (tmp_path / name).iterdir()
        weights[name] = checkpoint(run / "last.pt")["model"]["layer4.0.conv1.weight"]
        rows = history(run)
        assert ["train_energy" in row for row in rows] == [name == "guided"] * 2
    assert 0 < rows[-1]["train_energy"] < 1
    assert 0 < rows[-1]["val_object_coverage"] < 1
    assert not torch.equal(weights["plain"], weights["guided"])


@pytest.mark.usefixtures("_few_shapes")
@pytest.mark.parametrize("lam", [0, 0.5])
def test_guidance_that_weighs_nothing_leaves_a_training_where_it_was(tmp_path, lam):
    """So trainings that are compared differ in the loss alone."""
    for name, guided in (("plain", ["--data", "shapes_context"]), ("guided", [*GUIDED, "--guidance", "1e-30"])):
        train(*guided, "--lam", lam, "--cross-entropy-views", "2", "--out", tmp_path / name)
    states = [checkpoint(next((tmp_path / name).iterdir()) / "last.pt")["model"] for name in ("plain", "guided")]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("_few_shapes")
@pytest.mark.parametrize("lam", ["0", "0.5"])
def test_guidance_is_of_the_class_that_is_asked_for(tmp_path, lam):
    weights = {}
    for chosen in ("predicted", "label"):
        train(*GUIDED, "--guided-class", chosen, "--lam", lam, "--epochs", "1", "--out", tmp_path / chosen)
        (run,) = (tmp_path / chosen).iterdir()
        weights[chosen] = checkpoint(run / "last.pt")["model"]["layer4.0.conv1.weight"]
    assert not torch.equal(weights["predicted"], weights["label"])


@pytest.mark.usefixtures("_few_shapes")
def test_guidance_is_by_known_masks_alone(tmp_path, monkeypatch):
    """An image with a mask costs what the energy loss says of it, and others nothing."""
    given, real = [], epoch.energy_loss

    def kept(heatmap, masks):
        given.append(masks.flatten(1).any(dim=1))
        return real(heatmap, masks)

    monkeypatch.setattr(epoch, "energy_loss", kept)
    train(*GUIDED, "--out", tmp_path, "--epochs", "1")
    known = torch.cat(given).sum().item()
    data = image_data.load_shapes(image_size=32, seed=0, train=28, validation=8)
    assert len(torch.cat(given)) == 28
    assert known == len(image_data.share_of_each_class(data.labels, 0.25, seed=0)) < 28


def test_guidance_is_for_images_with_masks_and_labels(folder, tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "--guidance is for --data shapes or shapes_context" in refused(capsys, "--data", folder, *GUIDED[2:], *out)
    assert "leave --labeled-fraction out" in refused(capsys, *GUIDED, "--labeled-fraction", "0.5", *out)
    assert "--guidance must not be negative" in refused(capsys, *GUIDED, "--guidance", "-1", *out)
    assert "--guided-fraction must be above 0" in refused(capsys, *GUIDED, "--guided-fraction", "0", *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [[], ["--labeled-fraction", "0.5"], ["--amp", "--cross-entropy-views", "2"], GUIDED[2:]], ids=str
)
def test_resumed_run_ends_bit_identical(folder, tmp_path, capsys, request, options):
    if "--guidance" in options:
        request.getfixturevalue("_few_shapes")
    common = ["--data", "shapes" if "--guidance" in options else folder, *options]
    train(*common, "--out", tmp_path / "whole")

    class CutOffError(Exception):
        pass

    def cut(*_):
        raise CutOffError

    with pytest.MonkeyPatch.context() as patch:  # dies after the first epoch's checkpoint, as a crash would
        patch.setattr(lab_train, "write_history", cut)
        with pytest.raises(CutOffError):
            train(*common, "--out", tmp_path / "cut")
    train(*common, "--out", tmp_path / "cut", "--resume")
    assert f"Continuing {tmp_path / 'cut' / 'cgc'} after epoch 1." in capsys.readouterr().out

    whole, resumed = (checkpoint(tmp_path / name / "cgc" / "last.pt") for name in ("whole", "cut"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert without_times(whole["history"]) == without_times(resumed["history"])


def test_finished_run_is_said_to_be_finished(folder, compared, capsys):
    train("--data", folder, "--out", compared[0], "--compare", "--resume")
    printed = capsys.readouterr().out
    assert "Continuing" not in printed
    for name in ("cross-entropy", "cgc"):
        assert f"Finished before: {compared[0] / name} holds all 2 epochs." in printed


@pytest.mark.parametrize("views", [1, 2])
def test_trainings_that_are_compared_differ_in_the_loss_alone(folder, tmp_path, views):
    """With a weight too small to count, CGC leaves weights and running statistics where the baseline does."""
    for lam in (0, 1e-30):
        train("--data", folder, "--out", tmp_path, "--cross-entropy-views", views, "--lam", lam)
    baseline, cgc = (checkpoint(tmp_path / name / "last.pt")["model"] for name in ("cross-entropy", "cgc"))
    for name, value in baseline.items():
        torch.testing.assert_close(cgc[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_unlabeled_images_leave_running_statistics_alone(folder, tmp_path):
    options = ["--data", folder, "--out", tmp_path, "--cross-entropy-views", "2", "--labeled-fraction", "0.5"]
    for lam in (0, 0.5):
        train(*options, "--lam", lam)
    baseline, cgc = (checkpoint(tmp_path / name / "last.pt")["model"] for name in ("cross-entropy", "cgc"))
    assert cgc["bn1.num_batches_tracked"] == baseline["bn1.num_batches_tracked"] > 0


def test_crash_while_writing_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    write_whole(path, lambda partial: partial.write_bytes(b"first"))

    def crash(partial):
        partial.write_bytes(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, crash)
    assert path.read_bytes() == b"first"


def test_a_file_may_be_written_by_several_processes_at_once(tmp_path):
    code = """
import sys
from contextlib import redirect_stdout
from pathlib import Path
from lab.checkpoint import write_whole
for i in range(200):
    write_whole(Path(sys.argv[1]), lambda partial: partial.write_text(sys.argv[2] * 1000))
"""
    path = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, letter], cwd=EXAMPLES, stderr=subprocess.PIPE, text=True)
        for letter in "abc"
    ]
    assert [writer.communicate()[1] for writer in writers] == ["", "", ""]
    assert path.read_text() in ["a" * 1000, "b" * 1000, "c" * 1000]
    assert [other.name for other in tmp_path.iterdir()] == ["file"]


def test_interrupt_keeps_the_last_finished_epoch_and_says_so(folder, tmp_path):
    out = tmp_path / "run"
    command = jobs.lab_command("train", *TINY, "--epochs", "500", "--data", folder, "--out", out)
    status, errors = interrupted(command, out / "cgc" / "metrics.csv", env=jobs.lab_environment())
    assert status != 0
    kept = re.search(r"Interrupted: .*last.pt holds epoch (\d+); continue with --resume", errors)
    assert kept, errors
    assert "Traceback" not in errors
    assert len(checkpoint(out / "cgc" / "last.pt")["history"]) == int(kept[1])
    assert (out / "cgc" / "curves.png").exists()


def test_bad_input_is_one_sentence(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert "there is no folder" in refused(capsys, "--data", tmp_path / "nowhere", "--out", out)
    assert "there is no folder" in refused(capsys, "--data", tmp_path, "--out", out)
    assert "Do you mean 'layer4'" in refused(capsys, "--data", folder, "--layer", "layer5", "--out", out)
    assert "unknown --arch" in refused(capsys, "--data", folder, "--arch", "resnet19", "--out", out)
    assert "--batch-size must be at least 2" in refused(capsys, "--data", folder, "--batch-size", "1", "--out", out)
    assert "--labeled-fraction" in refused(capsys, "--data", folder, "--labeled-fraction", "0", "--out", out)
    assert "--temperature must be positive" in refused(capsys, "--data", folder, "--temperature", "0", "--out", out)
    assert not out.exists()


def test_no_network_is_one_sentence_with_alternatives_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", {"160px": ("http://127.0.0.1:9/none.tgz", "0")})
    message = refused(capsys, "--data", "imagenette", "--root", tmp_path / "data", "--out", tmp_path / "run")
    assert re.search("cannot be downloaded .*--data shapes.*--data DIR", message)
    assert not any((tmp_path / "data").iterdir())
    assert not (tmp_path / "run").exists()


def test_empty_class_is_one_sentence(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    (folder / "train" / "n03000684").mkdir()
    assert "n03000684" in refused(capsys, "--data", folder, "--out", tmp_path / "run")


def test_unreadable_images_are_named_before_the_first_epoch(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    broken = [folder / "train" / "n01440764" / "0.JPEG", folder / "val" / "n02102040" / "1.JPEG"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-200])
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run")
    assert "2 images cannot be read" in message
    assert all(str(path) in message for path in broken)
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_is_damaged_while_training_is_named(tmp_path, capsys, monkeypatch, workers):
    folder = write_images(tmp_path / "images")
    broken = folder / "train" / "n01440764" / "0.JPEG"
    monkeypatch.setattr(lab_train, "check_files", lambda data: broken.write_bytes(b"not an image"))
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run", "--workers", workers)
    assert str(broken) in message
    assert "cannot be read" in message
    assert len(message.splitlines()) == 1


def test_finished_run_is_not_overwritten(folder, compared, capsys):
    common = ["--data", folder, "--out", compared[0]]
    before = (compared[0] / "cgc" / "last.pt").read_bytes()
    assert "already holds a run" in refused(capsys, *common)
    assert "--seed was 0 and is 1" in refused(capsys, *common, "--seed", "1", "--resume")
    assert "--lam was 0.5 and is 0.1" in refused(capsys, *common, "--lam", "0.1", "--resume")
    assert (compared[0] / "cgc" / "last.pt").read_bytes() == before
