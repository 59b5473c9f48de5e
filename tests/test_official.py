"""Agreement with the authors' code, on losses and gradient norms that it printed for seeded inputs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.functional import hflip, resized_crop

from cgc_reg import CGCRegularizer, LayerExplainer, SpatialTransform
from cgc_reg.official import official_heatmap

CASES = json.loads((Path(__file__).parent / "data" / "official_parity.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['mode']}-{c['batch']}-contrast={c['contrast']}")
def test_preset_reproduces_the_authors_code(case):
    # The longer ones in float32, as people train.
    dtype = torch.float32 if case["contrast"] else torch.float64
    torch.manual_seed(case["model_seed"])
    model = torchvision.models.resnet18(num_classes=10).to(dtype)
    model.train(case["mode"] == "train")
    generator = torch.Generator().manual_seed(case["data_seed"])
    x = torch.randn(case["batch"], 3, 12, 12, generator=generator, dtype=torch.float64)
    x = F.interpolate(x, size=(224, 224), mode="bicubic")
    assert x.sum().item() == pytest.approx(case["x_sum"])
    x = x.to(dtype)
    boxes = [case[name] for name in ("top", "left", "height", "width")]
    view = torch.stack(
        [resized_crop(image, *box, [224, 224], antialias=False) for image, *box in zip(x, *boxes, strict=True)]
    )
    flip = torch.tensor(case["flip"])
    view = torch.where(flip[:, None, None, None], hflip(view), view)
    start, size = torch.tensor(boxes).double().T.split(2, dim=1)
    transform = SpatialTransform.from_crop(start, size, F.pad(flip[:, None], (1, 0)), image_size=(224, 224))

    reg = CGCRegularizer.official(
        "layer4", temperature=case["temperature"], loss="info_nce" if case["contrast"] else "mse_consistency"
    )
    out = reg.compute(model, x, view=view, transform=transform)
    out.loss.backward()

    assert out.loss.item() == pytest.approx(case["loss"], rel=2e-3)
    parameters = dict(model.named_parameters())
    for name, norm in case["grad_norm"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=5e-3), name


@pytest.mark.parametrize("layer", ["layer4", None])
def test_preset_has_the_authors_rule_at_any_layer(layer):
    assert CGCRegularizer.official(layer).explainer == LayerExplainer(layer, official_heatmap)
