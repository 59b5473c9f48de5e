"""Explainers: one pass, a heatmap in the graph, and a step with a loss of one's own that holds everywhere."""

import copy
import dataclasses
import gc
import pickle
import warnings
import weakref

import captum.attr
import pytest
import torch
import torch.nn.functional as F
import torchvision
from explainers import EXPLAINERS, RULES, explainer
from hypothesis import given
from hypothesis import strategies as st
from networks import GapNet, LinearProbe, assert_same, buffers_of, gradients, relu_net, settings_of, smooth_net
from strategies import generator, laws, seeds
from torch import nn
from torch.utils.checkpoint import checkpoint

from cgc_reg import (
    CAM,
    CGCRegularizer,
    Explanation,
    GradCAM,
    HiResCAM,
    LayerCAM,
    LayerExplainer,
    class_activation,
    explain,
    grad_cam,
    mse_consistency,
    suggest_target_layer,
)

X = torch.randn(4, 3, 16, 16, generator=generator(0), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 4])
WANTED = torch.rand(4, 4, 4, generator=generator(1), dtype=torch.float64)  # where a loss wants the heatmap
G = GradCAM("features")

each = pytest.mark.parametrize("heatmap", EXPLAINERS)


def net(norm=nn.Identity):
    torch.manual_seed(0)
    return relu_net(norm).double()


def loss_of(heatmap):
    """A loss of one's own, a mean over the images."""
    return (heatmap - WANTED[: len(heatmap)]).square().sum(dim=(1, 2)).mean()


def step_loss(g, model, x=X, y=Y):
    seen = g(model, x, target=y)
    return F.cross_entropy(seen.logits, y) + 0.1 * loss_of(seen.heatmap)


def slow(model, x, target, heatmap="grad_cam"):
    """Heatmaps image by image, from a pass written out, of the score sum_k w_k y_k."""
    heatmaps = []
    for image, weights in zip(x, target, strict=True):
        activation = model.features(image[None])
        score = (model.head(activation.mean(dim=(2, 3)))[0] * weights).sum()
        (gradient,) = torch.autograd.grad(score, activation, create_graph=True)
        if heatmap == "class_activation":
            heatmaps.append(class_activation(activation, model.head.weight, weights[None]))
        else:
            heatmaps.append(RULES[heatmap](activation, gradient))
    return torch.cat(heatmaps)


def one_hot(target):
    return F.one_hot(target, 5).double()


# ---- what it computes


@each
def test_heatmap_and_its_gradient_are_those_of_a_pass_written_out(heatmap):
    model = net()
    if heatmap != "class_activation":
        model.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    seen = explainer("features", heatmap)(model, X, target=Y)
    expected = slow(model, X, one_hot(Y), heatmap)
    assert seen.heatmap.amax() > 0
    torch.testing.assert_close(seen.heatmap, expected)
    torch.testing.assert_close(gradients(loss_of(seen.heatmap), model), gradients(loss_of(expected), model))
    assert_same(seen.logits, model(X))
    assert_same((seen.output, seen.target), (seen.logits, Y))


def test_gradient_of_every_parameter_equals_finite_differences():
    model, x, target = smooth_net(), X[:2, :, :8, :8], torch.tensor([2, 0])
    g = LayerExplainer("features", lambda a, da: (da.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1))
    parameters = tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda *_: g(model, x, target).heatmap.square().sum(), parameters)


@each
def test_equal_to_what_is_looked_at(heatmap):
    model, g = net(nn.BatchNorm2d).eval(), explainer("features", heatmap)
    assert_same(g(model, X, Y).heatmap.detach(), explain(model, X, g, Y))


def test_a_rule_of_ones_own():
    rule = LayerExplainer("features", lambda activation, gradient: (activation * gradient).norm(dim=1))
    assert rule(net(), X).heatmap.shape == (4, 4, 4)
    assert_same(LayerExplainer("features", grad_cam)(net(), X).heatmap, G(net(), X).heatmap)


# ---- target: which score


@each
@laws
@given(seed=seeds, classes=st.integers(1, 6))
def test_weights_of_scores_explain_their_weighted_sum(heatmap, seed, classes):
    torch.manual_seed(seed)
    model = relu_net(classes=classes).double()
    weights = torch.randn(4, classes, dtype=torch.float64)
    torch.testing.assert_close(
        explainer("features", heatmap)(model, X, weights).heatmap, slow(model, X, weights, heatmap)
    )


