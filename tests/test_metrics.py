"""The metrics on cases small enough to work out by hand, against loops, and in two processes."""

import math

import gloo
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import laws, noise, seeds, sizes, uniform

from cgc_reg import Consistency, ContentHeatmap, consistency, content_heatmap, object_coverage, pointing_game

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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_integers_say_where_and_not_how_much(dtype, value):
    heatmaps, masks = noise(0, 2, 3, 3), noise(1, 2, 6, 6) > 0.5
    torch.testing.assert_close(content_heatmap(heatmaps, masks.to(dtype) * value), content_heatmap(heatmaps, masks))


@pytest.mark.parametrize("masks", [torch.ones(2, 4, 4), torch.ones(4, 4), torch.ones(1, 1, 4, 4), "left"])
def test_content_refuses_masks_of_other_shapes(masks):
    with pytest.raises(ValueError, match=r"`masks` must be of shape \(1, H, W\)"):
        content_heatmap(LEFT, masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of `masks` and `boxes` must be given; got neither"),
        ({"masks": LEFT, "boxes": torch.ones(1, 4)}, "Exactly one of `masks` and `boxes` must be given; got both"),
        ({"masks": LEFT, "image_size": (2, 2)}, r"`image_size` must be given with `boxes` alone; got \(2, 2\)"),
        ({"boxes": torch.ones(1, 4)}, "`image_size` must be two positive integers .*; got None"),
        ({"boxes": torch.ones(1, 4), "image_size": 224}, "`image_size` must be two positive integers .*; got 224"),
        ({"boxes": torch.ones(4), "image_size": (2, 2)}, r"`boxes` must be of shape \(1, 4\)"),
        ({"boxes": torch.ones(2, 4), "image_size": (2, 2)}, r"`boxes` must be of shape \(1, 4\)"),
        ({"boxes": [0, 0, 1, 1], "image_size": (2, 2)}, r"`boxes` must be of shape \(1, 4\)"),
    ],
)
def test_content_needs_either_masks_or_boxes(arguments, message):
    metric = ContentHeatmap()
    metric.update(LEFT, LEFT)
    before = metric.compute()
    for measure in (content_heatmap, object_coverage, pointing_game, metric.update):
        with pytest.raises(ValueError, match=message):
            measure(LEFT, **arguments)
    assert metric.compute() == before


def test_content_of_a_box_by_hand():
    # Of 3 x 4 pixels of equal energy, rows 1 and 2 and columns 0 to 2 have their centres in the box.
    box = torch.tensor([[-1.0, 1.2, 2.6, 9.0]])
    assert content_heatmap(torch.ones(1, 1, 1), boxes=box, image_size=(3, 4)).item() == 0.5


def torchray_content(heatmap, annotation, size):
    """The authors' evaluation of one image, written out, with the annotation in pixels from 1, both ends included."""
    h, w = len(heatmap), len(heatmap[0])
    total = sum(map(sum, heatmap))
    heatmap = [[value / (total + 1e-8) + 1e-8 for value in row] for row in heatmap]

    def resized(y, x):
        v, u = (y + 0.5) * h / size[0] - 0.5, (x + 0.5) * w / size[1] - 0.5
        top, left = math.floor(v), math.floor(u)
        return sum(
            (1 - abs(v - i)) * (1 - abs(u - j)) * heatmap[min(max(i, 0), h - 1)][min(max(j, 0), w - 1)]
            for i in (top, top + 1)
            for j in (left, left + 1)
        )

    energy = {(y, x): resized(y, x) for y in range(size[0]) for x in range(size[1])}
    x_min, y_min, x_max, y_max = (edge - 1 for edge in annotation)
    inside = (e for (y, x), e in energy.items() if y_min <= y <= y_max and x_min <= x <= x_max)
    return sum(inside) / sum(energy.values())


@laws
@given(seeds, sizes(high=4), sizes(), st.data())
def test_content_is_that_of_the_authors_evaluation(seed, grid, size, data):
    x_min, y_min = (data.draw(st.integers(1, side)) for side in reversed(size))
    x_max, y_max = data.draw(st.integers(x_min, size[1])), data.draw(st.integers(y_min, size[0]))
    heatmap = noise(seed, 1, *grid)
    content = content_heatmap(heatmap, boxes=torch.tensor([[x_min - 1, y_min - 1, x_max, y_max]]), image_size=size)
    expected = torchray_content(heatmap[0].tolist(), (x_min, y_min, x_max, y_max), size)
    assert content.item() == pytest.approx(expected, abs=1e-6)


