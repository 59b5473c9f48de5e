"""Passes without gradients let the model's code take values out of its tensors, as it may there."""

import copy

import numpy as np
import pytest
import torch
from networks import GapNet, assert_same, relu_net
from strategies import generator

from cgc_reg import CGCRegularizer, Explanation, GradCAM, explain, suggest_target_layer

X = torch.randn(4, 3, 16, 16, generator=generator(0))
TAKE = {
    "numpy": lambda tensor: tensor.numpy(),
    "asarray": np.asarray,
    "deepcopy": copy.deepcopy,
    "dlpack": np.from_dlpack,
    "cpu": lambda tensor: tensor.mean(dim=(2, 3)).cpu().numpy(),
}


class Taking(GapNet):
    """Keeps its features as values."""

    def __init__(self, take):
        net = relu_net()
        super().__init__(*net.features, head=net.head)
        self.take, self.taken = take, []

    def forward(self, x):
        features = self.features(x)
        self.taken.append(self.take(features))
        return self.head(features.mean(dim=(2, 3)))


def foreign(model, x, target):
    x = x.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x, create_graph=True)
    return Explanation(gradient.abs().sum(dim=1), logits, torch.zeros(len(x), dtype=torch.long))


@torch.no_grad()
def measure(model):
    return CGCRegularizer("features", generator=generator(0))(model, X)


@torch.no_grad()
def measure_foreign(model):
    return CGCRegularizer(foreign, generator=generator(0))(model, X)


@torch.no_grad()
def g(model):
    return GradCAM("features")(model, X).heatmap


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
@pytest.mark.parametrize(
    "look",
    [
        measure,
        measure_foreign,
        g,
        lambda model: explain(model, X, "features"),
        lambda model: suggest_target_layer(model, X),
    ],
    ids=["measure", "foreign", "g", "explain", "suggest"],
)
def test_values_may_be_taken_where_there_are_no_gradients(take, look):
    model, plain = Taking(take), relu_net()
    with torch.no_grad():
        model(X)  # as it runs in the user's own evaluation
    plain.load_state_dict(model.state_dict())
    found, expected = look(model), look(plain)
    assert found == expected if isinstance(found, str) else assert_same(found, expected) is None


def test_a_hook_may_take_values_too():
    model, taken = relu_net(), []
    expected, features = explain(model, X, "features.4"), model.features(X).detach().numpy()
    model.features.register_forward_hook(lambda module, args, output: taken.append(output.numpy()))
    assert_same(explain(model, X, "features.4"), expected)
    np.testing.assert_array_equal(taken[0], features)


def test_a_training_pass_refuses_as_the_loops_own_does():
    with pytest.raises(RuntimeError, match="requires grad"):
        GradCAM("features")(Taking(TAKE["numpy"]), X)