def test_gradient_of_weighted_scores_is_the_sum_over_classes():
    model = net()
    identity = LayerExplainer("features", lambda activation, gradient: gradient.sum(dim=1))
    weights = torch.randn(4, 5, generator=generator(2), dtype=torch.float64)
    by_class = [identity(model, X, k).heatmap * weights[:, k, None, None] for k in range(5)]
    torch.testing.assert_close(identity(model, X, weights).heatmap, torch.stack(by_class).sum(dim=0))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.bool, torch.uint8])
def test_one_hot_weights_are_a_class(heatmap, dtype):
    g = explainer("features", heatmap)
    torch.testing.assert_close(g(net(), X, F.one_hot(Y, 5).to(dtype)).heatmap, g(net(), X, Y).heatmap)


def test_several_labels_at_once_are_a_multi_hot():
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    seen = G(net(), X, labels)
    torch.testing.assert_close(seen.heatmap, slow(net(), X, labels.double()))
    assert seen.heatmap[2].count_nonzero() == 0  # an image without a label has no evidence to show
    assert seen.target.is_floating_point()


def test_what_tells_a_class_from_its_nearest_rival():
    model = net()
    top = model(X).topk(2, dim=1).indices
    weights = one_hot(top[:, 0]) - one_hot(top[:, 1])
    torch.testing.assert_close(G(model, X, weights).heatmap, slow(model, X, weights))


def test_minus_one_is_the_negative_class_of_a_single_logit():
    single, double = net(), net()
    single.head = nn.Linear(8, 1).double()
    double.head = nn.Linear(8, 2).double()
    with torch.no_grad():
        double.head.weight.copy_(torch.cat([-single.head.weight, single.head.weight]))
    weights = torch.full((4, 1), -1.0)
    torch.testing.assert_close(G(single, X, weights).heatmap, G(double, X, 0).heatmap)


@pytest.mark.parametrize("target", [Y.tolist(), tuple(Y.tolist()), Y.int(), one_hot(Y).tolist()], ids=str)
def test_a_list_or_other_integers_will_do(target):
    torch.testing.assert_close(G(net(), X, target).heatmap, G(net(), X, Y).heatmap)
    torch.testing.assert_close(explain(net(), X, G, target), explain(net(), X, G, Y))


def test_one_class_for_all_and_the_predicted_one():
    for three in (3, torch.tensor(3)):
        assert_same(G(net(), X, three).heatmap, G(net(), X, torch.full((4,), 3)).heatmap)
    assert_same(G(net(), X).target, net()(X).argmax(dim=1))


def test_regularizer_hands_weights_on():
    model, weights = net(), torch.randn(4, 5, generator=generator(2), dtype=torch.float64)
    out = CGCRegularizer(G, generator=generator(0)).compute(model, X, weights)
    view = G(model, out.view, weights).heatmap
    torch.testing.assert_close(out.heatmap, slow(model, X, weights))
    torch.testing.assert_close(out.key, view * out.transform.coverage((4, 4)))
    assert_same(out.target, weights)


# ---- a frozen value


