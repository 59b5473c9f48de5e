"""The full example: with and without the lines that it marks as CGC's, interrupted, resumed, and with bad input."""

import io
import os
import re
import types
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import train_imagenette
from lab import visualize
from lab.shapes import draw_shapes
from tests.marked import without_marked_lines, words_of_cgc
from tests.tiny import checkpoint, history, interrupted, without_times, write_images

SCRIPT = Path(train_imagenette.__file__)
TINY = ["--image-size", "64", "--batch-size", "4", "--epochs", "2", "--workers", "0"]
SMALL = [*TINY, "--arch", "shufflenet_v2_x0_5"]  # smaller than a ResNet-18


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupts: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    with redirect_stdout(io.StringIO()) as printed:
        run("--data", folder, "--out", out)
    return out, printed.getvalue()


def run(*options):
    train_imagenette.main([*SMALL, *map(str, options)])


def refused(capsys, *options):
    """Run what must fail, and return its message."""
    with pytest.raises(SystemExit) as stop:
        run(*options)
    message = str(stop.value) if not isinstance(stop.value.code, int) else capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code != 0
    assert "error: " in message
    assert len(message.splitlines()) == 1
    return message


def test_training_writes_checkpoint_metrics_and_picture(whole):
    out, printed = whole
    assert {path.name for path in out.iterdir()} == {"last.pt", "metrics.csv", "heatmaps.png"}
    assert (out / "heatmaps.png").stat().st_size > 10_000
    rows = history(out)
    assert [row["epoch"] for row in rows] == [1, 2]
    measured = {"train_cross_entropy", "train_cgc", "val_accuracy", "val_positive_similarity", "val_margin"}
    assert rows[0].keys() == measured | {"epoch", "seconds"}
    assert f"epoch 2/2  train_cross_entropy {rows[1]['train_cross_entropy']:.3f}  " in printed
    assert str(out) in printed


def test_accuracy_is_that_of_the_saved_model(folder, whole):
    saved = checkpoint(whole[0] / "last.pt")
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=2).eval()
    model.load_state_dict(saved["model"])
    args = train_imagenette.parse_args([*SMALL, "--data", str(folder)])
    _, validation = train_imagenette.open_data(args)
    x, y = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*validation, strict=True))
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean().item()
    assert saved["history"][-1]["val_accuracy"] == pytest.approx(accuracy)


def without_cgc():
    """Load the example without its marked lines."""
    module = types.ModuleType("without_cgc")
    exec(compile(without_marked_lines(SCRIPT.read_text()), str(SCRIPT), "exec"), vars(module))  # it is under test
    return module


def test_marked_lines_are_all_of_cgc(folder, whole, tmp_path):
    without_cgc().main([*SMALL, "--data", str(folder), "--out", str(tmp_path / "plain")])
    run("--data", folder, "--out", tmp_path / "zero", "--lam", 0)
    outs = tmp_path / "plain", tmp_path / "zero", whole[0]
    plain, zero, with_cgc = (checkpoint(out / "last.pt")["model"] for out in outs)
    for name, value in plain.items():
        assert torch.equal(value, zero[name]), name
    assert not torch.equal(zero["fc.weight"], with_cgc["fc.weight"])
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"last.pt", "metrics.csv"}


def test_unmarked_lines_say_nothing_of_cgc():
    assert not words_of_cgc(without_marked_lines(SCRIPT.read_text()))


def test_without_cgc_it_trains_on_few_labels_too(folder, tmp_path):
    without_cgc().main([*SMALL, "--data", str(folder), "--labeled-fraction", "0.5", "--out", str(tmp_path)])
    assert history(tmp_path)[-1].keys() == {"epoch", "train_cross_entropy", "val_accuracy", "seconds"}


