"""The heatmap rules against closed forms, captum and loops over pixels."""

import captum.attr
import pytest
import torch
import torchvision
from explainers import RULES
from hypothesis import given
from hypothesis import strategies as st
from networks import GapNet, relu_net
from strategies import generator, laws, seeds
from torch import nn
from torchvision.transforms import functional as TF

from cgc_reg import (
    CAM,
    GradCAM,
    HiResCAM,
    class_activation,
    explain,
    full_grad,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    positive_grad_cam,
    xgrad_cam,
)
from cgc_reg.model.gradient import score_gradients

MODEL = nn.Identity()  # which is asked whether it is sharded


def pair(seed, n=2, c=3, h=4, w=5, dtype=torch.float64):
    """An activation and a gradient of either sign."""
    a, g = torch.randn(2, n, c, h, w, dtype=dtype, generator=generator(seed))
    return a, g


def slow_grad_cam(a, g):
    return sum(g[c].mean() * a[c] for c in range(len(a))).clamp(min=0)


def slow_hires_cam(a, g):
    return sum(g[c] * a[c] for c in range(len(a))).clamp(min=0)


def slow_layer_cam(a, g):
    heatmap = torch.zeros(a.shape[1:], dtype=a.dtype)
    for c, u, v in torch.cartesian_prod(*map(torch.arange, a.shape)):
        heatmap[u, v] += max(g[c, u, v].item(), 0) * a[c, u, v]
    return heatmap.clamp(min=0)


def slow_positive_grad_cam(a, g):
    heatmap = torch.zeros(a.shape[1:], dtype=a.dtype)
    for c in range(len(a)):
        alpha = sum(max(value, 0) for value in g[c].flatten().tolist()) / g[c].numel()
        heatmap += alpha * a[c]
    return heatmap.clamp(min=0)


def slow_grad_cam_plus_plus(a, g):
    heatmap = torch.zeros(a.shape[1:], dtype=a.dtype)
    for c in range(len(a)):
        positive = [d for d in g[c].flatten().tolist() if d > 0]
        heatmap += a[c] * sum(d**2 / (2 * d**2 + d**3 * a[c].sum().item()) * d for d in positive)
    return heatmap.clamp(min=0)


def slow_xgrad_cam(a, g):
    return sum(a[c] * (g[c] * a[c]).sum() / a[c].sum() for c in range(len(a))).clamp(min=0)


SLOW = {
    grad_cam: slow_grad_cam,
    hires_cam: slow_hires_cam,
    layer_cam: slow_layer_cam,
    positive_grad_cam: slow_positive_grad_cam,
    grad_cam_plus_plus: slow_grad_cam_plus_plus,
    xgrad_cam: slow_xgrad_cam,
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)  # one without a slow loop fails


@rules
@laws
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_rule_equals_a_loop_over_channels_and_pixels(rule, seed, n, c, h, w):
    activation, gradient = pair(seed, n, c, h, w)
    expected = [SLOW[rule](a, g) for a, g in zip(activation, gradient, strict=True)]
    torch.testing.assert_close(rule(activation, gradient), torch.stack(expected))


@rules
def test_rule_is_differentiable_by_activation_and_gradient(rule):
    activation, gradient = torch.rand(2, 2, 3, 2, 3, dtype=torch.float64) + 0.5  # from 0.5 to 1.5
    # Against evidence of at most 2 * 1.5 * 1.5 = 4.5 stands 0.5 * 10: every sum lies clear of the ReLU's kink.
    gradient = torch.cat([gradient[:, :1] + 9.5, -gradient[:, 1:]], dim=1)
    assert torch.autograd.gradcheck(rule, (activation.requires_grad_(), gradient.requires_grad_()))


@rules
def test_rule_treats_each_image_alone(rule):
    activation, gradient = pair(0, n=3)
    # Tolerance zero: the sums of one image have one order, whatever the batch.
    torch.testing.assert_close(rule(activation, gradient)[1:2], rule(activation[1:2], gradient[1:2]), rtol=0, atol=0)


@rules
def test_rule_is_blank_without_positive_evidence(rule):
    activation, gradient = pair(0)
    assert rule(activation.abs(), -gradient.abs()).count_nonzero() == 0


def test_rules_that_keep_negative_gradients_differ_from_those_that_drop_them():
    activation, gradient = pair(0)
    assert not torch.allclose(grad_cam(activation, gradient), positive_grad_cam(activation, gradient))
    assert not torch.allclose(hires_cam(activation, gradient), layer_cam(activation, gradient))