@each
def test_explainers_are_values(heatmap):
    g = explainer("features", heatmap)
    assert g == explainer("features", heatmap) != explainer("other", heatmap)
    assert len({g, explainer("features", heatmap)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        g.target_layer = "other"
    for twin in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert twin == g
        assert_same(twin(net(), X).heatmap, g(net(), X).heatmap)


def test_repr_is_what_makes_it():
    assert repr(G) == "GradCAM('features')"
    assert repr(CAM("features", head="head")) == "CAM('features', head='head')"
    assert repr(GradCAM(net().head)) == "GradCAM(<Linear>)"
    assert repr(LayerExplainer(None, max)) == f"LayerExplainer(None, rule={max!r})"


def test_nothing_is_kept():
    model, x = net(), X.clone()
    seen = G(model, x, Y)
    traces = [weakref.ref(item) for item in (model, x, seen, seen.heatmap, seen.logits)]
    del model, x, seen
    gc.collect()
    assert [trace() for trace in traces] == [None] * len(traces)


@pytest.mark.parametrize("make", [*EXPLAINERS.values(), lambda layer, **o: LayerExplainer(layer, grad_cam, **o)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_layer": ""}, ValueError, "`target_layer` must be the dotted name"),
        ({"target_layer": 4}, ValueError, "`target_layer` must be.*got 4"),
        ({"output_fn": "logits"}, TypeError, "`output_fn` must be a function, or None; got 'logits'"),
        ({"reshape_transform": 7}, TypeError, "`reshape_transform` must be a function, or None; got 7"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, arguments, error, message):
    options = {"target_layer": "features", **arguments}
    with pytest.raises(error, match=message):
        make(options.pop("target_layer"), **options)


def test_a_single_image_is_refused():
    with pytest.raises(ValueError, match="`x` must"):
        G(net(), X[0])


def test_bad_rules_and_heads_are_refused_at_once():
    with pytest.raises(TypeError, match=r"`rule` must be a function.*'grad_cam'"):
        LayerExplainer("features", "grad_cam")
    with pytest.raises(TypeError, match="`head` must be the dotted name"):
        CAM("features", head=nn.Linear(8, 5))


class ConvolvedHead(GapNet):
    """A net whose head comes before the pooling."""

    def forward(self, x):
        return self.head(self.features(x)).mean(dim=(2, 3))


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "groups": 2}], ids=str)
def test_a_convolution_is_a_head_only_where_it_is_a_linear_layer(options):
    model = ConvolvedHead(*net().features, head=nn.Conv2d(8, 4, **options)).double()
    with pytest.raises(ValueError, match="one linear layer from 8 channels to 4 classes; got none"):
        CAM("features")(model, X)


# ---- the layer: by name, itself, or the suggested one


class Checkpointed(GapNet):
    """A net whose features a checkpoint runs again in the backward."""

    def forward(self, x):
        return self.head(checkpoint(self.features, x, use_reentrant=False).mean(dim=(2, 3)))


@each
def test_the_layer_itself_is_found_in_the_model(heatmap):
    model = net(nn.BatchNorm2d)
    twin = copy.deepcopy(model)
    named, itself = explainer("features", heatmap), explainer(model.features, heatmap)
    assert_same(itself(model, X, Y).heatmap, named(twin, X, Y).heatmap)
    assert_same(explain(nn.DataParallel(model), X, itself, Y), explain(twin, X, named, Y))


@pytest.mark.parametrize("build", [GapNet, Checkpointed])
@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
def test_the_layer_itself_is_found_in_extra_passes(build, bn_mode):
    model = build(*net(nn.BatchNorm2d).features, head=net().head)
    twin = copy.deepcopy(model)
    results = []
    for own, layer in ((model, model.features), (twin, "features")):
        loss = CGCRegularizer(GradCAM(layer), generator=generator(0), bn_mode=bn_mode)(own, X)
        results.append((loss.detach(), gradients(loss, own), buffers_of(own)))
    assert_same(*results)


def test_a_layer_that_is_compiled_is_found_as_itself():
    torch.compiler.reset()
    model = net()
    model.features = torch.compile(model.features, backend="eager")
    assert_same(GradCAM(model.features)(model, X, Y).heatmap, G(net(), X, Y).heatmap)


@pytest.mark.parametrize("run", [G.__class__.__call__, lambda g, model, x: explain(model, x, g)], ids=["g", "explain"])
def test_a_layer_of_another_model_or_of_a_copy_is_refused(run):
    model = net()
    for other in (copy.deepcopy(model), net()):
        with pytest.raises(ValueError, match=r"`target_layer` must be a layer of the model.*of another model"):
            run(GradCAM(other.features), model, X)


def test_a_copy_of_model_and_explainer_together_belong_together():
    model = net()
    g = GradCAM(model.features)
    twin, of_twin = copy.deepcopy((model, g))
    assert_same(of_twin(twin, X, Y).heatmap, g(model, X, Y).heatmap)
    with pytest.raises(ValueError, match="of another model, or of a copy"):
        of_twin(model, X)


def test_no_layer_is_the_suggested_one():
    assert_same(GradCAM(None)(net(), X, Y).heatmap, G(net(), X, Y).heatmap)
    assert GradCAM(None).with_layer(net(), X) == GradCAM(suggest_target_layer(net(), X))


class Flat(GapNet):
    def __init__(self):
        super().__init__(*net().features, head=net().head)
        self.flat = nn.Flatten()

    def forward(self, x):
        self.flat(x)
        return super().forward(x)


def test_the_error_for_a_layer_without_a_map_names_it():
    with pytest.raises(ValueError, match=r"got a float64 tensor of shape \(4, 768\) from 'flat'"):
        GradCAM("flat")(Flat(), X)


# ---- a step with a loss of one's own


@each
@pytest.mark.parametrize("training", [True, False])
def test_a_step_moves_and_leaves_what_a_plain_one_does(heatmap, training):
    model, plain = net(nn.BatchNorm2d).train(training), net(nn.BatchNorm2d).train(training)
    before = settings_of(model)
    seen = explainer("features", heatmap)(model, X, Y)
    logits = plain(X)
    assert_same(seen.logits, logits)
    assert_same(buffers_of(model), buffers_of(plain))
    loss = F.cross_entropy(seen.logits, Y) + 0 * seen.heatmap.sum()
    assert_same(gradients(loss, model), gradients(F.cross_entropy(logits, Y), plain))
    assert settings_of(model) == before


@each
def test_a_loss_on_the_heatmap_moves_it(heatmap):
    model, g = net(), explainer("features", heatmap)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(g(model, X, Y).heatmap)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_heatmap_in_float32(heatmap, dtype):
    model, x = net().float(), X.float()
    exact = explainer("features", heatmap)(model, x, Y)
    for target in (Y, one_hot(Y)):
        with torch.autocast("cpu", dtype):
            seen = explainer("features", heatmap)(model, x, target)
            loss = F.cross_entropy(seen.logits, Y) + 0.1 * loss_of(seen.heatmap)
        assert seen.heatmap.dtype == torch.float32
        assert seen.logits.dtype == dtype
        # bfloat16 keeps 8 bits: a few roundings of 0.4 % of the largest value.
        torch.testing.assert_close(seen.heatmap, exact.heatmap, rtol=0, atol=0.02 * exact.heatmap.max().item())
        assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())


