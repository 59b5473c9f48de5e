"""What a user may get wrong: each a clear error that says what was got and what to do, with nothing left changed."""

import types

import explainers
import pytest
import torch
import torch.nn.functional as F
from networks import InPlace, assert_same, buffers_of, relu_net, settings_of
from strategies import generator
from torch import nn
from torchvision.transforms import v2

from cgc_reg import (
    CGCRegularizer,
    ContrastiveTransforms,
    RandomResizedCropFlip,
    SpatialTransform,
    consistency,
    explain,
    mse_consistency,
)

X = torch.randn(4, 3, 16, 16, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4])


def regularizer(target_layer="features", **options):
    return explainers.regularizer(target_layer, generator=generator(0), **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"explainer": nn.Identity()}, TypeError),
        ({"explainer": 4}, TypeError),
        ({"transform": "crop"}, TypeError),
        ({"transform": lambda x: x}, TypeError),
        ({"transform": RandomResizedCropFlip}, TypeError),
        ({"loss": "mse"}, ValueError),
        ({"temperature": 0}, ValueError),
        ({"temperature": -0.5}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"negatives": "all"}, ValueError),
        ({"heatmap_size": 7}, ValueError),
        ({"heatmap_size": (7, 0)}, ValueError),
        ({"view_size": (8.0, 8.0)}, ValueError),
        ({"bn_mode": "freeze"}, ValueError),
        ({"reduction": "max"}, ValueError),
    ],
)
def test_unknown_options_are_refused_at_once(options, error):
    (name,) = options
    with pytest.raises(error, match=f"`{name}` must"):
        CGCRegularizer(**{"explainer": "features", **options})


@pytest.mark.parametrize("options", [{"loss": "mse"}, {"temperature": 0}, {"reduction": "max"}, {"loss": F.l1_loss}])
def test_preset_refuses_unknown_options_at_once(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must"):
        CGCRegularizer.official("layer4", **options)


IDENTITY = SpatialTransform.identity(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"`x` must be images.*\(3, 16, 16\).*x\[None\]"),
        (
            {"x": torch.stack([X, X])},
            ValueError,
            r"`x` must be images of shape \(n, c, h, w\), as .*\(2, 4, 3, 16, 16\)\. With it the model gave \w+Error: ",
        ),
        ({"x": X[:0]}, ValueError, "an empty batch"),
        ({"x": X.byte()}, TypeError, "`x` must hold floating-point images.*uint8"),
        ({"x": X.numpy()}, TypeError, "`x` must be a tensor of images.*ndarray"),
        (
            {"x": list(X)[:2]},
            TypeError,
            r"images.*; got \[a float32 tensor of shape \(3, 16, 16\), a float32 tensor of shape.{12}\]",
        ),
        ({"x": X[:1]}, ValueError, "batch of one"),
        ({"model": lambda x: x}, TypeError, "`model` must be a torch.nn.Module"),
        (
            {"target": Y[:3]},
            ValueError,
            r"`target` must be of shape \(4,\), or \(4, classes\) for weights; got .*\(3,\)",
        ),
        (
            {"target": F.one_hot(Y, 6)},
            ValueError,
            r"`target` must hold a weight for each of the 5 scores.*got shape \(4, 6\)",
        ),
        ({"target": Y[:, None]}, ValueError, r"`target` must hold a weight for each.*`target\[:, 0\]`"),
        ({"target": F.one_hot(Y, 5)[:3]}, ValueError, r"`target` must be of shape \(4,\)"),
        ({"target": Y.float()}, TypeError, "`target` must hold integer.*float32"),
        ({"target": Y > 1}, TypeError, "`target` must hold integer.*bool"),
        ({"target": True}, TypeError, "`target` must be a tensor, a list or an integer; got True"),
        ({"target": [0, "cat", 1, 2]}, TypeError, "`target` must be a tensor, a list or an integer; got .*'cat'"),
        ({"target": 5}, ValueError, "`target` must hold classes from 0 to 4.*got 5 to 5"),
        ({"target": Y + 1}, ValueError, "`target` must hold classes from 0 to 4.*got 1 to 5"),
        ({"target": Y - 1}, ValueError, "`target` must hold classes from 0 to 4.*got -1 to 3"),
        ({"view": X}, ValueError, "`view` without `transform`"),
        ({"transform": IDENTITY}, ValueError, "`transform` without `view`"),
        (
            {"view": X[:3], "transform": IDENTITY},
            ValueError,
            "`view` must hold one image, of 2 dim.* for each of the 4",
        ),
        (
            {"view": X[:, 0], "transform": IDENTITY},
            ValueError,
            "`view` must hold one image, of 2 dim.* for each of the 4",
        ),
        ({"view": X, "transform": IDENTITY[:3]}, ValueError, "`transform` must hold one map.*4.*got 3"),
        ({"view": X, "transform": IDENTITY.theta}, TypeError, r"`transform` must be a SpatialTransform.*theta"),
    ],
)
def test_bad_inputs_are_refused(arguments, error, message):
    model = relu_net()
    given = {"model": model, "x": X, **arguments}
    before = settings_of(model)
    with pytest.raises(error, match=message):
        regularizer().compute(**given)
    if "view" not in given and "transform" not in given:
        with pytest.raises(error, match=message):
            regularizer()(**given)
    assert settings_of(model) == before
    assert torch.is_grad_enabled()


