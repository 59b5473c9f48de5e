"""What each test and each docstring's example gets: one thread, a fixed seed, and for the latter the names it uses."""

import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cgc_reg

# Threads wait for one another longer than they work on images as small as these, above all on a machine that does other
# things too. Processes that tests start read the variable.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update({name: getattr(cgc_reg, name) for name in cgc_reg.__all__})
    doctest_namespace.update(torch=torch, torchvision=torchvision, nn=nn, F=F)


def pytest_collection_modifyitems(config, items):
    """Leave out, and count as deselected, what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture(autouse=True)
def _seed():
    """Let a test fail or pass alone as it does among others."""
    torch.manual_seed(0)
