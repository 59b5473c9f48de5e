"""Heatmaps for looking at, the suggested layer, and the check of the closed form."""

from concurrent.futures import ThreadPoolExecutor

import captum.attr
import pytest
import torch
import torchvision
from explainers import EXPLAINERS, explainer
from networks import GapNet, InPlace, LinearProbe, assert_same, buffers_of, relu_net, settings_of
from strategies import generator
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

from cgc_reg import (
    CAM,
    CGCRegularizer,
    GradCAM,
    LayerExplainer,
    check_closed_form,
    explain,
    grad_cam,
    suggest_target_layer,
)

X = torch.randn(4, 3, 16, 16, generator=generator(0))


def resnet18():
    return torchvision.models.resnet18(num_classes=5)


def mixed_mode_net():
    """A net in training with a norm in evaluation mode and dropout."""
    net = relu_net(nn.BatchNorm2d)
    net(X)
    net.head = nn.Sequential(nn.Dropout(0.5), net.head)
    net.features[1].eval()
    return net


@pytest.mark.parametrize("heatmap", EXPLAINERS)
def test_heatmaps_have_the_layers_grid_and_no_graph(heatmap):
    heatmaps = explain(relu_net(), torch.rand(2, 3, 16, 24), explainer("features", heatmap))
    assert heatmaps.shape == (2, 4, 6)
    assert heatmaps.min() >= 0
    assert not heatmaps.requires_grad


def test_explain_equals_captum_for_the_predicted_class():
    model = resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    expected = captum.attr.LayerGradCam(model, model.layer4).attribute(
        x, model(x).argmax(dim=1), relu_attributions=True
    )
    torch.testing.assert_close(explain(model, x, "layer4")[:, None], expected)


def test_explain_runs_in_evaluation_mode():
    model = mixed_mode_net()
    assert_same(explain(model, X, "features"), explain(model.eval(), X, "features"))


@pytest.mark.parametrize(
    "look",
    [
        lambda model: explain(model, X, "features"),
        lambda model: suggest_target_layer(model, X),
        lambda model: check_closed_form(model, X, "features"),
    ],
    ids=["explain", "suggest_target_layer", "check_closed_form"],
)
def test_model_is_left_as_found(look):
    model = mixed_mode_net()
    settings, buffers = settings_of(model), buffers_of(model)
    look(model)
    assert settings_of(model) == settings
    assert_same(buffers_of(model), buffers)
    assert all(parameter.grad is None for parameter in model.parameters())