def test_authors_score_a_blank_heatmap_as_a_uniform_one():
    assert torchray_content([[0.0, 0.0]], (1, 1, 1, 2), (2, 4)) == pytest.approx(0.25)
    assert content_heatmap(torch.zeros(1, 1, 2), boxes=torch.tensor([[0, 0, 1, 2]]), image_size=(2, 4)).isnan()


# ---- object coverage


@laws
@given(seeds, st.integers(1, 3), sizes(high=4), sizes(high=9))
def test_coverage_equals_a_loop_over_pixels(seed, n, grid, size):
    heatmaps, share = noise(seed, n, *grid) - 0.3, noise(seed + 1, n, *size)
    masks = share * (share > 0.6)
    large = F.interpolate(heatmaps[:, None], size, mode="bilinear")[:, 0]
    for i, coverage in enumerate(object_coverage(heatmaps, masks).tolist()):
        energy, mask = (value.flatten().tolist() for value in (large[i], masks[i]))
        peak, expected = max(energy), math.nan
        if peak > 0 and sum(mask) > 0:
            expected = sum(m * max(e, 0) / peak for e, m in zip(energy, mask, strict=True)) / sum(mask)
        assert coverage == pytest.approx(expected, nan_ok=True)


def test_coverage_and_content_are_recall_and_precision():
    """Of a heatmap that is 0 or 1, content is the share of it on the object, and coverage the share of the object."""
    # Nine pixels are lit, the object has six, and four of these are lit.
    heatmap, mask = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    heatmap[0, :3, :3] = 1
    mask[0, 1:3, 1:4] = 1
    assert content_heatmap(heatmap, mask).item() == pytest.approx(4 / 9)
    assert object_coverage(heatmap, mask).item() == pytest.approx(4 / 6)


@laws
@given(seeds, st.floats(1e-30, 1e30), sizes(high=4))
def test_coverage_ignores_the_scale_of_a_heatmap(seed, scale, grid):
    heatmaps, masks = noise(seed, 2, *grid), noise(seed + 1, 2, 6, 6)
    torch.testing.assert_close(object_coverage(scale * heatmaps, masks), object_coverage(heatmaps, masks))


@laws
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_uniform_heatmap_covers_any_object(seed, h, w):
    masks = noise(seed, 3, 6, 6)
    torch.testing.assert_close(object_coverage(torch.ones(3, h, w), masks), torch.ones(3).double())


def test_coverage_of_a_blank_heatmap_is_nan_and_leaves_others_alone():
    coverage = object_coverage(torch.cat([LEFT, BLANK, -LEFT]), torch.ones(3, 2, 2))
    assert coverage[0] == 0.25
    assert coverage[1:].isnan().all()


# ---- pointing game


def reaches(point, mask, tolerance):
    """Look for the object pixel by pixel."""
    height, width = mask.shape
    pixels = [(v + 0.5, u + 0.5) for v in range(height) for u in range(width) if mask[v, u] > 0]
    reach = max(tolerance**2, 0.5)  # half of a pixel's diagonal
    return any((v - point[0]) ** 2 + (u - point[1]) ** 2 <= reach for v, u in pixels)


@laws
@given(seeds, sizes(high=4), sizes(), uniform(0, 6))
def test_pointing_game_equals_a_search_around_the_highest_cell(seed, grid, size, tolerance):
    heatmaps, share = noise(seed, 3, *grid), noise(seed + 1, 3, *size)
    masks = share * (share > 0.8)
    expected = []
    for heatmap, mask in zip(heatmaps, masks, strict=True):
        row, column = divmod(int(heatmap.argmax()), grid[1])
        point = (row + 0.5) * (size[0] / grid[0]), (column + 0.5) * (size[1] / grid[1])
        expected.append(float(reaches(point, mask, tolerance)) if mask.any() else math.nan)
    hits = pointing_game(heatmaps, masks, tolerance=tolerance)
    torch.testing.assert_close(hits, torch.tensor(expected), equal_nan=True)