@each
def test_mixed_precision_explains_weights_as_it_explains_classes(heatmap):
    model, x = net().float(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (explainer("features", heatmap)(model, x, target).heatmap for target in (Y, one_hot(Y).float()))
    assert_same(first, second)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def loss(model, share):
        seen = G(model, X[share], Y[share])
        return F.cross_entropy(seen.logits, Y[share]) + seen.heatmap.square().sum(dim=(1, 2)).mean()

    model, whole = net(), net()
    for half in (slice(0, 2), slice(2, 4)):
        (loss(model, half) / 2).backward()
    accumulated = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(accumulated, gradients(loss(whole, slice(0, 4)), whole))


@each
def test_above_a_frozen_trunk_it_trains_what_is_not_frozen(heatmap):
    model, g = net(), explainer("features", heatmap)
    full = gradients(step_loss(g, model), model)
    model.features.requires_grad_(False)
    frozen = gradients(step_loss(g, model), model)
    assert frozen.keys() == {"head.weight", "head.bias"}
    torch.testing.assert_close(frozen, {name: full[name] for name in frozen})


@each
def test_a_model_with_a_trunk_without_gradients(heatmap):
    probe = LinearProbe(*net().features, head=net().head)
    loss = step_loss(explainer("features", heatmap), probe)
    torch.testing.assert_close(loss, step_loss(explainer("features", heatmap), net()))
    assert gradients(loss, probe)["head.weight"].norm() > 0


def test_a_heatmap_that_trains_nothing_is_refused():
    model = net()
    model.features.requires_grad_(False)
    model.head.weight.requires_grad_(False)  # the bias is left, which no heatmap depends on
    with pytest.raises(RuntimeError, match="heatmaps that train nothing"):
        G(model, X)
    with torch.no_grad():
        assert not G(model, X).heatmap.requires_grad


def test_of_a_model_with_nothing_to_train_it_has_no_graph():
    seen = G(net().requires_grad_(False), X)
    assert not any(shown.requires_grad for shown in (seen.heatmap, seen.logits, seen.output))


def test_a_loss_on_the_heatmap_gives_no_gradient_to_what_it_does_not_depend_on():
    model = net()
    G(model, X).heatmap.sum().backward()
    assert model.head.weight.grad is not None
    assert model.head.bias.grad is None


def test_images_may_be_what_is_trained():
    x = X.clone().requires_grad_()
    seen = G(net().requires_grad_(False), x, Y)
    (gradient,) = torch.autograd.grad(loss_of(seen.heatmap), x)
    (expected,) = torch.autograd.grad(loss_of(slow(net(), x, one_hot(Y))), x)
    torch.testing.assert_close(gradient, expected)


def test_what_is_trained_may_be_no_parameter():
    """A prompt that a hook adds, as a plain tensor, to a frozen model."""
    model, prompt = net().requires_grad_(False), torch.zeros(6, 1, 1, requires_grad=True, dtype=torch.float64)
    model.features[0].register_forward_hook(lambda module, args, output: output + prompt)
    for loss in (loss_of(G(model, X, Y).heatmap), CGCRegularizer(G)(model, X)):
        (gradient,) = torch.autograd.grad(loss, prompt)
        assert gradient.norm() > 0


def test_weights_of_scores_may_be_what_is_trained():
    weights = one_hot(Y).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(G(net().requires_grad_(False), X, weights).heatmap), weights)
    assert gradient.norm() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_measure_of_a_model_with_a_trunk_without_gradients_is_one_pass_for_its_statistics(mode):
    build = net(nn.BatchNorm2d)
    model, plain = (LinearProbe(*copy.deepcopy(build).features, head=build.head) for _ in range(2))
    with mode():
        G(model, X.clone(), Y)
        plain(X.clone())
    assert_same(buffers_of(model), buffers_of(plain))


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_a_measure(heatmap, mode):
    model, g = net(nn.BatchNorm2d), explainer("features", heatmap)
    expected = g(copy.deepcopy(model), X, Y)
    with mode():
        seen = g(model, X.clone(), Y.clone())
    assert not seen.heatmap.requires_grad
    assert not seen.logits.requires_grad
    torch.testing.assert_close((seen.heatmap, seen.logits), (expected.heatmap.detach(), expected.logits.detach()))