class Caching(nn.Module):
    """A net that computes its scale once for evaluation, until it is put into training again, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.features, self.head = relu_net().features, nn.Linear(8, 5)
        self.scale, self.cache = nn.Parameter(torch.randn(5)), None

    def train(self, mode=True):
        if mode:
            self.cache = None
        return super().train(mode)

    def forward(self, x):
        if not self.training and self.cache is None:
            self.cache = self.scale.detach().clone()
        return self.head(self.features(x).mean(dim=(2, 3))) * (self.scale if self.training else self.cache)


@pytest.mark.parametrize("look", [lambda model: explain(model, X, "features"), lambda m: suggest_target_layer(m, X)])
def test_what_a_model_stores_for_evaluation_does_not_outlive_a_look(look):
    model = Caching()
    look(model)
    with torch.no_grad():
        model.scale.normal_()
    logits = model(X)
    assert_same(model.eval()(X), logits)


def test_what_a_part_in_evaluation_mode_stores_stays():
    part = Caching().eval()
    part(X)
    model, cache = nn.Sequential(nn.Identity(), part), part.cache
    model.training = True
    explain(model, X, "1.features")
    assert part.cache is cache


def test_what_a_model_stores_for_evaluation_does_not_outlive_a_look_that_raises():
    model = Caching()
    model.head = nn.Linear(1, 1)
    model.register_forward_pre_hook(lambda *_: setattr(model, "cache", model.scale.detach()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        explain(model, X, "features")
    assert model.cache is None


class Trainer(Caching):
    """A net whose `train` is the training itself."""

    def train(self, epochs):
        raise AssertionError("was trained")


def test_a_train_that_is_no_switch_is_left_alone():
    assert explain(Trainer(), X, "features").isfinite().all()


@pytest.mark.parametrize(
    "look", [lambda model: explain(model, X, "features"), lambda model: suggest_target_layer(model, X)]
)
def test_model_is_left_as_found_when_it_raises(look):
    model = mixed_mode_net()
    model.head = nn.Linear(1, 1)  # the pooled map has 8 channels
    settings = settings_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        look(model)
    assert settings_of(model) == settings


def test_explain_finds_the_layer():
    model = relu_net()
    assert_same(explain(model, X), explain(model, X, "features"))


def test_target_is_the_class_of_each_image():
    model = relu_net()
    target = (model(X).argmax(dim=1) + 1) % 5
    together = explain(model, X, "features", target)
    alone = torch.cat([explain(model, X[i : i + 1], "features", target[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, explain(model, X, "features"))


def test_explain_works_on_a_frozen_model():
    model = relu_net()
    expected = explain(model, X, "features")
    assert_same(explain(model.requires_grad_(False), X, "features"), expected)


@pytest.mark.parametrize("layer", ["features.0", "features"])
def test_explain_works_in_inference_mode(layer):
    # The first layer hands on the images themselves, which inference mode has made unfit for a graph.
    net = relu_net()
    model = GapNet(nn.Identity(), *net.features, head=net.head)
    target = torch.tensor([0, 3, 1, 4])
    expected = explain(model, X, layer, target)
    with torch.inference_mode():
        assert_same(explain(model, X.clone(), layer), explain(model, X, layer))
        assert_same(explain(model, X.clone(), layer, target.clone()), expected)


def test_explain_works_on_a_model_that_runs_its_trunk_without_gradients():
    net = relu_net()
    probe = LinearProbe(*net.features, head=net.head)
    assert_same(explain(probe, X, "features"), explain(net, X, "features"))


def test_a_model_that_changes_its_images_does_so_in_a_copy():
    model, x = InPlace(), X.clone()
    heatmaps = explain(model, x, target=torch.arange(4))
    assert_same(heatmaps, explain(model.net, X - 0.5, "features", torch.arange(4)))
    check_closed_form(model, x, "net.features")
    assert_same(x, X)


class Skipping(nn.Module):
    """A net with a second head, on what a hook of its own keeps of its features."""

    def __init__(self):
        super().__init__()
        self.net, self.second = relu_net(), nn.Linear(8, 5)
        self.net.features.register_forward_hook(lambda module, args, output: setattr(self, "kept", output))

    def forward(self, x):
        return self.net(x) + self.second(self.kept.amax(dim=(2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_hook_of_the_models_keeps_of_the_layer_counts_too(frozen):
    model, target = Skipping(), torch.arange(4)
    score = model(X).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, model.kept)
    expected = grad_cam(model.kept.detach(), gradient)
    model.net.features.requires_grad_(not frozen)
    assert_same(explain(model, X, "net.features", target), expected)
    assert_same(CGCRegularizer("net.features").compute(model, X, target).heatmap, expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_hook_of_the_models_on_a_frozen_layer_may_work_in_place(gradients):
    model = relu_net()
    model.features.requires_grad_(False).register_forward_hook(lambda module, args, output: output.mul_(2))
    with torch.set_grad_enabled(gradients):
        heatmap = CGCRegularizer("features").compute(model, X).heatmap
    assert_same(heatmap, explain(model, X, "features"))


def test_threads_may_look_at_one_model():
    model, flash = relu_net().eval(), torch.backends.cuda.flash_sdp_enabled()
    images = [X + i for i in range(4)]
    expected = [explain(model, x, "features") for x in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: explain(model, x, "features"), images * 10))
    assert_same(found, expected * 10)
    assert torch.backends.cuda.flash_sdp_enabled() == flash


def test_explain_is_float32_under_autocast():
    model = relu_net()
    with torch.autocast("cpu", torch.bfloat16):
        heatmaps = explain(model, X, "features", torch.zeros(4).long())
    assert heatmaps.dtype == torch.float32
    exact = explain(model, X, "features", torch.zeros(4).long())
    # bfloat16 keeps 8 bits: a few roundings of 0.4 % of the largest value.
    torch.testing.assert_close(heatmaps, exact, rtol=0, atol=0.02 * exact.max().item())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "`x` must be images"),
        ({"x": X.numpy()}, TypeError, "`x` must be a tensor"),
        ({"x": X.byte()}, TypeError, "`x` must hold floating-point"),
        ({"model": "resnet18"}, TypeError, "`model` must be"),
        ({"explainer": "faetures"}, ValueError, "`target_layer`.*'features'"),
        ({"explainer": GradCAM}, TypeError, "`explainer` must be.*got the class GradCAM itself"),
        ({"explainer": nn.ReLU()}, TypeError, "`explainer` must be.*`GradCAM.layer.`"),
        ({"explainer": 4}, TypeError, "`explainer` must be.*got 4"),
        ({"target": torch.zeros(3).long()}, ValueError, r"`target`.*\(4,\)"),
        ({"target": [[0.5, 0.5], [1.0]]}, TypeError, "`target` must be a tensor, a list"),
        ({"target": torch.zeros(4)}, TypeError, "`target` must hold integer"),
        ({"explainer": CAM("features", head="haed")}, ValueError, "`head`.*'head'"),
        ({"explainer": LayerExplainer("features", lambda a, g: a)}, ValueError, "`rule` must return heatmaps"),
        ({"explainer": GradCAM("features", output_fn=torch.sum)}, ValueError, "`output_fn` must return logits"),
        ({"explainer": GradCAM("features", reshape_transform=torch.sum)}, ValueError, "`reshape_transform` must"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        explain(**{"model": relu_net(), "x": X, "explainer": "features", **arguments})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("densenet121", "features"),
        ("mobilenet_v2", "features"),
        ("vgg11", "features"),
        ("efficientnet_b0", "features"),
    ],
)
def test_suggested_layer_is_the_usual_one(name, layer):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    # No weight is read: shapes alone decide, and a meta model costs nothing.
    assert suggest_target_layer(model, torch.zeros(1, 3, 64, 64, device="meta")) == layer


def test_suggested_layer_is_named_as_inside_wrappers():
    assert suggest_target_layer(nn.DataParallel(relu_net()), X) == "features"


def test_suggested_layer_is_no_map_of_one_pixel():
    model = relu_net()
    model.head = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 5, 1), nn.Flatten())
    assert suggest_target_layer(model, X) == "features"


def test_suggested_layer_may_have_as_many_channels_as_there_are_classes():
    assert suggest_target_layer(relu_net(classes=8), X) == "features"


def test_suggested_layer_is_found_in_evaluation_mode():
    model = relu_net()
    model.head = nn.Sequential(model.head, nn.BatchNorm1d(5))  # which takes no single image in training
    assert suggest_target_layer(model, X[:1]) == "features"
    assert model.head[1].training


def test_suggested_layer_is_found_before_many_that_put_out_a_single_token():
    model = relu_net()
    model.head = nn.Sequential(nn.Unflatten(1, (1, 8)), *(nn.Linear(8, 8) for _ in range(8)), nn.Flatten())
    assert suggest_target_layer(model, X) == "features"


class Telling(GapNet):
    """Puts out early features beside its logits."""

    def forward(self, x):
        early = self.features[:3](x)
        return super().forward(x), early


def test_suggested_layer_is_found_where_a_model_puts_out_more_than_logits():
    net = relu_net()
    assert suggest_target_layer(Telling(*net.features, head=net.head), X) == "features"


def test_suggested_layer_is_inside_a_network_that_puts_out_a_map():
    assert suggest_target_layer(relu_net().features, X) == "3"


def test_network_without_a_map_gets_no_suggestion():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    with pytest.raises(ValueError, match="`model` must have a layer that puts out a map"):
        suggest_target_layer(model, X)


def test_closed_form_holds_for_average_pooling_and_a_linear_head():
    # Equal but for rounding: float32's 1e-7, times the square root of a few hundred terms.
    assert check_closed_form(resnet18(), torch.randn(2, 3, 64, 64), "layer4") < 1e-5


def test_closed_form_does_not_hold_before_a_relu():
    with pytest.raises(ValueError, match="CAM must agree with autograd"):
        check_closed_form(relu_net(), X, "features.4")


def test_closed_form_does_not_hold_before_a_norm():
    model = relu_net()
    model.features.append(nn.BatchNorm2d(8))
    nn.init.normal_(model.features[6].weight)
    with pytest.raises(ValueError, match="CAM must agree with autograd"):
        check_closed_form(model, X, "features.5")


def test_closed_form_does_not_hold_before_two_linear_layers():
    model = relu_net()
    model.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(ValueError, match="CAM must agree with autograd"):
        check_closed_form(model, X, "features")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = relu_net()

    def forward(self, x):
        return {"scores": self.net(x)}


def test_closed_form_is_checked_with_the_options_of_the_explainer():
    assert check_closed_form(relu_net(), X) < 1e-5
    assert check_closed_form(Named(), X, CAM("net.features", output_fn=lambda output: output["scores"])) < 1e-5


def test_closed_form_of_another_explainer_is_refused():
    with pytest.raises(TypeError, match="`explainer` must be a CAM"):
        check_closed_form(relu_net(), X, GradCAM("features"))


def test_closed_form_does_not_hold_where_heatmaps_are_no_numbers():
    with pytest.raises(ValueError, match="got a distance of nan"):
        check_closed_form(relu_net(), torch.full_like(X, float("nan")), "features")


def test_tolerance_decides_what_is_close():
    distance = check_closed_form(relu_net(), X, "features.4", tolerance=2)
    assert 0.01 < distance <= 2
    with pytest.raises(ValueError, match=f"above {distance / 2:g}"):
        check_closed_form(relu_net(), X, "features.4", tolerance=distance / 2)


def traced(**options):
    return create_feature_extractor(torchvision.models.resnet18(num_classes=5).eval(), ["fc"], **options)


def test_no_layer_inside_a_branch_is_suggested():
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"through which all goes .* got 'layer4\.1\.bn2' .*leaf_modules"):
        suggest_target_layer(traced(), x)
    whole = traced(tracer_kwargs={"leaf_modules": [BasicBlock]})
    assert suggest_target_layer(whole, x) == "layer4.1"


class Forked(nn.Module):
    """Two branches of the images, which meet in a layer, in a sum, or in the head."""

    def __init__(self, meet):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.head, self.meet = nn.Conv2d(6, 6, 1), nn.Linear(6, 4), meet

    def forward(self, x):
        x = self.stem(x)
        both = self.first(x) + self.second(x)
        if self.meet == "layer":
            both = self.last(both)
        return self.head((both if self.meet != "stem" else self.first(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("meet", "layer"), [("layer", "last"), ("sum", "stem"), ("stem", "first")])
def test_the_last_layer_that_all_goes_through_is_suggested(meet, layer, mode):
    model, x = Forked(meet), torch.rand(2, 3, 8, 8)
    with mode():
        assert suggest_target_layer(model, x.clone()) == layer