@laws
@given(seeds, st.integers(2, 4), st.integers(2, 4))
def test_highest_cell_is_where_the_enlarged_heatmap_is_highest(seed, side, factor):
    """An enlarged heatmap is level beyond the outer cells' centres, so its peak is looked for between these."""
    heatmap = noise(seed, 1, side, side).abs()
    factor = 2 * factor - 1  # odd, so that a cell's centre is a pixel's centre
    enlarged = F.interpolate(heatmap[:, None], scale_factor=factor, mode="bilinear", align_corners=False)[0, 0]
    inside = slice(factor // 2, enlarged.shape[0] - factor // 2)
    mask = torch.zeros_like(enlarged)
    mask[inside, inside] = (enlarged[inside, inside] == enlarged[inside, inside].max()).float()
    assert pointing_game(heatmap, mask[None], tolerance=0).item() == 1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("side", [4, 6, 9])
def test_without_a_tolerance_the_point_lies_on_what_touches_it(dims, side):
    heatmap = torch.zeros(1, *[2] * dims)
    heatmap[(0, *[1] * dims)] = 1
    middle, size = side * 3 // 4, [side] * dims  # of the second cell: between two pixels if the side is 4
    masks = torch.zeros(1, *size)
    assert pointing_game(heatmap, masks + 1, tolerance=0) == 1
    masks[(0, *[middle] * dims)] = 1
    assert pointing_game(heatmap, masks, tolerance=0) == 1
    assert pointing_game(heatmap, masks.roll(-2, dims=1), tolerance=0) == 0


def test_pointing_game_by_hand():
    heatmap = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])  # in an image of 8 x 8 the cell's centre is (6, 6)
    box = {"boxes": torch.tensor([[0, 0, 3, 3]]), "image_size": (8, 8)}
    distance = math.sqrt(2 * 3.5**2)  # from the centre of the box's last pixel, (2.5, 2.5)
    assert float(pointing_game(heatmap, **box, tolerance=distance - 0.01)) == 0
    assert float(pointing_game(heatmap, **box, tolerance=distance + 0.01)) == 1


@pytest.mark.parametrize("blank", [torch.zeros(1, 4, 4), -torch.ones(1, 4, 4), torch.full((1, 4, 4), math.nan)])
def test_pointing_game_is_not_decided_by_a_heatmap_without_a_peak(blank):
    heatmaps = torch.cat([torch.ones(1, 4, 4), blank])
    assert pointing_game(heatmaps, torch.ones(2, 4, 4)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("tolerance", [-1, math.nan, None, True, "15"])
def test_pointing_game_refuses_a_tolerance_that_makes_no_sense(tolerance):
    with pytest.raises(ValueError, match="`tolerance` must be a number of at least 0"):
        pointing_game(torch.ones(1, 4, 4), torch.ones(1, 4, 4), tolerance=tolerance)


# ---- consistency


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


# ---- over a data set


def groups_of(query, key, size):
    """What Consistency should give, from the equation and pair by pair."""
    n = len(query)
    cosines = [[F.cosine_similarity(q.flatten(), k.flatten(), dim=0).item() for k in key] for q in query]
    losses, negatives, margins = [], [], []
    for start in range(0, n - size + 1, size):
        group = range(start, start + size)
        for i in group:
            denominator = sum(math.exp(cosines[i][j] / 0.5) for j in group)
            losses.append(-math.log(math.exp(cosines[i][i] / 0.5) / denominator))
            negatives.append(sum(cosines[i][j] for j in group if j != i) / (size - 1))
            margins.append(cosines[i][i] - negatives[-1])
    return {
        "loss": mean(losses),
        "negative_similarity": mean(negatives),
        "margin": mean(margins),
        "positive_similarity": mean([cosines[i][i] for i in range(n)]),
        "blank_share": mean([float(not m.any()) for m in torch.cat([query, key])]),
        "count": n,
        "groups": n // size,
    }


def mean(values):
    return sum(values) / len(values) if values else math.nan


def same(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


def measured(metric, *tensors, splits=()):
    """What a metric gives of tensors that come in batches, cut at some places."""
    cuts = sorted(min(cut, len(tensors[0])) for cut in splits)
    for batch in zip(*(tensor.tensor_split(cuts) for tensor in tensors), strict=True):
        metric.update(*batch)
    return metric.compute()


def maps_with_blanks(seed, n):
    query, key = noise(seed, 2, n, 2, 3)
    return query * (noise(seed + 1, n, 1, 1) > 0.2), key


splits = st.lists(st.integers(0, 14), max_size=5)


@laws
@given(seeds, st.integers(1, 14), st.integers(2, 5), splits)
def test_consistency_over_a_data_set_equals_a_loop_however_it_is_batched(seed, n, size, splits):
    query, key = maps_with_blanks(seed, n)
    assert measured(Consistency(batch_size=size), query, key, splits=splits) == same(groups_of(query, key, size))


@laws
@given(seeds, st.integers(1, 9), splits)
def test_content_over_a_data_set_is_the_mean_however_it_is_batched(seed, n, splits):
    heatmaps, _ = maps_with_blanks(seed, n)
    masks = noise(seed + 2, n, 4, 6) * (noise(seed + 3, n, 1, 1) > 0.2)
    content = content_heatmap(heatmaps, masks)
    expected = {
        "content_heatmap": content.nanmean().item(),
        "object_coverage": object_coverage(heatmaps, masks).nanmean().item(),
        "blank_share": mean([float(not one.any()) for one in heatmaps]),
        "no_object_share": mean([float(not one.any()) for one in masks]),
        "count": n,
    }
    assert measured(ContentHeatmap(), heatmaps, masks, splits=splits) == same(expected)


@laws
@given(seeds, st.permutations(range(3)))
def test_order_of_groups_does_not_matter(seed, order):
    groups = noise(seed, 3, 2, 4, 2, 3)  # three groups of four pairs
    query, key = (torch.cat([groups[i, side] for i in order]) for side in range(2))
    expected = measured(Consistency(batch_size=4), groups[:, 0].flatten(0, 1), groups[:, 1].flatten(0, 1))
    assert measured(Consistency(batch_size=4), query, key) == same(expected)


@laws
@given(seeds)
def test_scale_of_each_heatmap_does_not_matter(seed):
    query, key = maps_with_blanks(seed, 6)
    scales = 10 ** (12 * noise(seed + 2, 2, 6, 1, 1) - 6)
    masks = noise(seed + 3, 6, 4, 4)
    scaled = measured(Consistency(batch_size=3), scales[0] * query, scales[1] * key)
    assert scaled == same(measured(Consistency(batch_size=3), query, key))
    assert measured(ContentHeatmap(), scales[0] * query, masks) == same(measured(ContentHeatmap(), query, masks))


def test_loss_of_perfect_and_of_equal_maps_at_the_defaults():
    perfect = torch.eye(64).view(64, 8, 8)  # each lights a pixel of its own
    found = measured(Consistency(), perfect, perfect)
    assert found["loss"] == pytest.approx(math.log(1 + 63 * math.exp(-2)))
    assert (found["margin"], found["groups"]) == (1, 1)
    equal = torch.ones(64, 8, 8)
    assert measured(Consistency(), equal, equal)["loss"] == pytest.approx(math.log(64))


def test_temperature_is_that_of_the_loss():
    pairs = torch.cat([LEFT, RIGHT])
    found = measured(Consistency(temperature=0.1, batch_size=2), pairs, pairs)
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(-10)), rel=1e-2)  # in float32