def test_in_inference_mode_the_layer_may_hand_on_the_images():
    model, g = GapNet(nn.Identity(), *net().features, head=net().head), GradCAM("features.0")
    expected = g(model, X, Y).heatmap.detach()
    with torch.inference_mode():
        torch.testing.assert_close(g(model, X.clone(), Y).heatmap, expected)


@pytest.mark.parametrize("target", [Y, torch.rand(4, 5, generator=generator(2))], ids=["classes", "weights"])
@pytest.mark.parametrize("half", ["weights", "arithmetic"])
def test_the_closed_form_of_a_model_in_half_precision_is_worked_out_in_float32(half, target):
    model, x = net().bfloat16() if half == "weights" else net().float(), X.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "arithmetic"):
        x = x.bfloat16() if half == "weights" else x
        activation = model.features(x)
        heatmap = CAM("features")(model, x, target).heatmap
    assert_same(heatmap, class_activation(activation.float(), model.head.weight.float(), target))


def test_a_rule_runs_outside_of_autocast():
    seen = []
    g = LayerExplainer("features", lambda a, da: seen.append(torch.is_autocast_enabled("cpu")) or grad_cam(a, da))
    with torch.autocast("cpu", torch.bfloat16):
        g(net().float(), X.float())
    assert seen == [False]


def test_heatmaps_of_a_rule_in_half_precision_are_float32():
    g = LayerExplainer("features", lambda a, gradient: grad_cam(a, gradient).half())
    assert g(net(), X).heatmap.dtype is torch.float32


@pytest.mark.parametrize("saved", ["features", "head"])
@pytest.mark.parametrize("layer", ["features.2", "features"])
def test_checkpointing_changes_nothing(saved, layer):
    class Saving(GapNet):
        def forward(self, x):
            run = {"features": self.features, "head": self.head}
            keep = run[saved]
            run[saved] = lambda x: checkpoint(keep, x, use_reentrant=False)
            return run["head"](run["features"](x).mean(dim=(2, 3)))

    def loss(model):
        seen = GradCAM(layer)(model, X, Y)
        return F.cross_entropy(seen.logits, Y) + seen.heatmap.square().sum()

    model, plain = Saving(*net().features, head=net().head), net()
    torch.testing.assert_close(gradients(loss(model), model), gradients(loss(plain), plain))


def test_two_layers_in_one_step_add_up():
    model = net()

    def losses():
        return [GradCAM(layer)(model, X, Y).heatmap.square().sum() for layer in ("features.2", "features")]

    both = gradients(sum(losses()), model)
    first, second = (gradients(loss, model) for loss in losses())
    torch.testing.assert_close(both, {name: first[name] + second[name] for name in both})


