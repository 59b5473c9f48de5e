"""What lies behind the layer: branches around it, and operations that can be differentiated only once."""

import warnings

import pytest
import torch
import torchvision
from networks import GapNet, relu_net
from strategies import generator
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import ops

from cgc_reg import CAM, CGCRegularizer, GradCAM, LayerCAM, check_gradient, explain

X = torch.randn(2, 3, 16, 16, generator=generator(0))


def looked_at(model, layer, x=X):
    """Return the warnings of a first training pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GradCAM(layer)(model, x)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("layer", "bypassed"),
    [("layer4", False), ("layer4.1", False), ("layer4.1.conv2", True), ("layer4.1.bn1", True), ("maxpool", False)],
)
def test_a_layer_in_a_branch_is_warned_of_once(layer, bypassed):
    model, x = torchvision.models.resnet18(num_classes=5).eval(), torch.rand(2, 3, 64, 64)
    found = looked_at(model, layer, x)
    assert len(found) == bypassed
    assert all(f"goes around '{layer}'" in message for message in found)
    assert looked_at(model, layer, x) == []


class Placed(GapNet):
    """Adds to its features what does not come from the images."""

    def __init__(self):
        net = relu_net()
        super().__init__(*net.features, head=net.head)
        self.place = nn.Parameter(torch.randn(8, 4, 4))
        self.scale = nn.Linear(1, 8)

    def forward(self, x):
        features = self.features(x) * self.scale(torch.ones(1)).sigmoid()[:, None, None] + self.place
        return self.head(features.mean(dim=(2, 3)))


def test_a_branch_that_shows_nothing_of_the_images_is_not_warned_of():
    assert looked_at(Placed(), "features") == []


# ---- second derivatives


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


def deformed(x):
    weight = torch.ones(x.shape[1], x.shape[1], 3, 3)
    return ops.deform_conv2d(x, torch.zeros(len(x), 18, *x.shape[2:]), weight, padding=1)


@torch.compile(backend="aot_eager")
def compiled(x):
    return x * x.sigmoid()


def regions(x):
    boxes = torch.tensor([[float(i), 0, 0, 3, 3] for i in range(len(x))])
    return ops.roi_align(x, boxes, (2, 2))


def attention(x):
    tokens = x.flatten(2).transpose(1, 2)[:, None].contiguous()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return out[:, 0].transpose(1, 2).view_as(x)


class Behind(GapNet):
    """Does something to the features, and squares it so that the score is no linear function of them."""

    def __init__(self, operation):
        net = relu_net()
        super().__init__(*net.features, head=net.head)
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self.features(x)).square().mean(dim=(2, 3)))


# How the gradients are called depends on torchvision's version.
OPERATIONS = {
    "deform_conv2d": (deformed, "deform_conv2d|DeformConv2dBackward"),
    "roi_align": (regions, "roi_align|ROIAlignBackward"),
    "fused attention": (attention, "attention"),
    "a compiled function": (lambda x: compiled(x), "a function compiled by torch.compile"),
    "once differentiable": (Once.apply, "twice .*Once"),
}


@pytest.mark.parametrize(("operation", "name"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(
    "step",
    [
        lambda model: LayerCAM("features")(model, X),
        lambda model: CGCRegularizer("features").compute(model, X),
        lambda model: CGCRegularizer("features")(model, X),
    ],
    ids=["g", "compute", "call"],
)
def test_what_has_no_second_derivative_is_named_before_the_backward(operation, name, step):
    model = Behind(operation)
    with pytest.raises(
        RuntimeError, match=rf"(?s)must have a second derivative.*'features', and behind it: .*({name})"
    ):
        step(model)
    with pytest.raises(RuntimeError, match="must have a second derivative"):
        step(model)  # who tries again is told again
    explain(model, X, "features")  # needs none
    with torch.no_grad():
        step(model)


def test_the_closed_form_needs_no_second_derivative():
    model = Behind(deformed)
    CAM("features")(model, X).heatmap.sum().backward()


# ---- the gradient of a function of the user's own


class Swish(torch.autograd.Function):
    """Whose backward knows what it does to the incoming gradient, and not what the input does to it."""

    @staticmethod
    def forward(ctx, x):
        ctx.share = x.sigmoid()
        ctx.save_for_backward(x)
        return x * ctx.share

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (ctx.share + x * ctx.share * (1 - ctx.share))


class RightSwish(Swish):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


def swish_net(function):
    class Activation(nn.Module):
        def forward(self, x):
            return function.apply(x)

    torch.manual_seed(0)
    return GapNet(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), Activation(), nn.Conv2d(6, 8, 3), head=nn.Linear(8, 5)
    )


@pytest.mark.parametrize("explainer", ["features.1", GradCAM("features.1"), LayerCAM("features.1")])
def test_a_function_with_a_wrong_second_derivative_is_found(explainer):
    with pytest.raises(ValueError, match=r"must be that of finite differences; got a relative difference of"):
        check_gradient(swish_net(Swish), X, explainer)
    assert check_gradient(swish_net(RightSwish), X, explainer) < 1e-5


def test_the_check_takes_a_layer_itself_and_leaves_the_model_alone():
    model = relu_net(nn.BatchNorm2d)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check_gradient(model, X, GradCAM(model.features), 1) < 1e-4
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="`tolerance` must"):
        check_gradient(model, X, "features", tolerance=-1.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_check_may_be_made_without_gradients(mode):
    with mode():
        assert check_gradient(relu_net(), X.clone(), "features", 1) < 1e-3


def test_the_check_of_blank_heatmaps_says_so():
    model = relu_net()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match="must have a gradient to be checked; got heatmaps that are blank"):
        check_gradient(model, X, "features")