def test_labels_are_kept_for_the_asked_share_of_each_class(folder):
    images, _ = train_imagenette.open_data(train_imagenette.parse_args([*SMALL, "--data", str(folder)]))
    labeled, others = train_imagenette.split_labeled(images, 0.25, seed=0)
    assert sorted(images.targets[i] for i in labeled.indices) == [0, 0, 1, 1]
    assert sorted([*labeled.indices, *others.indices]) == list(range(16))


def test_cgc_takes_the_images_without_labels(folder, tmp_path, monkeypatch):
    seen = {"cgc": []}
    batches, regularizer = train_imagenette.batches, train_imagenette.CGCRegularizer

    def watched(images, args):
        for x, y in batches(images, args):
            seen.setdefault(len(images), []).append(x)
            yield [x, y]

    class Watched(regularizer):
        def forward(self, model, x):
            seen["cgc"].append(x)
            return super().forward(model, x)

    monkeypatch.setattr(train_imagenette, "batches", watched)
    monkeypatch.setattr(train_imagenette, "CGCRegularizer", Watched)
    run("--data", folder, "--labeled-fraction", "0.25", "--epochs", "1", "--out", tmp_path)
    assert len(seen[4]) == 4  # steps of an epoch, on the four labelled images
    assert [x.data_ptr() for x in seen["cgc"]] == [x.data_ptr() for x in seen[12]]


def test_lam_grows_in_the_first_epochs(folder, tmp_path, monkeypatch):
    """The gradient of a step's loss by that of CGC is lam."""
    weights = []
    compute = train_imagenette.CGCRegularizer.compute

    def watched(self, model, x):
        out = compute(self, model, x)
        if out.loss.requires_grad:
            out.loss.register_hook(lambda gradient: weights.append(gradient.item()))
        return out

    monkeypatch.setattr(train_imagenette.CGCRegularizer, "compute", watched)
    run("--data", folder, "--out", tmp_path, "--lam", "0.8", "--lam-warmup-epochs", "1")
    assert weights == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("options", [[], ["--labeled-fraction", "0.5", "--lam-warmup-epochs", "1"], ["--amp"]])
def test_resumed_run_ends_bit_identical(folder, whole, tmp_path, capsys, options):
    if options:
        run("--data", folder, *options, "--out", tmp_path / "whole")
    out = tmp_path / "whole" if options else whole[0]

    class CutOffError(Exception):
        pass

    def cut(*_):
        raise CutOffError

    with pytest.MonkeyPatch.context() as patch:  # dies after the first epoch's checkpoint, as a crash would
        patch.setattr(train_imagenette.csv, "DictWriter", cut)
        with pytest.raises(CutOffError):
            run("--data", folder, *options, "--out", tmp_path / "cut")
    run("--data", folder, *options, "--out", tmp_path / "cut", "--resume")
    assert "last.pt holds 1 of 2 epochs." in capsys.readouterr().out

    first, resumed = (checkpoint(path / "last.pt") for path in (out, tmp_path / "cut"))
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert without_times(first["history"]) == without_times(resumed["history"])


def test_crash_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    rows = {"history": [{"epoch": 1}]}
    train_imagenette.save(tmp_path, {**rows, "model": 1})

    def crash(content, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        train_imagenette.save(tmp_path, {**rows, "model": 2})
    assert checkpoint(tmp_path / "last.pt")["model"] == 1


def test_interrupt_keeps_finished_epochs_and_says_so(folder, tmp_path):
    command = [SCRIPT, *TINY, "--epochs", "500", "--data", folder, "--out", tmp_path]
    root = str(SCRIPT.parents[1])  # where the package is
    status, errors = interrupted(command, tmp_path / "metrics.csv", env={**os.environ, "PYTHONPATH": root})
    assert status != 0
    assert errors.strip() == f"Interrupted: {tmp_path} keeps all finished epochs; continue with --resume."
    assert len(checkpoint(tmp_path / "last.pt")["history"]) >= 1


def test_finished_run_is_not_overwritten(folder, whole, capsys):
    out, _ = whole
    before = (out / "last.pt").read_bytes()
    common = ["--data", folder, "--out", out]
    assert "already holds a run; continue it with --resume" in refused(capsys, *common)
    assert "of another run: seed was 0 and is 1" in refused(capsys, *common, "--seed", "1", "--resume")
    run(*common, "--resume")
    assert "last.pt holds 2 of 2 epochs." in capsys.readouterr().out
    assert (out / "last.pt").read_bytes() == before


def test_checkpoint_that_is_none_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "last.pt").write_text("text")
    assert "last.pt is not a checkpoint" in refused(capsys, "--data", folder, "--out", tmp_path, "--resume")