def test_a_student_follows_a_teacher():
    student, teacher = (
        net(nn.BatchNorm2d),
        GapNet(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), head=nn.Linear(4, 5)).double(),
    )
    teacher.eval()
    before, buffers = copy.deepcopy(teacher.state_dict()), buffers_of(teacher)
    with torch.no_grad():
        wanted = G(teacher, X, Y)
    loss = mse_consistency(G(student, X, Y).heatmap, wanted.heatmap)
    assert gradients(loss, student)["features.0.weight"].norm() > 0
    assert_same(dict(teacher.state_dict()), dict(before))
    assert_same(buffers_of(teacher), buffers)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def warned_of(run):
    """Return the files that the warnings of two calls point to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
        run()
    return [(str(warning.message).split(",")[0], warning.filename) for warning in caught]


def test_a_norm_behind_the_layer_is_warned_of_once():
    model = net(nn.BatchNorm2d)
    message = "A BatchNorm behind `target_layer` normalises with the batch's statistics"
    assert warned_of(lambda: GradCAM("features.2")(model, X)) == [(message, __file__)]


def test_a_compiled_model_runs_as_written_with_one_warning():
    torch.compiler.reset()
    model, plain = net(), net()
    compiled = torch.compile(model, backend="eager")
    message = "What is compiled of the model around the layer of the heatmaps"
    assert warned_of(lambda: G(compiled, X)) == [(message, __file__)]
    assert_same(gradients(step_loss(G, compiled), model), gradients(step_loss(G, plain), plain))


def test_a_real_network_trains():
    torch.manual_seed(0)
    model, x, y = torchvision.models.resnet18(num_classes=5), torch.rand(4, 3, 64, 64), Y
    g = LayerCAM("layer4")
    seen = g(model, x, y)
    (F.cross_entropy(seen.logits, y) + seen.heatmap.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- reuse of the loop's own pass


def counted(model):
    """Count the passes through the first layer."""
    passes = []
    model.features[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


@each
def test_reuse_makes_no_pass_of_its_own(heatmap):
    model, plain = net(nn.BatchNorm2d), net(nn.BatchNorm2d)
    g, passes = explainer("features", heatmap), counted(model)
    with g.reuse(model):
        logits = model(X)
        seen = g(model, X, Y)
    assert len(passes) == 1
    loss = F.cross_entropy(logits, Y) + 0.1 * loss_of(seen.heatmap)
    assert_same(gradients(loss, model), gradients(step_loss(g, plain), plain))
    assert_same(buffers_of(model), buffers_of(plain))


def test_one_pass_serves_two_layers_and_a_regularizer():
    model, passes = net(), counted(net())
    passes = counted(model)
    g, other, reg = G, HiResCAM("features.2"), CGCRegularizer(G, generator=generator(0))
    with g.reuse(model), other.reuse(model):
        logits = model(X)
        near, far = g(model, X, Y), other(model, X, Y)
        cgc = reg(model, X, Y)
    assert len(passes) == 2  # the second is the view's
    assert near.logits is far.logits is logits
    plain = net()
    expected = (G(plain, X, Y).heatmap, HiResCAM("features.2")(plain, X, Y).heatmap)
    assert_same((near.heatmap, far.heatmap), expected)
    assert_same(cgc, CGCRegularizer(G, generator=generator(0))(plain, X, Y))


def test_a_pass_before_the_images_required_a_gradient_is_not_reused():
    model, x = net(), X.clone()
    with G.reuse(model):
        model(x)
        heatmap = G(model, x.requires_grad_(), Y).heatmap
    (gradient,) = torch.autograd.grad(loss_of(heatmap), x)
    assert gradient.norm() > 0


def test_what_is_kept_of_another_layer_is_not_reused():
    model = net()
    passes = counted(model)
    with HiResCAM("features.2").reuse(model):
        model(X)
        seen = G(model, X, Y)
    assert len(passes) == 2
    assert_same(seen.heatmap, G(net(), X, Y).heatmap)


# ---- explainers that are not ours


def three_lines(model, x, target=None):
    x = x.detach().requires_grad_()
    logits = model(x)
    target = logits.argmax(dim=1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    return Explanation(gradient.abs().amax(dim=1), logits, target)


def captum_saliency(model, x, target=None):
    def gradients_with_a_graph(forward, inputs, target, *_):
        return torch.autograd.grad(forward(*inputs).gather(1, target[:, None]).sum(), inputs, create_graph=True)

    x = x.detach().requires_grad_()
    logits = model(x)
    target = logits.argmax(dim=1) if target is None else target
    saliency = captum.attr.Saliency(model)
    saliency.gradient_func = gradients_with_a_graph
    return Explanation(saliency.attribute(x, target).amax(dim=1), logits, target)


def captum_grad_cam(model, x, target=None):
    logits = model(x)
    target = logits.argmax(dim=1) if target is None else target
    heatmap = captum.attr.LayerGradCam(model, model.features).attribute(
        x, target, relu_attributions=True, grad_kwargs={"create_graph": True}
    )
    return Explanation(heatmap[:, 0], logits, target)


def slow_saliency(model, x, target):
    heatmaps = []
    for image, k in zip(x, target, strict=True):
        image = image[None].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(image)[0, k], image, create_graph=True)
        heatmaps.append(gradient.abs().amax(dim=1))
    return torch.cat(heatmaps)


FOREIGN = {
    "three lines": (three_lines, slow_saliency),
    "captum's Saliency": (captum_saliency, slow_saliency),
    "captum's LayerGradCam": (captum_grad_cam, lambda model, x, target: slow(model, x, one_hot(target))),
}


def smoothly_deep():
    """A net with a curved head, whose saliency depends on the weights in more than their signs."""
    model = net()
    model.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    return model


@pytest.mark.parametrize("name", FOREIGN)
def test_the_step_of_a_foreign_explainer_is_the_slow_one(name):
    theirs, slow_one = FOREIGN[name]
    model = smoothly_deep()
    out = CGCRegularizer(theirs, generator=generator(0)).compute(model, X)
    size = tuple(out.heatmap.shape[1:])
    coverage = out.transform.coverage(size)
    query = out.transform(slow_one(model, X, out.target), size) * coverage
    key = slow_one(model, out.view, out.target) * coverage
    unit = [F.normalize(maps.flatten(1)) for maps in (query, key)]
    loss = F.cross_entropy(unit[0] @ unit[1].T / 0.5, torch.arange(4))
    torch.testing.assert_close((out.query, out.key, out.loss), (query, key, loss))
    found = gradients(out.loss, model)
    torch.testing.assert_close(found, gradients(loss, model))
    assert found["features.0.weight"].norm() > 0


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("run", ["compute", "forward"])
def test_a_foreign_explainer_becomes_consistent(name, run):
    theirs, _ = FOREIGN[name]
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        reg = CGCRegularizer(theirs, generator=generator(0))  # which draws the same views in each step
        loss = reg(model, X, Y) if run == "forward" else reg.compute(model, X, Y).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("run", ["compute", "forward"])
def test_a_foreign_explainer_leaves_the_model_as_ours_does(run):
    models = [net(nn.BatchNorm2d) for _ in range(2)]
    before = settings_of(models[0])
    for model, explains in zip(models, (three_lines, G), strict=True):
        reg = CGCRegularizer(explains, generator=generator(0))
        reg(model, X) if run == "forward" else reg.compute(model, X)
    assert_same(buffers_of(models[0]), buffers_of(models[1]))
    assert settings_of(models[0]) == before


def test_a_foreign_explainer_of_a_compiled_model_runs_as_written_with_one_warning():
    torch.compiler.reset()
    model, plain = smoothly_deep(), smoothly_deep()
    compiled = torch.compile(model, backend="aot_eager")  # through whose graph there is no second derivative
    reg = CGCRegularizer(three_lines, generator=generator(0))
    with pytest.warns(UserWarning, match="the explainer may look at all layers") as caught:
        loss = reg(compiled, X)
    assert len(caught) == 1
    expected = CGCRegularizer(three_lines, generator=generator(0))(plain, X)
    assert_same(gradients(loss, model), gradients(expected, plain))


class Attending(nn.Module):
    """A net with attention, whose fused form has no second derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean(dim=1))


