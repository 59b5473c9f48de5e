"""A training of the lab in several processes, as torchrun starts them.

This file itself trains as the lab does, on a few shapes, and each process leaves a record of what it did in the folder
that is the first argument. Two tests start it by torchrun, as a person would; the others give the processes what
torchrun does, which saves them a start of Python each.
"""

import io
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import gloo
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset, default_collate

from cgc_reg import CGCRegularizer, content_heatmap, explain, object_coverage
from lab import image_data
from lab import train as lab_train
from lab.checkpoint import load_checkpoint
from lab.models import build_model
from tests.tiny import write_images

ROOT = Path(__file__).parents[1]
BATCH, EPOCHS = 4, 2
TINY = ["--arch", "small_resnet", "--image-size", "32", "--batch-size", str(BATCH), "--epochs", str(EPOCHS)]
# Two processes could not show whether a resumed run sums gradients in the same order: a + b is b + a.
PROCESSES = 3
TRAIN, VALIDATION = 26, 14  # neither divides by the processes or the batch


def few_shapes():
    return image_data.load_shapes(image_size=32, seed=0, train=TRAIN, validation=VALIDATION)


# ---- what a process does


class Recorded(Dataset):
    """A data set that remembers which of its items were taken."""

    def __init__(self, items):
        self.items = items
        self.taken = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.taken.append(index)
        return self.items[index]


def work(folder, *options):
    renamed, runs = [], []
    # Every file of a run gets its name by being renamed.
    sys.addaudithook(lambda event, args: renamed.append(str(args[1])) if event == "os.rename" else None)
    data = few_shapes()
    data.train = Recorded(data.train)
    train, write_history = lab_train.train, lab_train.write_history

    def recorded_train(*args):
        data.train.taken = []
        run = train(*args)
        runs.append(
            {
                "model": run.model.state_dict(),
                "history": run.history,
                "seed": run.regularizer.generator.initial_seed(),
                "taken": data.train.taken,
            }
        )
        return run

    def write_history_and_keep(path, history):
        write_history(path, history)
        if len(history) == 1:
            shutil.copy(path.with_name("last.pt"), path.with_name("first.pt"))

    lab_train.load_data = lambda *_, **__: data
    lab_train.train = recorded_train
    lab_train.write_history = write_history_and_keep
    lab_train.main([*TINY, "--data", "shapes", "--workers", "0", *options])
    torch.save({"renamed": renamed, "runs": runs}, f"{folder}/{os.environ['RANK']}.pt")


# ---- the tests


def torchrun(processes, *arguments):
    """Run a script in several processes; return the exit status, and what they wrote to stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *arguments]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'examples'}"
    # A machine's host name need not resolve.
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun then ends its processes too
    return process.returncode, printed, errors


def joined(processes, folder, *options):
    """Do `work` in processes with the settings that torchrun gives; return what `torchrun` returns."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # outlives them
    gloo.start(_as_torchrun_starts_it, (processes, store.port, folder, [str(option) for option in options]), processes)
    status, printed, errors = zip(*(torch.load(folder / f"{rank}.end") for rank in range(processes)), strict=True)
    return max(status), "".join(printed), "".join(errors)


def _as_torchrun_starts_it(rank, processes, port, folder, options):
    own = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo")
    printed, errors, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            work(folder, *options)
        except SystemExit as end:
            status = 1
            print("" if isinstance(end.code, int) else end.code, file=sys.stderr)
    torch.save((status, printed.getvalue(), errors.getvalue()), folder / f"{rank}.end")


def train(folder, *options, processes=PROCESSES, start=joined):
    """Train in several processes; return what was printed, and the record of each process."""
    folder.mkdir(exist_ok=True)
    status, printed, errors = start(processes, folder, "--out", folder / "run", *options)
    assert status == 0, errors
    return printed, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: its folder, what it printed, and its records."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder, start=lambda processes, *arguments: torchrun(processes, __file__, *arguments))


def assert_same_runs(runs, others):
    for run, other in zip(runs, others, strict=True):
        assert without_times(run["history"]) == without_times(other["history"])
        for name, tensor in run["model"].items():
            assert torch.equal(tensor, other["model"][name]), name


def without_times(history):
    return [{**row, "seconds": 0} for row in history]


def test_one_process_writes_and_prints(whole):
    folder, printed, (first, *others) = whole
    assert {path.name for path in (folder / "run").iterdir()} == {"cgc", "gallery.png"}
    files = {path.name for path in (folder / "run" / "cgc").iterdir()}
    assert files == {"last.pt", "best.pt", "metrics.csv", "curves.png", "first.pt"}
    assert any("last.pt" in path for path in first["renamed"])
    assert not any(str(folder / "run") in path for record in others for path in record["renamed"])
    assert printed.count(f"epoch {EPOCHS}/{EPOCHS}") == 1
    assert printed.count("| validation, last epoch |") == 1


def test_all_processes_end_with_the_model_and_the_history_that_were_saved(whole):
    folder, _, records = whole
    saved = load_checkpoint(folder / "run" / "cgc" / "last.pt")
    for record in records:
        assert_same_runs([saved], record["runs"])


