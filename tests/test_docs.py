"""The Python of README and docs runs, each page from top to bottom as one program."""

import functools
import re
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).parents[1]


def test_readme_blocks_run(tmp_path, monkeypatch):
    # Its default backend takes a C++ compiler and a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for split in ("a", "b"):
        for i in range(2):
            path = tmp_path / split / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            torchvision.utils.save_image(torch.rand(3, 64, 64), path)
    x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    names = {
        "model": torchvision.models.resnet18(num_classes=10),
        "loader": [(x, y)],
        "x": x,
        "y": y,
        "images": torch.rand(4, 3, 224, 224),
        "unlabeled": torch.rand(4, 3, 64, 64),
        "folder": tmp_path,
    }
    run_blocks(ROOT / "README.md", names, at_least=5)
    assert names["loss"].isfinite()
    assert names["picture"].shape == (4, 3, 224, 224)


def test_blocks_on_measuring_run(capsys):
    images, boxes = torch.rand(64, 3, 64, 64), torch.tensor([[0, 0, 224, 112]] * 64)
    names = {"model": torchvision.models.resnet18(num_classes=10), "loader": [(images, boxes), (images[:1], boxes[:1])]}
    run_blocks(ROOT / "docs" / "method.md", names, at_least=1)
    assert names["pairs"].compute()["groups"] == 1
    assert names["content"].compute()["count"] == 65
    assert "positive_similarity" in capsys.readouterr().out


def run_blocks(page, names, at_least):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= at_least
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # the page itself is under test
