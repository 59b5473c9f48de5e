"""Images and options small enough to wait for, and what a training leaves."""

import contextlib
import csv
import functools
import signal
import subprocess
import sys
import time

import torch
from torchvision.transforms.functional import to_pil_image

from lab.shapes import draw_shapes

TINY = ["--arch", "small_resnet", "--image-size", "32", "--batch-size", "4", "--epochs", "2", "--workers", "0"]


def write_images(root):
    """Write two classes of JPEG files in the layout of Imagenette and of torchvision's ImageFolder."""
    for split, count in (("train", 8), ("val", 4)):
        images, _, _ = draw_shapes(2 * count, size=40, seed=count)
        for i, image in enumerate(images):
            path = root / split / ("n01440764", "n02102040")[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    return root


def history(run):
    """Read the metrics.csv of a run; a missing value has no entry."""
    with open(run / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def without_times(rows):
    return [{**row, "seconds": 0} for row in rows]


def interrupted(command, started, **options):
    """Run Python on a command, press Ctrl-C as soon as it has written a file, and return status and stderr."""
    # A background job of a shell ignores Ctrl-C, and so would the children of tests that run in one.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-u", *map(str, command)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed, **options
    )
    try:
        deadline = time.monotonic() + 120
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        errors = None
        while errors is None:  # Python loses one that comes while it imports something
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=20)
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()
    return process.returncode, errors