@rules
def test_dead_channels_and_tiny_gradients_leave_a_rule_finite(rule):
    activation, gradient = pair(0, dtype=torch.float32)
    activation, gradient = activation.abs(), 1e-25 * gradient  # whose square is below float32's range
    activation[:, 0] = 0
    activation.requires_grad_(), gradient.requires_grad_()
    heatmap = rule(activation, gradient)
    assert heatmap.amax() > 0
    for found in torch.autograd.grad(heatmap.sum(), [activation, gradient]):
        assert found.isfinite().all()


def test_xgrad_cam_is_grad_cam_where_the_gradient_is_the_same_everywhere():
    activation, gradient = pair(0)
    activation, gradient = activation.abs(), gradient.mean(dim=(2, 3), keepdim=True).expand_as(gradient)
    torch.testing.assert_close(xgrad_cam(activation, gradient), grad_cam(activation, gradient))


def test_grad_cam_plus_plus_has_no_pole_where_maps_are_not_negative():
    activation, gradient = torch.ones(1, 1, 2, 2, requires_grad=True), torch.full((1, 1, 2, 2), -0.5).requires_grad_()
    heatmap = grad_cam_plus_plus(activation, gradient)  # 2 + d S = 0
    assert not heatmap.any()
    for found in torch.autograd.grad(heatmap.sum(), (activation, gradient)):
        assert found.isfinite().all()


def test_grad_cam_plus_plus_is_positive_grad_cam_for_small_scores():
    activation, gradient = pair(0)
    by_mean = positive_grad_cam(activation.abs(), 1e-9 * gradient)
    torch.testing.assert_close(
        grad_cam_plus_plus(activation.abs(), 1e-9 * gradient), by_mean * 4 * 5 / 2, rtol=1e-6, atol=0
    )


@laws
@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_full_grad_equals_a_loop_over_terms_channels_and_places(seed, n, channels):
    def term(*shape):
        return torch.randn(n, *shape, dtype=torch.float64, generator=generator(seed))

    terms = [term(3, 4, 6), term(channels, 2, 3), term(5), term(2, 1, 1)]
    expected = torch.zeros(n, 4, 6, dtype=torch.float64)
    for each in terms[:2]:
        for i in range(n):
            values = each[i].abs().flatten().tolist()
            low, high = min(values), max(values)
            for c in range(each.shape[1]):
                scaled = torch.tensor([[(abs(v) - low) / (high - low) for v in row] for row in each[i, c].tolist()])
                larger = TF.resize(scaled[None].double(), [4, 6], antialias=False)
                expected[i] += larger[0]
    torch.testing.assert_close(full_grad(terms, (4, 6)), expected, rtol=1e-6, atol=1e-6)


def test_full_grad_of_a_term_of_one_value_is_finite():
    term = torch.ones(1, 2, 2, 2, requires_grad=True)
    heatmap = full_grad([term], (2, 2))
    heatmap.sum().backward()
    assert heatmap.count_nonzero() == 0
    assert term.grad.isfinite().all()


def test_full_grad_of_an_empty_batch_is_empty():
    assert full_grad([torch.rand(0, 3, 8, 8), torch.rand(0, 2, 4, 4)], (8, 8)).shape == (0, 8, 8)


@laws
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_closed_form_of_average_pooling_and_a_linear_head(seed, h, w):
    activation, _ = pair(seed, n=3, c=4, h=h, w=w)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator(seed))
    target = torch.tensor([4, 0, 2])
    logits = activation.requires_grad_().mean(dim=(2, 3)) @ weight.T + 7
    (gradient,) = score_gradients(MODEL, logits, [activation], target, create_graph=False)
    by_hand = torch.stack(
        [sum(weight[k, c] * a[c] for c in range(4)).clamp(min=0) for a, k in zip(activation, target, strict=True)]
    )
    torch.testing.assert_close(grad_cam(activation, gradient), by_hand / (h * w))
    torch.testing.assert_close(hires_cam(activation, gradient), by_hand / (h * w))
    torch.testing.assert_close(class_activation(activation, weight, target), by_hand)


def deep_head_net():
    """A net with a convolution and two linear layers behind the map, where the rules differ."""
    net = relu_net()
    net.features.append(nn.Conv2d(8, 8, 3, padding=1))
    net.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    return net.double().eval(), "features.5"


def resnet18():
    return torchvision.models.resnet18(num_classes=5).double().eval(), "layer4"


def middle_of_resnet18():
    return torchvision.models.resnet18(num_classes=5).double().eval(), "layer3"


models = pytest.mark.parametrize("build", [deep_head_net, resnet18, middle_of_resnet18])