class Wrong(nn.Module):
    """A net whose layers put out what no heatmap can be made of, and whose logits are none."""

    def __init__(self):
        super().__init__()
        self.net = relu_net()
        self.flat = nn.Flatten()
        self.aside = nn.Conv2d(3, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.stages = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x):
        self.flat(x)
        self.aside(x)
        for stage in self.stages:
            x = stage(x)
        return self.net(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_layer": "net.feature"}, ValueError, "got 'net.feature'. Do you mean 'net.features'"),
        ({"target_layer": "layer4"}, ValueError, "of Wrong; got 'layer4'. Do you mean .*named_modules"),
        (
            {"target_layer": "flat"},
            ValueError,
            r"got a .*\(4, 768\) from 'flat'. Name a layer in front of the pooling",
        ),
        ({"target_layer": "aside"}, RuntimeError, "must lead to the logits"),
        ({"target_layer": "unused"}, RuntimeError, "which it did not call. Name another, or let"),
        ({"target_layer": "stages"}, RuntimeError, r"name the last part: 'stages\.1'"),
        ({"output_fn": lambda output: output.mean(dim=1)}, ValueError, r"`output_fn` must return logits.*got .*\(4,\)"),
        ({"output_fn": lambda output: output.detach()}, RuntimeError, "must lead to the logits"),
        (
            {"reshape_transform": lambda a: a.flatten(2)},
            ValueError,
            r"`reshape_transform` must return maps.*\(4, 8, 16\)",
        ),
        ({"reshape_transform": lambda a: (a, a)}, ValueError, r"`reshape_transform` must return maps.*got \(a"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_options_that_do_not_fit_the_model_are_refused(options, error, message, training):
    model = Wrong().train(training)
    before = settings_of(model)
    reg = regularizer(**{"target_layer": "net.features", **options})
    for run in (reg, reg.compute):
        with pytest.raises(error, match=message):
            run(model, X)
    assert settings_of(model) == before


def test_batch_of_one_is_refused_before_the_model_runs():
    model = relu_net(nn.BatchNorm2d)
    before = buffers_of(model)
    with pytest.raises(ValueError, match="batch of one"):
        regularizer().compute(model, X[:1])
    assert_same(buffers_of(model), before)


@pytest.mark.parametrize("options", [{}, {"heatmap_size": (7, 7)}], ids=str)
def test_heatmap_of_one_pixel_is_refused(options):
    # Its cosine with any other is 1 or 0: it would train nothing and say nothing.
    with pytest.raises(ValueError, match=r"more than one pixel.*\(4, 1, 1\).*\(4, 4\). Name an earlier layer"):
        regularizer(**options)(relu_net(), X[:, :, :4, :4])


@pytest.mark.parametrize("loss", ["mse_consistency", lambda query, key: (query - key).square().mean()])
def test_gathering_without_negatives_is_refused(loss):
    with pytest.raises(ValueError, match="`gather_distributed` must be False unless `loss` is 'info_nce'"):
        CGCRegularizer("features", loss=loss, gather_distributed=True)


def test_batch_of_one_will_do_without_negatives():
    assert regularizer(loss="mse_consistency")(relu_net(), X[:1]).isfinite()


@pytest.mark.parametrize(
    "returned", [lambda n: SpatialTransform.identity(n - 1), lambda n: torch.eye(2, 3).repeat(n, 1, 1)]
)
def test_sampler_that_returns_something_else_is_refused(returned):
    sampler = types.SimpleNamespace(sample=lambda n, size, *, device, generator: returned(n))
    with pytest.raises(TypeError, match=r"`transform\.sample` must return a SpatialTransform of 4 maps"):
        regularizer(transform=sampler)(relu_net(), X)


@pytest.mark.parametrize("returned", [lambda q, k: 0.5, lambda q, k: q, lambda q, k: q.sum(dim=(1, 2))[:2]])
def test_loss_of_another_shape_is_refused(returned):
    with pytest.raises(ValueError, match=r"`loss` must return a scalar tensor, or one of shape \(4,\)"):
        regularizer(loss=returned)(relu_net(), X)


@pytest.mark.parametrize(
    "loss",
    [
        lambda query, key: 1 - consistency(query, key)["margin"],
        lambda query, key: (query - key).detach().square().mean(dim=(1, 2)),
        torch.no_grad()(lambda query, key: (query - key).square().mean()),
    ],
    ids=["measure", "detached", "no_grad"],
)
def test_loss_without_a_graph_is_refused_in_training(loss):
    model, reg = relu_net(), regularizer(loss=loss)
    for run in (reg, reg.compute):
        with pytest.raises(RuntimeError, match="`loss` must return a tensor in the graph of query and key"):
            run(model, X)
    with torch.no_grad():
        assert reg(model, X).isfinite()
    assert reg(relu_net().requires_grad_(False), X).isfinite()


@pytest.mark.parametrize(
    "returned", [lambda a, g: a, lambda a, g: a.sum(), lambda a, g: a[:2].sum(dim=1), lambda a, g: None]
)
def test_heatmap_of_another_shape_is_refused(returned):
    with pytest.raises(ValueError, match=r"`rule` must return heatmaps of shape \(n, h, w\), here \(4, 4, 4\)"):
        regularizer(heatmap=returned)(relu_net(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": 0}, "`generator` must be a torch.Generator, or None; got 0. Make one"),
        ({"detach_key": "no"}, "`detach_key` must be True or False; got 'no'"),
        ({"gather_distributed": 1}, "`gather_distributed` must be True or False; got 1"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        CGCRegularizer("features", **options)


def test_model_that_changes_its_images_is_refused():
    reg = regularizer("net.features")
    for run in (reg, reg.compute):
        with pytest.raises(RuntimeError, match="`model` must leave its images as they are"):
            run(InPlace(), X.clone())


class TwoViews(nn.Module):
    """A net that adds the mirrored images to the batch, and averages the scores of both."""

    def __init__(self):
        super().__init__()
        self.net = relu_net()

    def forward(self, x):
        return self.net(torch.cat([x, x.flip(3)])).view(2, len(x), 5).mean(dim=0)


def test_layer_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"one map for each of the 4 images; got .*\(8, 8, 4, 4\)"):
        regularizer("net.features")(TwoViews(), X)
    with pytest.raises(ValueError, match="one map for each of the 4 images"):
        explain(TwoViews(), X, "net.features")


def test_empty_batch_is_no_pair():
    with pytest.raises(ValueError, match="an empty batch"):
        mse_consistency(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": v2.RandomHorizontalFlip()}, "`transform` must draw transforms with a method `sample`"),
        ({"transform": RandomResizedCropFlip}, "got the class RandomResizedCropFlip itself"),
        ({"image_transform": RandomResizedCropFlip()}, "`image_transform` must be a function of one image"),
        ({"value_transform": v2.RandomHorizontalFlip}, "`value_transform` must be a function.*got the class"),
    ],
)
def test_transforms_of_another_kind_are_refused_before_the_workers_start(options, message):
    with pytest.raises(TypeError, match=message):
        ContrastiveTransforms(**options)