def test_without_a_full_group_there_is_no_loss():
    found = measured(Consistency(batch_size=3), torch.cat([LEFT, LEFT]), torch.cat([LEFT, RIGHT]))
    assert math.isnan(found["loss"] + found["negative_similarity"])
    assert math.isnan(found["margin"])
    assert (found["positive_similarity"], found["count"], found["groups"]) == (0.5, 2, 0)


def test_blank_heatmaps_are_counted_apart():
    heatmaps = torch.cat([LEFT, BLANK, -LEFT, RIGHT])
    found = measured(ContentHeatmap(), heatmaps, LEFT.expand(4, 2, 2))
    # LEFT has all of its energy on the object and covers it, and RIGHT none of both.
    assert found == {
        "content_heatmap": 0.5,
        "object_coverage": 0.5,
        "blank_share": 0.5,
        "no_object_share": 0,
        "count": 4,
    }
    alone = measured(ContentHeatmap(), BLANK, LEFT)
    assert math.isnan(alone["content_heatmap"] + alone["object_coverage"])
    assert (alone["blank_share"], alone["count"]) == (1, 1)
    assert measured(Consistency(), torch.cat([LEFT, BLANK]), torch.cat([LEFT, RIGHT]))["blank_share"] == 0.25


def test_heatmaps_with_nan_are_not_taken_for_blank_ones():
    found = measured(ContentHeatmap(), torch.cat([LEFT, math.nan * LEFT]), torch.ones(2, 2, 2))
    assert math.isnan(found["content_heatmap"])
    assert math.isnan(found["object_coverage"])
    assert found["blank_share"] == 0


def update_of(metric, seed, n=5):
    query, key = maps_with_blanks(seed, n)
    metric.update(query, key)


METRICS = [ContentHeatmap, lambda: Consistency(batch_size=3)]


