"""The README's Python runs, from top to bottom, as one program."""

import functools
import re
from pathlib import Path

import torch
import torchvision

README = Path(__file__).parents[1] / "README.md"


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
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # the README itself is under test
    assert names["loss"].isfinite()
    assert names["picture"].shape == (4, 3, 224, 224)
