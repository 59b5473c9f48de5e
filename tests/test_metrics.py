"""The metrics on cases small enough to work out by hand, and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import laws, noise, seeds

from cgc_reg import consistency, content_heatmap

LEFT = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])  # one lit pixel, top left
RIGHT = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
BLANK = torch.zeros(1, 2, 2)
NAMES = {"positive_similarity", "negative_similarity", "margin", "blank_share"}


def test_content_is_the_share_of_energy_on_the_object():
    heatmap = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
    assert content_heatmap(heatmap, LEFT).tolist() == [0.75]


def test_evidence_against_the_class_is_no_energy():
    heatmap = torch.tensor([[[3.0, 1.0], [-2.0, -9.0]]])
    assert content_heatmap(heatmap, LEFT).tolist() == [0.75]


def test_heatmap_is_enlarged_to_the_mask():
    # Bilinear from [1, 0] to four pixels: 1, 3/4, 1/4, 0, of which the left half holds 7/4 of 2.
    heatmap, mask = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    assert content_heatmap(heatmap, mask).tolist() == [0.875]


@laws
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_content_equals_a_loop_over_pixels(seed, n, h, w, height, width):
    heatmaps = noise(seed, n, h, w) - 0.3
    masks = noise(seed + 1, n, height, width)
    large = F.interpolate(heatmaps[:, None], (height, width), mode="bilinear")[:, 0]
    for i, content in enumerate(content_heatmap(heatmaps, masks).tolist()):
        energy = [max(value, 0.0) for value in large[i].flatten().tolist()]
        inside = [e * m for e, m in zip(energy, masks[i].flatten().tolist(), strict=True)]
        expected = sum(inside) / sum(energy) if sum(energy) > 0 else math.nan
        assert content == pytest.approx(expected, nan_ok=True)


@laws
@given(seeds, st.floats(1e-6, 1e6))
def test_content_ignores_the_scale_of_a_heatmap(seed, scale):
    heatmaps, masks = noise(seed, 2, 3, 3), noise(seed + 1, 2, 6, 6) > 0.5
    torch.testing.assert_close(content_heatmap(scale * heatmaps, masks), content_heatmap(heatmaps, masks))


@laws
@given(seeds)
def test_object_and_background_share_all_energy(seed):
    heatmaps, masks = noise(seed, 2, 3, 3), noise(seed + 1, 2, 6, 6) > 0.5
    total = content_heatmap(heatmaps, masks) + content_heatmap(heatmaps, ~masks)
    torch.testing.assert_close(total, torch.ones(2).double())


def test_content_of_a_blank_heatmap_is_nan_and_leaves_others_alone():
    content = content_heatmap(torch.cat([LEFT, BLANK, -LEFT]), torch.ones(3, 2, 2))
    assert content[0] == 1
    assert content[1:].isnan().all()


@pytest.mark.parametrize("masks", [torch.ones(2, 4, 4), torch.ones(4, 4), torch.ones(1, 1, 4, 4), None])
def test_content_refuses_masks_of_other_shapes(masks):
    with pytest.raises(ValueError, match=r"`masks` must be of shape \(1, H, W\)"):
        content_heatmap(LEFT, masks)


def test_consistency_of_maps_that_follow_their_image():
    both = torch.cat([LEFT, RIGHT])
    scalars = {name: value.item() for name, value in consistency(both, both).items()}
    assert scalars == {"positive_similarity": 1, "negative_similarity": 0, "margin": 1, "blank_share": 0}


def test_consistency_of_maps_that_follow_the_other_image():
    scalars = consistency(torch.cat([LEFT, RIGHT]), torch.cat([RIGHT, LEFT]))
    assert {name: value.item() for name, value in scalars.items()} == {
        "positive_similarity": 0,
        "negative_similarity": 1,
        "margin": -1,
        "blank_share": 0,
    }


def test_blank_share_counts_queries_and_keys():
    scalars = consistency(torch.cat([LEFT, BLANK]), torch.cat([LEFT, RIGHT]))
    assert scalars["blank_share"] == 0.25  # one map of four
    assert scalars["positive_similarity"] == 0.5  # similarities 1 and 0


@laws
@given(seeds, st.integers(2, 5))
def test_consistency_equals_a_loop_over_pairs(seed, n):
    query, key = noise(seed, 2, n, 3, 3)
    cosines = [[F.cosine_similarity(q.flatten(), k.flatten(), dim=0) for k in key] for q in query]
    positive = sum(cosines[i][i] for i in range(n)) / n
    negative = sum(cosines[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    scalars = consistency(query, key)
    torch.testing.assert_close(scalars["positive_similarity"], positive)
    torch.testing.assert_close(scalars["negative_similarity"], negative)
    torch.testing.assert_close(scalars["margin"], positive - negative)


def test_single_image_has_no_negatives():
    scalars = consistency(LEFT, LEFT)
    assert scalars["positive_similarity"] == 1
    assert scalars["negative_similarity"].isnan()
    assert scalars["margin"].isnan()


def test_scalars_are_detached_and_of_one_kind():
    query, key = (m.requires_grad_() for m in torch.rand(2, 3, 4, 4))
    scalars = consistency(query, key)
    assert set(scalars) == NAMES
    assert all(value.shape == () and not value.requires_grad for value in scalars.values())


def test_metrics_are_float32_under_autocast():
    query, key = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside, content = consistency(query, key), content_heatmap(query, key)
    assert inside == consistency(query, key)
    torch.testing.assert_close(content, content_heatmap(query, key), rtol=0, atol=0)


@pytest.mark.parametrize("key", [torch.rand(2, 2, 2), torch.rand(1, 2, 3), torch.rand(2, 2)])
def test_consistency_refuses_maps_of_different_shapes(key):
    with pytest.raises(ValueError, match="`key`"):
        consistency(LEFT, key)
