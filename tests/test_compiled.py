"""A compiled model gives what it gives uncompiled; with its layer exposed, it stays compiled in both passes."""

import copy

import explainers
import pytest
import torch
import torch.nn.functional as F
from inductor import compiles
from networks import assert_same, buffers_of, relu_net, settings_of
from strategies import generator
from torch import nn

from cgc_reg import CGCRegularizer, GradCAM, explain, expose_layer, suggest_target_layer

X = torch.randn(4, 3, 32, 32, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4])

# Inductor takes long, and what a mode changes is seen before it.
HOW = [("aot_eager", mode) for mode in ("preserve", "eval", "update")] + [("inductor", "preserve")] * compiles


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def regularizer(layer="features", **options):
    return explainers.regularizer(layer, heatmap="class_activation", generator=generator(0), **options)


def call_step(reg, model):
    output = model(X)
    return F.cross_entropy(output[0] if isinstance(output, tuple) else output, Y) + reg(model, X)


def compute_step(reg, model):
    out = reg.compute(model, X)
    return F.cross_entropy(out.logits, Y) + out.loss


steps = pytest.mark.parametrize("step", [call_step, compute_step])


def train(step, reg, model, inner, steps=2):
    """Take a few steps and return what is left of them."""
    optimizer = torch.optim.SGD(inner.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(reg, model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in inner.named_parameters()}
    return {"losses": torch.stack(losses), **gradients, **dict(inner.named_parameters()), **buffers_of(inner)}


@steps
@pytest.mark.parametrize(("backend", "bn_mode"), HOW)
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # inductor's own, in torch 2.6
def test_exposed_layer_trains_as_uncompiled(step, bn_mode, backend):
    plain = relu_net(nn.BatchNorm2d)
    inner = copy.deepcopy(plain)
    model = torch.compile(expose_layer(inner, "features"), backend=backend)
    compiled = train(step, regularizer(bn_mode=bn_mode), model, inner)  # without a warning: those are errors
    torch.testing.assert_close(compiled, train(step, regularizer(bn_mode=bn_mode), plain, plain))


@steps
def test_exposed_layer_over_a_frozen_trunk_trains_the_head_as_uncompiled(step):
    plain = relu_net()
    plain.features.requires_grad_(False)
    inner = copy.deepcopy(plain)
    model = torch.compile(expose_layer(inner, "features"), backend="aot_eager")
    results = []
    for each in (model, plain):
        step(regularizer(), each).backward()
        results.append((inner if each is model else plain).head.weight.grad)
    torch.testing.assert_close(*results)
    assert results[0].count_nonzero() > 0


def test_both_passes_of_an_exposed_layer_run_compiled_and_are_compiled_once():
    graphs, runs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: runs.append(graph) or graph(*inputs)

    model = torch.compile(expose_layer(relu_net(nn.BatchNorm2d), "features"), backend=backend)
    reg = regularizer()
    for _ in range(3):
        compute_step(reg, model).backward()
    assert len(graphs) == 1  # for both passes: the buffers that the second one writes are lent
    assert runs == 6 * graphs


def test_module_compile_of_an_exposed_layer_stays_compiled():
    inner = relu_net()
    model = expose_layer(inner, "features")
    model.compile(backend="eager")
    plain = relu_net()
    plain.load_state_dict(inner.state_dict())
    torch.testing.assert_close(compute_step(regularizer(), model), compute_step(regularizer(), plain))


def test_exposed_layer_is_a_metric_without_gradients():
    inner = relu_net(nn.BatchNorm2d).eval()
    model = torch.compile(expose_layer(inner, "features"), backend="eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = regularizer()(model, X)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, regularizer()(inner, X).detach())


def test_another_rule_runs_an_exposed_layer_uncompiled_with_a_warning():
    inner = relu_net()
    model = torch.compile(expose_layer(inner, "features"), backend="eager")
    with pytest.warns(UserWarning, match="runs as written"):
        loss = CGCRegularizer("features", generator=generator(0))(model, X)
    assert_same(loss, CGCRegularizer("features", generator=generator(0))(inner, X))


def test_uncompiled_exposed_layer_is_the_model_itself():
    inner = relu_net()
    for rule in ("grad_cam", "class_activation"):
        reg = [explainers.regularizer("features", heatmap=rule, generator=generator(0)) for _ in range(2)]
        assert_same(reg[0](expose_layer(inner, "features"), X), reg[1](inner, X))


@pytest.mark.filterwarnings("ignore:The loop.s own pass of a compiled model is not reused")
def test_a_model_with_a_compiled_part_names_its_layers_as_if_it_were_not():
    plain = relu_net()
    model = copy.deepcopy(plain)
    model.features = torch.compile(model.features, backend="eager")
    assert suggest_target_layer(model, X) == suggest_target_layer(plain, X)
    assert suggest_target_layer(nn.Sequential(torch.compile(plain, backend="eager")), X) == "0.features"
    expected = explain(plain, X, "features.3")
    assert_same(explain(model, X, "features.3"), expected)
    assert_same(explain(model, X, "features._orig_mod.3"), expected)
    with pytest.warns(UserWarning, match="runs as written"), GradCAM("features.3").reuse(model):
        assert_same(GradCAM("features.3")(model.eval(), X).heatmap.detach(), expected)


def test_an_in_place_layer_behind_an_exposed_one_changes_nothing():
    inner = relu_net()
    inner.features[5].inplace = True
    model = torch.compile(expose_layer(inner, "features.4"), backend="aot_eager")
    _, kept = model(X)
    assert_same(kept, inner.features[:5](X))


def test_exposed_layer_must_be_the_regularizers():
    model = torch.compile(expose_layer(relu_net(), "features.3"), backend="eager")
    with pytest.raises(ValueError, match=r"exposes, 'features\.3'; got 'features'\. Compile"):
        regularizer()(model, X)
    reg = regularizer(None)
    reg(model, X)
    assert reg.explainer.target_layer == "features.3"


def test_an_exposed_layer_may_be_named_as_in_a_wrapper():
    inner = relu_net()
    model = torch.compile(expose_layer(inner, "module.features"), backend="eager")
    torch.testing.assert_close(regularizer()(model, X), regularizer()(inner, X))


def test_exposing_a_misspelt_layer_gets_close_matches():
    with pytest.raises(ValueError, match="Do you mean 'features'"):
        expose_layer(relu_net(), "featurs")
    with pytest.raises(TypeError, match="`model` must be"):
        expose_layer("resnet18", "layer4")


def test_an_exposed_model_is_left_as_found_when_it_raises():
    model = relu_net()
    model.head = nn.Linear(1, 1)  # the pooled map has 8 channels
    before = settings_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        expose_layer(model, "features")(X)
    assert settings_of(model) == before


def test_exposing_a_layer_that_is_not_called_is_refused():
    model = relu_net()
    model.never = nn.Conv2d(3, 3, 1)
    with pytest.raises(RuntimeError, match="'never', which it called 0 times"):
        expose_layer(model, "never")(X)


def test_graph_that_was_compiled_without_the_layer_is_never_taken_silently():
    model = relu_net()
    torch.compile(model, backend="eager")(X)
    exposed = torch.compile(expose_layer(model, "features"), backend="eager")
    expected = compute_step(regularizer(), model)
    try:
        loss, message = compute_step(regularizer(), exposed), ""
    except RuntimeError as error:  # whether the compiler sees the difference depends on its version
        loss, message = expected, str(error)
    torch.testing.assert_close(loss, expected)
    assert not message or "torch.compiler.reset()" in message
    torch.compiler.reset()
    torch.testing.assert_close(compute_step(regularizer(), exposed), expected)
