"""The program that the type checkers read also runs."""

import torch
from torch import nn

from tests import user_program


class Segmenter(nn.Module):
    """Puts out a score for each class and pixel, in a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return {"out": self.head(self.layer4(x))}


def test_user_program_runs_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Segmenter()
    user_program.step(model, torch.rand(4, 3, 64, 64), torch.arange(4)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (tmp_path / "pairs.png").exists()
