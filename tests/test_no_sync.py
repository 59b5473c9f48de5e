"""A step never looks at a value and never makes a tensor on the CPU, so a GPU never waits for it."""

import explainers
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cgc_reg import (
    CGCRegularizer,
    Compose,
    Consistency,
    ContentHeatmap,
    GradCAM,
    RandomAffine,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCropFlip,
    SpatialTransform,
    energy_loss,
)


class NoCPUTensor(TorchDispatchMode):
    """Fail on any operation that puts out a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]
        assert not made, f"{func} made a tensor on the CPU"
        return result


SAMPLERS = [
    RandomResizedCropFlip(),
    RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5),
    Compose([RandomFlip(), RandomQuarterTurn()]),
]


# On the meta device tensors have no values: any operation that depends on one raises.
@pytest.mark.parametrize("transform", SAMPLERS)
@pytest.mark.parametrize(
    "options", [{"heatmap": h} for h in explainers.EXPLAINERS] + [{"loss": "mse_consistency"}], ids=str
)
def test_step_runs_without_values(options, transform):
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
        x, y = torch.empty(4, 3, 64, 64), torch.empty(4, dtype=torch.long)
    with NoCPUTensor():
        out = explainers.regularizer("layer4", transform=transform, **options).compute(model, x)
        (F.cross_entropy(out.logits, y) + out.loss).backward()
    assert model.conv1.weight.grad.device.type == "meta"
    assert {value.device.type for value in out.scalars.values()} == {"meta"}


def test_plain_call_and_preset_run_without_values():
    with torch.device("meta"):
        model, x = torchvision.models.resnet18(num_classes=10), torch.empty(4, 3, 224, 224)
    with NoCPUTensor():
        CGCRegularizer("layer4", view_size=(160, 160))(model, x).backward()
        CGCRegularizer.official("layer4")(model, x).backward()


def test_measuring_runs_without_values():
    with torch.device("meta"):
        query, key, boxes = torch.empty(5, 7, 7), torch.empty(5, 7, 7), torch.empty(5, 4)
    pairs, content = Consistency(batch_size=2), ContentHeatmap()
    with NoCPUTensor():
        for _ in range(2):
            pairs.update(query, key)
            content.update(query, key)
            content.update(query, boxes=boxes, image_size=(64, 64))
            content.update(query, boxes=[boxes[:2]] * 5, image_size=(64, 64))


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_guidance_runs_without_values(kind):
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
        x, masks, boxes = torch.empty(4, 3, 64, 64), torch.empty(4, 64, 64), torch.empty(2, 4)
    where = {"masks": masks} if kind == "masks" else {"boxes": [boxes] * 4, "image_size": (64, 64)}
    with NoCPUTensor():
        energy_loss(GradCAM("layer4")(model, x).heatmap, **where).backward()
    assert model.conv1.weight.grad.device.type == "meta"


def test_maps_in_pixels_come_in_and_go_out_without_values():
    matrix = torch.empty(4, 3, 3, device="meta")
    with NoCPUTensor():
        transform = SpatialTransform.from_matrix(matrix, (64, 48), (32, 32))
        assert transform.matrix((64, 48), (32, 32)).shape == (4, 3, 3)


def test_the_mode_would_notice():
    with pytest.raises(AssertionError, match="on the CPU"), NoCPUTensor():
        torch.zeros(1)
