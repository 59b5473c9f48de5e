"""Weights of the images: what confidence is, and that a weighed loss is sum_i w_i L_i / n."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same, gradients, relu_net
from strategies import generator, laws, seeds

from cgc_reg import CGCRegularizer, confidence, info_nce

X = torch.randn(4, 3, 16, 16, generator=generator(0), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 4])


def net():
    torch.manual_seed(0)
    return relu_net().double()


def reg(**options):
    return CGCRegularizer("features", generator=generator(1), **options)


@laws
@given(seeds, st.integers(2, 6))
def test_confidence_is_how_far_the_probability_is_above_chance(seed, classes):
    logits = 3 * torch.randn(5, classes, dtype=torch.float64, generator=generator(seed))
    target = torch.arange(5) % classes
    for weight, scores, k in zip(confidence(logits, target).tolist(), logits, target, strict=True):
        probability = (scores[k].exp() / scores.exp().sum()).item()
        assert weight == pytest.approx(max(0, (probability - 1 / classes) / (1 - 1 / classes)))


def test_confidence_goes_from_nothing_at_chance_to_one():
    logits = torch.tensor([[0.0, 0.0], [90.0, 0.0], [-90.0, 0.0]], requires_grad=True)
    weights = confidence(logits, torch.tensor([0, 0, 0]))
    assert weights.tolist() == [0, 1, 0]
    assert not weights.requires_grad


def test_of_two_classes_and_a_rival_it_is_the_same():
    logits = torch.randn(5, 2, dtype=torch.float64)
    weights = torch.tensor([[1.0, -1.0]] * 5)
    torch.testing.assert_close(confidence(logits, torch.zeros(5).long()), confidence(logits, weights))


def test_of_a_single_logit_it_is_the_sigmoids():
    logit = torch.tensor([[2.0], [-2.0]])
    expected = torch.stack([2 * torch.tensor(2.0).sigmoid() - 1, torch.tensor(0.0)])
    torch.testing.assert_close(confidence(logit, torch.tensor([0, 0])), expected)
    torch.testing.assert_close(confidence(logit, -torch.ones(2, 1)), expected.flip(0))


def test_an_image_without_labels_counts_as_nothing():
    assert confidence(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0]


def test_half_precision_is_weighed_in_float32():
    weights = confidence(torch.tensor([[5.0, 0.0]], dtype=torch.bfloat16), torch.tensor([0]))
    torch.testing.assert_close(weights, confidence(torch.tensor([[5.0, 0.0]]), torch.tensor([0])))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("loss", ["info_nce", "mse_consistency", lambda q, k: (q - k).square().sum(dim=(1, 2))])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weighed_loss_is_the_sum_of_weights_and_losses(loss, reduction):
    model, plain = net(), net()
    out = reg(loss=loss, weighting="confidence", reduction=reduction).compute(model, X, Y)
    unweighed = reg(loss=loss, reduction="none").compute(plain, X, Y)
    weights = confidence(unweighed.logits, Y)
    losses = weights * unweighed.loss
    expected = {"mean": losses.sum() / 4, "sum": losses.sum(), "none": losses}[reduction]
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(out.loss.sum(), model), gradients(expected.sum(), plain))
    torch.testing.assert_close(out.scalars["loss"], unweighed.loss.mean().detach())
    torch.testing.assert_close(out.scalars["weight"], weights.mean())


def test_both_calls_weigh():
    weighed = {"weighting": "confidence"}
    torch.testing.assert_close(reg(**weighed)(net(), X, Y), reg(**weighed).compute(net(), X, Y).loss)
    assert reg(**weighed)(net(), X, Y) != reg()(net(), X, Y)


def test_uniform_is_the_equation_to_the_bit():
    out = reg().compute(net(), X, Y)
    assert_same(out.loss, info_nce(out.query, out.key))
    assert out.scalars["weight"] == 1


def test_a_function_of_ones_own_gets_logits_and_target_and_trains_nothing():
    given_to_it = []

    def weigh(logits, target):
        given_to_it.append((logits, target))
        return F.softmax(logits, dim=1)[:, 0]

    model, plain = net(), net()
    out = reg(weighting=weigh).compute(model, X, Y)
    ((logits, target),) = given_to_it
    assert_same((logits, target), (out.logits.detach(), Y))
    losses = reg(reduction="none").compute(plain, X, Y)
    expected = (F.softmax(losses.logits.detach(), dim=1)[:, 0] * losses.loss).mean()
    torch.testing.assert_close(gradients(out.loss, model), gradients(expected, plain))


def test_a_function_may_write_on_what_it_gets_and_is_not_trained():
    weights = torch.nn.Parameter(torch.ones(4, dtype=X.dtype))

    def weigh(logits, target):
        logits.zero_()
        target.zero_()
        return weights

    out, expected = reg(weighting=weigh).compute(net(), X, Y), reg().compute(net(), X, Y)
    assert_same((out.logits, out.target, out.loss), (expected.logits, expected.target, expected.loss))
    assert not out.scalars["weight"].requires_grad
    out.loss.backward()
    assert weights.grad is None


def test_images_may_be_chosen_by_a_mask():
    out = reg(weighting=lambda logits, target: target > 0).compute(net(), X, Y)
    expected = reg(reduction="none").compute(net(), X, Y).loss
    torch.testing.assert_close(out.loss, expected[Y > 0].sum() / 4)
    assert out.scalars["weight"] == 0.75


def test_a_scalar_loss_is_weighed_by_the_mean():
    options = {"loss": lambda q, k: (q - k).square().mean()}
    out = reg(**options, weighting=lambda logits, target: torch.tensor([1.0, 2.0, 3.0, 6.0])).compute(net(), X, Y)
    torch.testing.assert_close(out.loss, 3 * reg(**options).compute(net(), X, Y).loss)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(4, 1), 1.0])
def test_other_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`weighting` must return a tensor of shape \(4,\); got"):
        reg(weighting=lambda logits, target: wrong)(net(), X)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"`weighting` must return weights of at least 0; got -0\.5"):
        reg(weighting=lambda logits, target: torch.tensor([1.0, -0.5, 0.0, 1.0]))(net(), X)


def test_unknown_weightings_are_refused():
    with pytest.raises(ValueError, match="`weighting` must be one of 'uniform', 'confidence', or a function; got 'x'"):
        reg(weighting="x")