def test_a_foreign_explainer_may_look_through_attention():
    model = Attending()
    CGCRegularizer(three_lines)(model, X.float()).backward()
    assert model.patches.weight.grad.norm() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_foreign_explainer_measures_without_gradients(mode):
    model = net()
    expected = CGCRegularizer(three_lines, generator=generator(0)).compute(model, X, Y)
    with mode():
        out = CGCRegularizer(three_lines, generator=generator(0)).compute(model, X.clone(), Y.clone())
        maps = explain(model, X.clone(), three_lines, Y.clone())
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach())
    torch.testing.assert_close(maps, expected.heatmap.detach())


def test_keys_of_a_foreign_explainer_may_be_constants():
    model = smoothly_deep()
    out = CGCRegularizer(three_lines, detach_key=True, generator=generator(0)).compute(model, X)
    assert not out.key.requires_grad
    assert not out.view_logits.requires_grad
    assert out.query.requires_grad


def test_the_preset_takes_another_explainer():
    model = net()
    official = LayerExplainer("features", lambda a, da: (a * da).sum(dim=1).relu())
    out = CGCRegularizer.official(official).compute(model, X)
    assert out.heatmap.shape == (4, 224, 224)


def returning(**changed):
    """An explainer that returns something else than it should."""

    def explains(model, x, target=None):
        return dataclasses.replace(three_lines(model, x, target), **changed)

    return explains