@pytest.mark.parametrize("make", METRICS)
def test_computing_changes_nothing_and_reset_everything(make):
    metric, other = make(), make()
    update_of(metric, 0)
    assert metric.compute() == metric.compute()
    update_of(metric, 1)
    for seed in (0, 1):
        update_of(other, seed)
    assert metric.compute() == other.compute()
    metric.reset()
    with pytest.raises(RuntimeError, match="`compute` must come after an `update`"):
        metric.compute()
    update_of(metric, 2, n=4)
    fresh = make()
    update_of(fresh, 2, n=4)
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize("make", METRICS)
def test_measuring_before_any_heatmap_says_what_to_do(make):
    metric = make()
    update_of(metric, 0, n=0)
    with pytest.raises(RuntimeError, match="got no heatmap, in any process"):
        metric.compute()


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (torch.ones(2, 3, 3), torch.ones(2, 3, 3), r"one size in all updates; got .*\(2, 3, 3\) after .*\(2, 2\)"),
        (torch.ones(2, 2, 2), torch.ones(1, 2, 2), "`query` and `key` must have one shape"),
        (torch.ones(2), torch.ones(2), "`query` must be"),
    ],
)
def test_maps_of_other_sizes_are_refused_and_change_nothing(query, key, message):
    metric = Consistency(batch_size=2)
    metric.update(torch.cat([LEFT, RIGHT]), torch.cat([LEFT, RIGHT]))
    before = metric.compute()
    with pytest.raises(ValueError, match=message):
        metric.update(query, key)
    assert metric.compute() == before


@pytest.mark.parametrize("options", [{"temperature": 0}, {"batch_size": 1}, {"batch_size": 2.0}, {"batch_size": True}])
def test_consistency_refuses_options_that_make_no_sense(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Consistency(**options)


def test_waiting_maps_are_copies_without_a_graph():
    metric, expected = Consistency(batch_size=4), Consistency(batch_size=4)
    query, key = noise(0, 2, 4, 2, 2)
    expected.update(query, key)
    maps = query[:3].clone(), key[:3].clone().requires_grad_()
    metric.update(*maps)
    maps[0].zero_()  # a loop may write into its own tensor again
    metric.update(query[3:], key[3:])
    assert metric.compute() == same(expected.compute())
    assert not any(waiting.requires_grad for waiting in metric._waiting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_of_a_training_loop_change_nothing(dtype):
    query, key = (m.to(dtype) for m in maps_with_blanks(0, 6))
    modes = [torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)]
    pairs, content = Consistency(batch_size=5), ContentHeatmap()
    for mode in modes:
        with mode:
            pairs.update(query.clone(), key.clone())
            content.update(query.clone(), key.clone())
    assert pairs.compute() == measured(
        Consistency(batch_size=5), *(torch.cat([m] * 4) for m in (query, key)), splits=(6, 12, 18)
    )
    assert content.compute() == same(measured(ContentHeatmap(), query, key) | {"count": 24})


def test_sums_are_kept_in_float64():
    # In float32 the sum stops growing at 2 ** 24.
    metric = ContentHeatmap()
    metric.update(LEFT, LEFT)
    metric.sums["content_heatmap"] += 2**24
    metric.update(LEFT, LEFT)
    assert metric.sums["content_heatmap"].item() == 2**24 + 2


# ---- in two processes

QUERY, KEY = maps_with_blanks(7, 14)
SHARES = {  # images of the first and of the second process, in groups of four
    "even": [slice(0, 8), slice(8, 14)],
    "swapped": [slice(8, 14), slice(0, 8)],
    "one idle": [slice(0, 14), None],
}


def work(rank):
    """Measure this process's share in batches of three, and compute twice."""
    results = {}
    for name, shares in SHARES.items():
        for kind, metric in (("pairs", Consistency(batch_size=4)), ("content", ContentHeatmap())):
            if shares[rank] is not None:
                for batch in zip(QUERY[shares[rank]].split(3), KEY[shares[rank]].split(3), strict=True):
                    metric.update(*batch)
            with torch.inference_mode():
                results[name, kind] = [metric.compute(), metric.compute()]
    try:
        ContentHeatmap().compute()
    except RuntimeError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return gloo.run(work, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_measure_what_one_does(two_processes, rank, share):
    for kind, metric in (("pairs", Consistency(batch_size=4)), ("content", ContentHeatmap())):
        expected = measured(metric, QUERY, KEY)
        assert two_processes[rank][share, kind] == [same(expected), same(expected)]


@pytest.mark.parametrize("rank", range(2))
def test_all_processes_say_that_none_had_a_heatmap(two_processes, rank):
    assert "in any process" in two_processes[rank]["error"]