def test_bad_input_is_one_sentence(folder, tmp_path, capsys):
    out = tmp_path / "run"
    for message, options in {
        "nowhere must hold train/CLASS/ and val/CLASS/": ["--data", tmp_path / "nowhere"],
        "Do you mean 'layer4'": ["--data", folder, "--arch", "resnet18", "--layer", "layer5"],
        "invalid choice: 'resnet19'": ["--data", folder, "--arch", "resnet19"],
        "--batch-size must be at least 2; got 1": ["--data", folder, "--batch-size", "1"],
        "--labeled-fraction must be above 0": ["--data", folder, "--labeled-fraction", "0"],
        "--lam and --lam-warmup-epochs must not be negative": ["--data", folder, "--lam", "-1"],
        "device": ["--data", folder, "--device", "gpu"],
    }.items():
        assert message in refused(capsys, *options, "--out", out)
    assert not out.exists()


def test_folder_that_cannot_be_used_is_one_sentence(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    (folder / "train" / "n03000684").mkdir()
    assert "n03000684" in refused(capsys, "--data", folder, "--out", tmp_path / "run")
    (folder / "train" / "n03000684").rmdir()
    (folder / "val" / "n02102040").rename(folder / "val" / "n02102041")
    assert "must hold the same classes" in refused(capsys, "--data", folder, "--out", tmp_path / "run")


def test_unreadable_images_are_named_before_the_first_epoch(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    text, cut = folder / "train" / "n01440764" / "0.JPEG", folder / "val" / "n02102040" / "1.JPEG"
    text.write_bytes(b"not an image")
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run")
    assert message.startswith(f"error: the image {text} cannot be read (")
    cut.write_bytes(cut.read_bytes()[:-200])
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run")
    assert re.match(rf"error: 2 images cannot be read: {text} \(.*\), {cut} \(.*\); repair or remove them\.$", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_is_damaged_while_training_is_named(tmp_path, capsys, monkeypatch, workers):
    folder = write_images(tmp_path / "images")
    broken = folder / "train" / "n01440764" / "0.JPEG"
    monkeypatch.setattr(train_imagenette, "check_images", lambda paths: broken.write_bytes(b"not an image"))
    message = refused(capsys, "--data", folder, "--out", tmp_path / "run", "--workers", workers)
    assert message.startswith(f"error: the image {broken} cannot be read (")


def test_a_resumed_run_does_not_read_every_image_first(folder, whole, monkeypatch):
    monkeypatch.setattr(train_imagenette, "check_images", pytest.fail)
    run("--data", folder, "--out", whole[0], "--resume")


def test_16_bits_are_to_the_network_what_8_are(tmp_path):
    """A file of 16 bits whose upper and lower byte are equal shows the 8 bits exactly: 257 v."""
    parts = []
    for name, factor in (("8", 1), ("16", 257)):
        for split, count in (("train", 8), ("val", 4)):
            for i, image in enumerate(draw_shapes(2 * count, size=40, seed=count)[0].numpy()):
                path = tmp_path / name / split / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0] if factor == 1 else image[0].astype("uint16") * 257).save(path)
        args = train_imagenette.parse_args([*SMALL, "--data", str(tmp_path / name)])
        torch.manual_seed(0)  # the crops
        parts.append([part[i][0] for part in train_imagenette.open_data(args) for i in range(len(part))])
    for eight, sixteen in zip(*parts, strict=True):
        assert torch.equal(eight, sixteen)
    assert len({float(image.std()) for image in parts[0]}) == 24


def test_hidden_files_and_folders_are_left_out_with_one_line(folder, whole, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    for path in list((images / "train").rglob("*.JPEG")):
        path.with_name(f"._{path.name}").write_bytes(b"of macOS")
    (images / "train" / ".ipynb_checkpoints").mkdir()
    run("--data", images, "--out", tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"Left out of {images / 'train'}: hidden files (16, such as n01440764/._0.JPEG)."
    assert without_times(history(tmp_path / "run")) == without_times(history(whole[0]))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (1, 1000), (1000, 1), (3, 40)])
def test_images_of_odd_sizes_become_as_large_as_all(tmp_path, size):
    folder = write_images(tmp_path / "images")
    for split in ("train", "val"):
        Image.new("L", size, 255).save(folder / split / "n01440764" / "0.JPEG", "PNG")
    for part in train_imagenette.open_data(train_imagenette.parse_args([*SMALL, "--data", str(folder)])):
        x, _ = part[0]
        assert x.shape == (3, 64, 64)
        white = (1 - torch.tensor(train_imagenette.MEAN)) / torch.tensor(train_imagenette.STD)
        torch.testing.assert_close(x, white[:, None, None].expand_as(x))


@pytest.mark.parametrize("size", train_imagenette.IMAGENETTE)
def test_imagenette_is_taken_from_where_torchvision_puts_it(tmp_path, size):
    write_images(tmp_path / train_imagenette.IMAGENETTE[size])
    args = train_imagenette.parse_args([*SMALL, "--root", str(tmp_path), "--size", size])
    train, validation = train_imagenette.open_data(args)
    own = torchvision.datasets.Imagenette(tmp_path, split="train", size=size)
    assert sorted(label for _, label in own._samples) == sorted(train.targets)
    assert (len(train), len(validation)) == (16, 8)


def test_no_network_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", {"160px": ("http://127.0.0.1:9/none.tgz", "0")})
    message = refused(capsys, "--root", tmp_path / "data", "--out", tmp_path / "run")
    assert re.search("Imagenette cannot be downloaded .*; pass --data DIR", message)
    assert not any((tmp_path / "data").iterdir())


def test_interrupted_download_is_not_taken_for_the_data_set(tmp_path, monkeypatch):
    def part(place, **_):
        write_images(Path(place) / "imagenette2-160")
        raise KeyboardInterrupt

    monkeypatch.setattr(train_imagenette, "Imagenette", part)
    with pytest.raises(SystemExit, match="Interrupted"):
        run("--root", tmp_path / "data", "--out", tmp_path / "run")
    assert not any((tmp_path / "data").iterdir())


def test_downloaded_imagenette_is_kept(tmp_path, monkeypatch):
    def download(place, **_):
        write_images(Path(place) / "imagenette2-160")

    monkeypatch.setattr(train_imagenette, "Imagenette", download)
    train_imagenette.open_data(train_imagenette.parse_args([*SMALL, "--root", str(tmp_path / "data")]))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["imagenette2-160"]


def test_pretrained_head_is_replaced(monkeypatch):
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda arch, weights: get_model(arch, weights=None))
    model = train_imagenette.build_model("mobilenet_v3_small", 7, pretrained=True)
    assert isinstance(model.classifier[3], nn.Linear)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_lab_draws_heatmaps_of_its_checkpoint(folder, whole, tmp_path):
    picture = tmp_path / "picture.png"
    visualize.main([str(whole[0] / "last.pt"), str(folder / "val"), "--out", str(picture)])
    assert picture.stat().st_size > 10_000