@pytest.mark.parametrize(
    ("theirs", "error", "message"),
    [
        (
            lambda model, x, target: three_lines(model, x, target).heatmap,
            TypeError,
            "must return an Explanation; got a",
        ),
        (returning(heatmap=torch.rand(4, 1, 8, 8)), ValueError, r"heatmaps of shape \(4, h, w\); got .*\(4, 1, 8, 8\)"),
        (returning(heatmap=torch.rand(3, 8, 8)), ValueError, r"heatmaps of shape \(4, h, w\); got .*\(3, 8, 8\)"),
        (returning(heatmap=torch.zeros(4, 8, 8).long()), ValueError, "heatmaps of shape.*int64"),
        (returning(heatmap=None), ValueError, "heatmaps of shape.*got None"),
        (returning(logits=None), ValueError, "logits of shape.*got None"),
        (returning(logits=torch.rand(3, 5)), ValueError, r"logits of shape \(4, classes\); got .*\(3, 5\)"),
        (returning(target=9), ValueError, "`target` must hold classes from 0 to 4"),
        (returning(logits=torch.rand(4)), ValueError, r"logits of shape \(4, classes\); got .*\(4,\)"),
        (returning(target=None), TypeError, "must return the target"),
        (returning(target=torch.zeros(3).long()), ValueError, "`target` must be of shape"),
        (returning(heatmap=torch.rand(4, 8, 8)), RuntimeError, "heatmaps that train nothing"),
        (returning(heatmap=torch.rand(4, 8, 8).requires_grad_()), RuntimeError, "heatmaps that train nothing"),
        (returning(heatmap=torch.rand(4, 1, 1)), RuntimeError, "train nothing"),
        (returning(logits=torch.rand(4, 5)), RuntimeError, "logits in the graph"),
        (lambda model, x, target: G(model, x - 0, target).logits, TypeError, "must return an Explanation"),
    ],
)
def test_what_a_foreign_explainer_returns_is_checked(theirs, error, message):
    model = net()
    before = settings_of(model)
    for run in (CGCRegularizer(theirs), CGCRegularizer(theirs).compute):
        with pytest.raises(error, match=message):
            run(model, X)
    assert settings_of(model) == before


def test_a_foreign_explainer_makes_its_passes_itself():
    with pytest.raises(TypeError, match=r"`reuse` must be used with an explainer of one layer.*Call `compute`"):
        CGCRegularizer(three_lines).reuse(net())


def test_a_name_is_short_for_grad_cam():
    for short, long in (("features", G), (None, GradCAM(None))):
        assert CGCRegularizer(short).explainer == long
    regs = [CGCRegularizer(g, generator=generator(0)) for g in ("features", G)]
    assert_same(*(reg(net(), X) for reg in regs))


def test_heatmaps_of_a_foreign_explainer_in_half_precision_become_float32():
    def halved(model, x, target=None):
        seen = three_lines(model, x, target)
        return dataclasses.replace(seen, heatmap=seen.heatmap.half())

    out = CGCRegularizer(halved, generator=generator(0)).compute(net(), X)
    assert out.heatmap.dtype is torch.float32


def test_a_foreign_explainer_is_looked_at_in_inference_mode_and_gets_classes():
    model = net()
    expected = explain(model, X, three_lines, Y)
    with torch.inference_mode():
        assert_same(explain(model, X.clone(), three_lines, Y.clone()), expected)
    assert_same(explain(model, X, three_lines, 2), explain(model, X, three_lines, torch.full((4,), 2)))