def test_processes_share_an_epochs_images_and_draw_their_own_views(whole):
    _, _, records = whole
    assert len({record["runs"][0]["seed"] for record in records}) == PROCESSES
    taken = torch.tensor([record["runs"][0]["taken"] for record in records])
    per_epoch = taken.view(PROCESSES, EPOCHS, -1).transpose(0, 1).flatten(1).tolist()
    for images in per_epoch:
        assert len(images) == len(set(images)) == TRAIN // PROCESSES // BATCH * BATCH * PROCESSES
    assert per_epoch[0] != per_epoch[1]


def test_validation_is_that_of_one_process_over_all_images(whole):
    folder, _, _ = whole
    saved = load_checkpoint(folder / "run" / "cgc" / "last.pt")
    model = build_model(saved["arch"], len(saved["classes"])).eval()
    model.load_state_dict(saved["model"])
    validation = few_shapes().validation
    x, y, mask = default_collate(list(validation))
    with torch.no_grad():
        logits = model(x)
    on_object = content_heatmap(explain(model, x, saved["layer"]), mask)
    expected = {
        "val_cross_entropy": cross_entropy(logits, y),
        "val_top1": (logits.argmax(dim=1) == y).float().mean(),
        "val_top5": (logits.topk(5).indices == y[:, None]).sum() / VALIDATION,
        "val_balanced_accuracy": torch.stack(
            [(logits.argmax(dim=1) == y)[y == c].float().mean() for c in y.unique()]
        ).mean(),
        "val_content_heatmap": on_object.nanmean(),
        "val_object_coverage": object_coverage(explain(model, x, saved["layer"]), mask).nanmean(),
        "val_mostly_off_object": 1 - (on_object >= 0.5).float().mean(),
        "val_cgc": torch.stack([cgc_of_share(model, saved["layer"], validation, i) for i in range(PROCESSES)]).mean(),
    }
    last = saved["history"][-1]
    assert {key: last[key] for key in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-3)


def cgc_of_share(model, layer, validation, rank):
    """The CGC loss of a process's only full batch."""
    share = Subset(validation, range(rank, VALIDATION, PROCESSES))
    assert BATCH <= len(share) < 2 * BATCH
    x, *_ = default_collate([share[i] for i in range(BATCH)])
    reg = CGCRegularizer(layer, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        return reg(model, x)


def test_resumed_run_ends_bit_identical(whole, tmp_path):
    folder, _, records = whole
    (tmp_path / "run" / "cgc").mkdir(parents=True)  # as a crash after the first epoch leaves it
    shutil.copy(folder / "run" / "cgc" / "first.pt", tmp_path / "run" / "cgc" / "last.pt")
    printed, resumed = train(tmp_path, "--resume")
    assert "after epoch 1." in printed
    for record, again in zip(records, resumed, strict=True):
        assert_same_runs(record["runs"], again["runs"])


def test_unlabelled_images_two_views_and_gathered_negatives(tmp_path):
    _, records = train(
        tmp_path, "--compare", "--labeled-fraction", "0.3", "--cross-entropy-views", "2", "--gather", processes=2
    )
    assert_same_runs(*(record["runs"] for record in records))
    # Before a network has learnt anything the loss is about the logarithm of the number of keys, 2 * BATCH.
    _, with_cgc = records[0]["runs"]
    assert with_cgc["history"][0]["train_cgc"] == pytest.approx(math.log(2 * BATCH), rel=0.2)
    assert with_cgc["history"][0]["train_cgc"] > 1.2 * math.log(BATCH)


def broken_image(whole, tmp_path):
    """One process meets an image that cannot be read; torchrun ends the others."""
    images = write_images(tmp_path / "images")
    (images / "train" / "n01440764" / "0.JPEG").write_bytes(b"not an image")
    command = ["-m", "lab", "train", *TINY, "--workers", "1"]
    ended = torchrun(2, *command, "--data", images, "--out", tmp_path / "run")
    return ended, r"error: the image .*0\.JPEG cannot be read"


def other_number(whole, tmp_path):
    """All processes refuse a run that was started in another number of them."""
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    ended = joined(2, tmp_path, "--resume", "--out", tmp_path / "run")
    return ended, r"^error: .*it ran in 3 processes and this one runs in 2"


def bad_option(whole, tmp_path):
    """The processes cannot even start."""
    ended = joined(2, tmp_path, "--lam", "-1", "--out", tmp_path / "run")
    return ended, r"^.*error: --lam must not be negative; got -1\.0\.$"


@pytest.mark.parametrize("case", [broken_image, other_number, bad_option])
def test_bad_input_ends_all_processes_and_is_said_once(whole, tmp_path, case):
    (status, printed, errors), message = case(whole, tmp_path)
    assert status != 0
    assert len(re.findall(message, errors, re.MULTILINE)) == 1, errors
    assert "[rank" not in errors  # torch's mark of a process's traceback
    assert "epoch 1" not in printed


if __name__ == "__main__":
    work(*sys.argv[1:])
