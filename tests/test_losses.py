"""The pair losses against the equation written out as sums, and the laws that follow from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, laws, noise, seeds

from cgc_reg import info_nce, mse_consistency

NEGATIVES = ["keys", "official"]
both_negatives = pytest.mark.parametrize("negatives", NEGATIVES)
both_losses = pytest.mark.parametrize("loss", [info_nce, mse_consistency])
temperatures = st.sampled_from([0.05, 0.1, 0.5, 1.0, 5.0])
map_shapes = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))  # n, h, w


def maps(seed, shape, dtype=torch.float64):
    """A query and a key, from 0 to 1 as heatmaps are."""
    query, key = noise(seed, 2, *shape, dtype=dtype)
    return query, key


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))


def slow_info_nce(query, key, temperature, negatives):
    """The loss of each image, term by term."""
    losses = []
    for i in range(len(query)):
        anchor = query[i] if negatives == "keys" else key[i]
        positive = math.exp(cosine(query[i], key[i]) / temperature)
        others = [math.exp(cosine(anchor, key[j]) / temperature) for j in range(len(key)) if j != i]
        losses.append(-math.log(positive / (positive + sum(others))))
    return torch.tensor(losses, dtype=torch.float64)


@both_negatives
@laws
@given(seeds, map_shapes, temperatures)
def test_info_nce_equals_the_sums_written_out(negatives, seed, shape, temperature):
    query, key = maps(seed, shape)
    actual = info_nce(query, key, temperature, negatives=negatives, reduction="none")
    # A quotient of exponentials near 1 has a logarithm near 0, which keeps the quotient's absolute precision.
    torch.testing.assert_close(actual, slow_info_nce(query, key, temperature, negatives), rtol=1e-9, atol=1e-13)


@laws
@given(seeds, map_shapes)
def test_mse_consistency_equals_two_minus_twice_the_cosine(seed, shape):
    query, key = maps(seed, shape)
    cosines = torch.tensor([cosine(q, k) for q, k in zip(query, key, strict=True)], dtype=torch.float64)
    # A difference from 2: the absolute precision is that of numbers near 2.
    torch.testing.assert_close(mse_consistency(query, key, reduction="none"), 2 - 2 * cosines, rtol=0, atol=1e-13)


def test_the_two_readings_of_negatives_differ():
    query, key = maps(0, (4, 3, 3))
    assert not torch.isclose(info_nce(query, key), info_nce(query, key, negatives="official"), rtol=1e-3)


def test_temperature_is_one_half_by_default():
    query, key = maps(0, (4, 3, 3))
    assert info_nce(query, key) == info_nce(query, key, 0.5)


@both_negatives
@laws
@given(st.integers(2, 9), temperatures)
def test_equal_maps_lose_log_n(negatives, n, temperature):
    same = noise(0, 1, 3, 3).expand(n, 3, 3)
    torch.testing.assert_close(
        info_nce(same, same, temperature, negatives=negatives), torch.tensor(math.log(n)).double()
    )


@both_negatives
@laws
@given(seeds, map_shapes, temperatures)
def test_info_nce_lies_between_zero_and_its_bound(negatives, seed, shape, temperature):
    query, key = maps(seed, shape)
    loss = info_nce(query, key, temperature, negatives=negatives, reduction="none")
    assert loss.min() >= 0
    assert loss.max() <= math.log(shape[0]) + 1 / temperature


@both_negatives
@laws
@given(seeds, st.integers(2, 5), st.data())
def test_info_nce_ignores_the_scale_of_each_map(negatives, seed, n, data):
    query, key = maps(seed, (n, 3, 3), dtype=torch.float32)
    scales = st.lists(st.floats(-20, 20), min_size=n, max_size=n)
    scale_q, scale_k = (10 ** torch.tensor(data.draw(scales))[:, None, None] for _ in range(2))
    torch.testing.assert_close(
        info_nce(query * scale_q, key * scale_k, negatives=negatives), info_nce(query, key, negatives=negatives)
    )


@laws
@given(seeds, st.floats(-20, 20), st.floats(-20, 20))
def test_mse_consistency_ignores_the_scale_of_each_map(seed, scale_q, scale_k):
    query, key = maps(seed, (3, 3, 3), dtype=torch.float32)
    # Numbers near 1 in float32, subtracted, squared and summed: an absolute error of a few times 1e-7.
    torch.testing.assert_close(
        mse_consistency(query * 10**scale_q, key * 10**scale_k), mse_consistency(query, key), rtol=1e-5, atol=1e-6
    )


@both_negatives
@laws
@given(seeds, map_shapes)
def test_order_of_the_batch_does_not_matter(negatives, seed, shape):
    query, key = maps(seed, shape)
    order = torch.randperm(shape[0], generator=generator(seed))
    loss = info_nce(query, key, negatives=negatives, reduction="none")
    torch.testing.assert_close(info_nce(query[order], key[order], negatives=negatives, reduction="none"), loss[order])


@both_losses
@laws
@given(seeds, map_shapes, st.integers(1, 3))
def test_enlarging_maps_by_repeating_pixels_changes_nothing(loss, seed, shape, times):
    query, key = maps(seed, shape)
    large = [m.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2) for m in (query, key)]
    torch.testing.assert_close(loss(*large), loss(query, key), rtol=1e-9, atol=1e-13)


@both_negatives
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_has_the_gradient_of_finite_differences(negatives, reduction):
    query, key = (m.requires_grad_() for m in maps(1, (3, 2, 2)))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, negatives=negatives, reduction=reduction), (query, key))


def test_mse_consistency_has_the_gradient_of_finite_differences():
    query, key = (m.requires_grad_() for m in maps(1, (3, 2, 2)))
    assert torch.autograd.gradcheck(mse_consistency, (query, key))


@both_losses
def test_gradient_is_orthogonal_to_each_map(loss):
    # The scale of a map does not count, so there is nothing to gain in its direction.
    query, key = (m.requires_grad_() for m in maps(1, (3, 2, 2)))
    for tensor, gradient in zip((query, key), torch.autograd.grad(loss(query, key), (query, key)), strict=True):
        assert (tensor * gradient).sum(dim=(1, 2)).abs().max() < 1e-15


@both_losses
@pytest.mark.parametrize("blank", ["one query", "one key", "a pair", "all"])
def test_blank_maps_give_a_finite_loss_and_gradient(loss, blank):
    query, key = maps(0, (3, 4, 4), dtype=torch.float32)
    if blank == "all":
        query, key = torch.zeros(2, 3, 4, 4)
    if blank in ("one query", "a pair"):
        query[1] = 0
    if blank in ("one key", "a pair"):
        key[1] = 0
    value = loss(query.requires_grad_(), key.requires_grad_())
    gradients = torch.autograd.grad(value, (query, key))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_blank_map_is_similar_to_nothing():
    query, key = maps(0, (2, 3, 3))
    blank = torch.zeros_like(query)
    assert info_nce(blank, key).item() == pytest.approx(math.log(2))
    assert info_nce(query, blank).item() == pytest.approx(math.log(2))
    assert mse_consistency(query, blank).item() == pytest.approx(1)
    assert mse_consistency(blank, blank) == 0


@both_losses
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_visible(loss, bad):
    query, key = maps(0, (3, 4, 4))
    query[1, 2, 2] = bad
    assert loss(query, key, reduction="none").isnan().tolist() == [False, True, False]
    assert loss(query, key).isnan()


@both_losses
def test_reductions_reduce_the_loss_of_each_image(loss):
    query, key = maps(0, (4, 3, 3))
    each = loss(query, key, reduction="none")
    assert each.shape == (4,)
    torch.testing.assert_close(loss(query, key, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(query, key, reduction="mean"), each.sum() / 4)
    torch.testing.assert_close(loss(query, key), each.sum() / 4)


@both_negatives
def test_batch_of_one_has_no_negative(negatives):
    query, key = maps(0, (1, 3, 3))
    with pytest.raises(ValueError, match=r"at least two.*`mse_consistency`"):
        info_nce(query, key, negatives=negatives)


def test_mse_consistency_takes_a_batch_of_one():
    query, key = maps(0, (1, 3, 3))
    torch.testing.assert_close(mse_consistency(query, query), torch.tensor(0.0).double())
    assert mse_consistency(query, key) > 0


@both_losses
def test_loss_is_float32_under_autocast(loss):
    query, key = maps(0, (4, 5, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(query, key)
    assert inside.dtype == torch.float32
    assert inside == loss(query, key)


@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_compared_in_float32(loss, dtype):
    query, key = maps(0, (4, 5, 5), dtype=dtype)
    assert loss(query, key).dtype == torch.float32
    assert loss(query, key) == loss(query.float(), key.float())


@both_losses
@pytest.mark.parametrize(
    ("query", "key", "error", "message"),
    [
        (torch.rand(2, 3, 3), torch.rand(2, 3, 4), ValueError, "one shape"),
        (torch.rand(2, 3, 3), torch.rand(3, 3, 3), ValueError, "one shape"),
        (torch.rand(2, 1, 3, 3, 3), torch.rand(2, 1, 3, 3, 3), ValueError, r"`query`.*\(n, h, w\)"),
        (torch.rand(2, 3, 3), torch.ones(2, 3, 3).long(), ValueError, "`key`.*floating"),
        (torch.rand(2, 3, 3), None, TypeError, "`key` must be a tensor"),
    ],
)
def test_maps_of_other_kinds_are_refused(loss, query, key, error, message):
    with pytest.raises(error, match=message):
        loss(query, key)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"negatives": "queries"},
        {"reduction": "max"},
    ],
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        info_nce(*maps(0, (2, 3, 3)), **options)


def test_mse_consistency_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="`reduction` must be"):
        mse_consistency(*maps(0, (2, 3, 3)), reduction="max")