@models
def test_grad_cam_equals_captum(build):
    model, layer = build()
    x, target = torch.randn(3, 3, 64, 64).double(), torch.tensor([1, 4, 0])
    oracle = captum.attr.LayerGradCam(model, model.get_submodule(layer))
    expected = oracle.attribute(x, target, relu_attributions=True)
    torch.testing.assert_close(explain(model, x, layer, target)[:, None], expected)


@models
def test_hires_cam_equals_captum(build):
    model, layer = build()
    x, target = torch.randn(3, 3, 64, 64).double(), torch.tensor([1, 4, 0])
    oracle = captum.attr.LayerGradientXActivation(model, model.get_submodule(layer))
    expected = oracle.attribute(x, target).sum(dim=1).relu()
    torch.testing.assert_close(explain(model, x, HiResCAM(layer), target), expected)


def test_three_rules_agree_on_a_resnets_last_stage():
    model, layer = resnet18()
    x = torch.randn(3, 3, 64, 96).double()
    pooled, full, closed = (explain(model, x, g(layer)) for g in (GradCAM, HiResCAM, CAM))
    assert pooled.amax(dim=(1, 2)).min() > 0
    torch.testing.assert_close(pooled, full)
    torch.testing.assert_close(pooled * (2 * 3), closed)  # a map of 2 x 3 for 64 x 96 pixels at stride 32


def test_score_gradient_equals_one_image_at_a_time():
    net = GapNet(nn.Conv2d(3, 4, 3), head=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))).double()
    activation, target = (
        net.features(torch.randn(3, 3, 6, 6).double()).detach().requires_grad_(),
        torch.tensor([2, 0, 1]),
    )
    (together,) = score_gradients(net, net.head(activation.mean(dim=(2, 3))), [activation], target, create_graph=False)
    for i, k in enumerate(target):
        alone = activation[i : i + 1].detach().requires_grad_()
        net.head(alone.mean(dim=(2, 3)))[0, k].backward()
        torch.testing.assert_close(together[i : i + 1], alone.grad)


@pytest.mark.parametrize("create_graph", [True, False])
def test_score_gradient_has_a_graph_exactly_on_request(create_graph):
    activation = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits = activation.square().mean(dim=(2, 3))
    (gradient,) = score_gradients(MODEL, logits, [activation], torch.tensor([0, 1]), create_graph=create_graph)
    assert gradient.requires_grad == create_graph


def test_score_gradient_works_where_gradients_are_off():
    activation = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits = activation.mean(dim=(2, 3))
    with torch.no_grad():
        (gradient,) = score_gradients(MODEL, logits, [activation], torch.tensor([0, 1]), create_graph=False)
    assert gradient.sum() == 2  # one for each image: the scores are means


def test_score_gradient_is_none_for_scores_of_something_else():
    activation, logits = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    assert score_gradients(MODEL, logits, [activation], torch.tensor([0, 1]), create_graph=False) == [None]


def test_score_gradient_survives_halfs_range():
    # A weight of 0.01 over 112 x 112 pixels gives 8e-7, which float16 rounds to a whole number of 6e-8s, to 3 % of it.
    activation = torch.rand(1, 1, 112, 112).half().requires_grad_()
    weight = torch.tensor(1e-2, dtype=torch.float16)
    logits = activation.mean(dim=(2, 3)) * weight
    (gradient,) = score_gradients(MODEL, logits, [activation], torch.tensor([0]), create_graph=False)
    expected = weight.double().item() / 112**2
    assert gradient.dtype == torch.float32
    # Scaled by 16 it is 1.3e-5, and half of float16's step there, 3e-8, is 2.3 thousandths of that.
    assert gradient.flatten().tolist() == pytest.approx([expected] * 112**2, rel=2.5e-3)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("activation", "gradient", "error"),
    [
        (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 5), ValueError),
        (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4), ValueError),
        (torch.rand(3, 4), torch.rand(3, 4), ValueError),
        (torch.rand(2, 3, 4, 4), None, TypeError),
        ([[[[1.0]]]], torch.rand(1, 1, 1, 1), TypeError),
    ],
)
def test_rule_refuses_other_shapes(rule, activation, gradient, error):
    with pytest.raises(error, match=r"`(activation|gradient)`.*\(n, c, h, w\)"):
        rule(activation, gradient)


@pytest.mark.parametrize(
    ("activation", "weight"),
    [
        (torch.rand(2, 3, 4, 4), torch.rand(5, 4)),
        (torch.rand(2, 3, 4, 4), torch.rand(3)),
        (torch.rand(2, 3), torch.rand(5, 3)),
    ],
)
def test_class_activation_refuses_a_weight_for_other_channels(activation, weight):
    with pytest.raises(ValueError, match=r"`weight` must be \(classes, c\)"):
        class_activation(activation, weight, torch.tensor([0, 1]))
