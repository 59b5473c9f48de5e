"""Heatmaps that would train nothing are refused, and images that mix are pointed out."""

import warnings

import explainers
import pytest
import torch
from networks import GapNet, relu_net
from strategies import generator
from torch import nn

from cgc_reg.model.graph import nodes_between

X = torch.randn(4, 3, 16, 16, generator=generator(0))


def regularizer(layer="features", **options):
    return explainers.regularizer(layer, generator=generator(1), **options)


def freeze_all_but(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def mixing_net(norm=nn.BatchNorm2d):
    """A net with a norm behind its target layer `features.0`."""
    return GapNet(nn.Conv2d(3, 6, 3, stride=2), norm(6), nn.ReLU(), head=nn.Linear(6, 5))


@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
def test_bias_alone_trains_no_heatmap(heatmap):
    # dy/dA of a linear head is its weight: the bias is no part of it.
    model = freeze_all_but(relu_net(), "head.bias")
    with pytest.raises(RuntimeError, match="train nothing"):
        regularizer(heatmap=heatmap)(model, X)


@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
@pytest.mark.parametrize("name", ["head.weight", "features.0.weight", "features.0.bias"])
def test_one_trainable_parameter_is_enough(name, heatmap):
    model = freeze_all_but(relu_net(), name)
    regularizer(heatmap=heatmap)(model, X).backward()
    assert dict(model.named_parameters())[name].grad.count_nonzero() > 0


def test_bias_alone_is_measured_without_gradients():
    with torch.no_grad():
        assert regularizer()(freeze_all_but(relu_net(), "head.bias"), X).isfinite()


@pytest.mark.parametrize("run", [lambda reg, model: reg(model, X), lambda reg, model: reg.compute(model, X)])
def test_norm_behind_the_layer_is_pointed_out_once(run):
    model, reg = mixing_net(), regularizer("features.0")
    with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`") as caught:
        run(reg, model)
    assert [warning.filename for warning in caught] == [__file__]
    run(reg, model)  # a second warning would be an error
    run(reg, nn.DataParallel(model))


def test_norm_is_not_pointed_out_without_gradients():
    with torch.no_grad():
        regularizer("features.0")(mixing_net(), X)


def test_norm_that_comes_into_training_later_is_pointed_out_then():
    model, reg = mixing_net(), regularizer("features.0")
    model.features[1].eval()
    reg(model, X)
    model.train()
    with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`"):
        reg(model, X)


def test_norm_of_a_second_model_is_pointed_out_too():
    reg = regularizer("features.0")
    for model in (mixing_net(), mixing_net()):
        with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`"):
            reg(model, X)


class OwnNorm(nn.Module):
    """BatchNorm by its function alone."""

    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


def test_norm_that_is_no_module_of_torchs_is_pointed_out():
    with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`"):
        regularizer("features.0")(mixing_net(OwnNorm), X)


class Skip(nn.Module):
    """A layer `top` beside a BatchNorm, in a network that adds up both branches."""

    def __init__(self, behind=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.beside = nn.BatchNorm2d(6)
        self.top = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.behind = behind or nn.Identity()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.behind(self.beside(x) + self.top(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
def test_norm_beside_the_layer_is_not_behind_it(mixes, frozen):
    model = Skip(nn.BatchNorm2d(6) if mixes else None)
    if frozen:  # the layer's output is then a leaf of the graph
        for module in (model.stem, model.beside, model.top):
            module.requires_grad_(False)
    kept = []
    with model.top.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad_())):
        score = model(X)[0].max()
    (gradient,) = torch.autograd.grad(score, kept)
    assert bool(gradient[1:].count_nonzero()) == mixes  # the first image's score depends on the others' maps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regularizer("top")(model, X)
    assert sum("BatchNorm behind" in str(warning.message) for warning in caught) == mixes
    assert sum("goes around 'top'" in str(warning.message) for warning in caught) == (not frozen)


def test_only_what_mixes_images_is_pointed_out():
    evaluated = mixing_net()
    evaluated.features[1].eval()
    cases = [
        (mixing_net().eval(), "features.0"),
        (evaluated, "features.0"),
        (mixing_net(lambda channels: nn.GroupNorm(2, channels)), "features.0"),
        (mixing_net(lambda channels: nn.InstanceNorm2d(channels, affine=True)), "features.0"),
        (GapNet(nn.BatchNorm2d(3), *mixing_net(nn.InstanceNorm2d).features, head=nn.Linear(6, 5)), "features.1"),
        (mixing_net(), "features"),  # the norm is in the layer, not behind it
        (relu_net(nn.BatchNorm2d), "features"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, layer in cases:
            regularizer(layer)(model, X)


def test_norm_of_an_earlier_layer_is_pointed_out_after_a_later_one():
    model = mixing_net()
    regularizer("features")(model, X)
    with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`"):
        regularizer("features.0")(model, X)


class OwnBatchNorm(torch.autograd.Function):
    """A norm with a backward of its own, as that of synchronised BatchNorm."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(dim=(0, 2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(dim=(0, 2, 3), keepdim=True)


class Synchronised(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return OwnBatchNorm.apply(x)


def test_norm_with_a_backward_of_its_own_is_pointed_out():
    with pytest.warns(UserWarning, match="BatchNorm behind `target_layer`"):
        regularizer("features.0")(mixing_net(Synchronised), X)


def test_each_node_is_walked_through_once():
    source = torch.ones(2, requires_grad=True)
    between = source * 2
    result = between
    for _ in range(3):
        result = result + torch.tanh(result)  # twice as many paths each time
    walked = list(nodes_between(between, result))
    assert len(walked) == len(set(walked)) == 6
