"""Where the object is said to be, by masks and by boxes; and the loss that keeps a heatmap's energy there."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import laws, noise, seeds, sizes, uniform
from torchvision.tv_tensors import BoundingBoxes

from cgc_reg import ContentHeatmap, content_heatmap, energy_loss, object_coverage, pointing_game
from cgc_reg.energy import has_object


def each_loss(*arguments, **options):
    return energy_loss(*arguments, **options, reduction="none")


def updated(*arguments, **options):
    metric = ContentHeatmap()
    metric.update(*arguments, **options)
    return torch.tensor(list(metric.compute().values()))


MEASURES = [content_heatmap, object_coverage, pointing_game]
both_kinds = pytest.mark.parametrize("measure", [*MEASURES, updated, each_loss])
corners = (
    st.tuples(uniform(-3, 9), uniform(-3, 9), uniform(0, 9), uniform(0, 9))
    .map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    .filter(lambda box: min(box) < 0 or max(box) > 1.1)  # others are taken for shares of an image
)
images_with_boxes = st.lists(st.lists(corners, max_size=3), min_size=1, max_size=4)


def as_tensors(images):
    return [torch.tensor(one).reshape(-1, 4) for one in images]


def union_of(images, size):
    """Mark each pixel whose centre is in any of an image's boxes, pixel by pixel."""
    masks = torch.zeros(len(images), *size)
    for i, one in enumerate(images):
        for y in range(size[0]):
            for x in range(size[1]):
                masks[i, y, x] = any(
                    x_min <= x + 0.5 < x_max and y_min <= y + 0.5 < y_max for x_min, y_min, x_max, y_max in one
                )
    return masks


# ---- boxes


@both_kinds
@laws
@given(seeds, sizes(), images_with_boxes)
def test_several_boxes_are_their_union(measure, seed, size, images):
    boxes = as_tensors(images)
    heatmaps = noise(seed, len(boxes), 3, 2)
    expected = measure(heatmaps, union_of([one.tolist() for one in boxes], size))
    found = measure(heatmaps, boxes=boxes, image_size=size)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_boxes_that_overlap_by_hand():
    # Of eight pixels the first box has the left four and the second the middle four, six in all.
    boxes = [torch.tensor([[0, 0, 2, 2], [1, 0, 3, 2]])]
    assert content_heatmap(torch.ones(1, 1, 1), boxes=boxes, image_size=(2, 4)).item() == 0.75
    assert energy_loss(torch.ones(1, 1, 1), boxes=boxes, image_size=(2, 4)).item() == 0.25


@both_kinds
@laws
@given(seeds, sizes(), st.lists(corners, min_size=1, max_size=3), st.sampled_from([torch.float32, torch.int64]))
def test_one_box_of_each_image_is_a_list_of_one(measure, seed, size, boxes, dtype):
    boxes = torch.tensor(boxes).to(dtype)
    heatmaps = noise(seed, len(boxes), 3, 2)
    alone = measure(heatmaps, boxes=boxes, image_size=size)
    torch.testing.assert_close(
        measure(heatmaps, boxes=tuple(boxes[:, None]), image_size=size), alone, rtol=0, atol=0, equal_nan=True
    )


@both_kinds
def test_boxes_of_a_list_may_be_of_several_types(measure):
    # As detection targets have them: whole numbers in one image, shares of a pixel in another, and an empty tensor.
    boxes = [
        torch.tensor([[1, 1, 3, 3]]),
        torch.tensor([[0.6, 0.0, 2.4, 2.0], [2.0, 2.0, 9.0, 9.0]]),
        torch.zeros(0, 4),
    ]
    heatmaps = noise(0, 3, 4, 4)
    expected = measure(heatmaps, boxes=[one.double() for one in boxes], image_size=(4, 4))
    torch.testing.assert_close(measure(heatmaps, boxes=boxes, image_size=(4, 4)), expected, equal_nan=True)


@both_kinds
@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [torch.ones(1, 4)],
        [torch.ones(1, 4)] * 3,
        [torch.ones(4)] * 2,
        [torch.ones(0), torch.ones(1, 4)],
        [torch.ones(1, 5)] * 2,
        [[[0, 0, 1, 1]]] * 2,
        torch.ones(2, 1, 4),
        "ab",
    ],
    ids=str,
)
def test_boxes_of_other_shapes_are_refused(measure, boxes):
    with pytest.raises(ValueError, match=r"`boxes` must be of shape \(2, 4\).* or a list of 2 tensors.*zeros\(0, 4\)"):
        measure(torch.ones(2, 4, 4), boxes=boxes, image_size=(8, 8))


@both_kinds
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([40.0, 40.0, 10.0, 50.0], r"the lower numbers first; got \[40.0, 40.0, 10.0, 50.0\]. .*box_convert"),
        ([40, 40, 50, 10], r"the lower numbers first; got \[40.0, 40.0, 50.0, 10.0\]"),
        ([math.nan, 1.0, 2.0, 3.0], r"the lower numbers first; got \[nan, 1.0, 2.0, 3.0\]"),
        ([0.2, 0.0, 0.4, 1.0], r"must be in pixels; got .* such as \[0.2.*Multiply .*tensor\(\[W, H, W, H\]\)"),
    ],
)
def test_boxes_that_would_mark_nothing_are_refused(measure, box, message):
    empty = [0] * 4
    for boxes in (torch.tensor([box, empty]), [torch.tensor([empty, box]), torch.zeros(0, 4)]):
        with pytest.raises(ValueError, match=message):
            measure(torch.ones(2, 4, 4), boxes=boxes, image_size=(64, 64))


@both_kinds
def test_one_pixel_may_be_a_box(measure):
    corner = torch.zeros(1, 4, 4, dtype=torch.bool)
    corner[0, 0, 0] = True
    found = measure(noise(0, 1, 4, 4), boxes=torch.tensor([[0, 0, 1, 1]]), image_size=(4, 4))
    torch.testing.assert_close(found, measure(noise(0, 1, 4, 4), corner), equal_nan=True)


NOWHERE = {
    "a mask of zeros": {"masks": torch.zeros(1, 4, 6)},
    "no boxes": {"boxes": [torch.zeros(0, 4)], "image_size": (4, 6)},
    "a box outside": {"boxes": torch.tensor([[6, 0, 9, 4]]), "image_size": (4, 6)},
    "a box between two centres": {"boxes": torch.tensor([[0.6, 0, 1.4, 4]]), "image_size": (4, 6)},
}
nowhere = pytest.mark.parametrize("where", NOWHERE.values(), ids=NOWHERE)


@nowhere
@pytest.mark.parametrize("measure", MEASURES)
def test_without_an_object_there_is_nothing_to_measure(measure, where):
    for heatmap in (torch.ones(1, 2, 2), torch.zeros(1, 2, 2)):
        assert measure(heatmap, **where).isnan().all()


@nowhere
def test_images_without_an_object_are_counted_apart(where):
    metric = ContentHeatmap()
    metric.update(torch.ones(1, 2, 2), **where)
    alone = metric.compute()
    assert math.isnan(alone["content_heatmap"] + alone["object_coverage"])
    metric.update(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
    metric.update(torch.zeros(1, 2, 2), **where)  # blank, too
    metric.update(torch.zeros(1, 2, 2), torch.ones(1, 4, 6))
    assert metric.compute() == {
        "content_heatmap": 1,
        "object_coverage": 1,
        "blank_share": 0.5,
        "no_object_share": 0.5,
        "count": 4,
    }


# ---- the loss


def where_of(seed, n, size):
    """Masks from 0 to 1 with much that is 0, and often an image without an object."""
    share = noise(seed, n, *size)
    return share * (share > 0.6) * (noise(seed + 1, n, 1, 1) > 0.3)


def maps_of(seed, n, grid):
    """Heatmaps with values of both signs, and often one without a positive value."""
    return noise(seed, n, *grid) - 0.4 - (noise(seed + 1, n, 1, 1) > 0.8).double()


@laws
@given(seeds, st.integers(1, 4), sizes(high=4), sizes(high=9))
def test_loss_equals_a_loop_over_pixels(seed, n, grid, size):
    heatmap, masks = maps_of(seed, n, grid), where_of(seed + 2, n, size)
    large = F.interpolate(heatmap[:, None], size, mode="bilinear")[:, 0].tolist()
    expected, objects = [], 0
    for g, m in zip(large, masks.tolist(), strict=True):
        pixels = [(v, u) for v in range(size[0]) for u in range(size[1])]
        everywhere = sum(max(g[v][u], 0) for v, u in pixels)
        inside = sum(max(g[v][u], 0) * m[v][u] for v, u in pixels)
        there = any(m[v][u] > 0 for v, u in pixels)
        objects += there
        expected.append((1 - (inside / everywhere if everywhere > 0 else 0)) if there else 0)
    torch.testing.assert_close(each_loss(heatmap, masks), torch.tensor(expected).double())
    mean = sum(expected) / objects if objects else 0
    torch.testing.assert_close(energy_loss(heatmap, masks), torch.tensor(mean).double())
    torch.testing.assert_close(energy_loss(heatmap, masks, reduction="sum"), torch.tensor(sum(expected)).double())


@laws
@given(seeds, st.integers(1, 4), sizes(high=4), sizes(high=9))
def test_loss_is_what_the_measure_leaves(seed, n, grid, size):
    heatmap, masks = maps_of(seed, n, grid), where_of(seed + 2, n, size)
    content = content_heatmap(heatmap, masks)
    loss = each_loss(heatmap, masks)
    torch.testing.assert_close(loss[~content.isnan()], (1 - content)[~content.isnan()])
    # What the measure leaves out is a blank heatmap, which costs 1, or an image without an object, which costs nothing.
    assert set(loss[content.isnan()].tolist()) <= {0.0, 1.0}


@laws
@given(seeds, sizes(high=4), sizes(high=9), st.lists(st.floats(-30, 30), min_size=3, max_size=3))
def test_loss_and_its_gradients_direction_ignore_the_scale_of_each_heatmap(seed, grid, size, exponents):
    scales = (10 ** torch.tensor(exponents))[:, None, None]
    heatmap, masks = maps_of(seed, 3, grid).float(), where_of(seed + 2, 3, size).float()
    plain, scaled = heatmap.clone().requires_grad_(), (scales * heatmap).requires_grad_()
    losses = [each_loss(one, masks) for one in (plain, scaled)]
    torch.testing.assert_close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss.sum(), one)[0] for loss, one in zip(losses, (plain, scaled), strict=True)]
    torch.testing.assert_close(gradients[1] * scales, gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peak", [3e38, 1e-36])
def test_loss_of_values_near_the_ends_of_float32_is_exact(peak):
    heatmap = (peak * torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])).requires_grad_()
    mask = torch.tensor([[[1, 0], [0, 0]]])
    loss = energy_loss(heatmap, mask)
    assert loss.item() == 0.75
    (gradient,) = torch.autograd.grad(loss, heatmap)
    # The share on the object is a / (a + b + c + d): by a its derivative is 3 / 16 of 1 / a, by the others -1 / 16.
    expected = torch.tensor([[[-3.0, 1.0], [1.0, 1.0]]]) / 16
    torch.testing.assert_close(gradient.double() * peak, expected.double(), rtol=1e-4, atol=0)


@laws
@given(seeds, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), sizes(high=4), sizes(high=9))
def test_loss_lies_between_0_and_1(seed, dtype, grid, size):
    heatmap, masks = maps_of(seed, 4, grid).to(dtype), where_of(seed + 2, 4, size) > 0
    loss = each_loss(heatmap, masks)
    assert loss.min() >= 0
    assert loss.max() <= 1
    assert 0 <= energy_loss(heatmap, masks) <= 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@laws
@given(seeds, sizes(high=3), sizes(high=6))
def test_loss_has_the_gradient_of_finite_differences(reduction, seed, grid, size):
    heatmap, masks = maps_of(seed, 3, grid), where_of(seed + 2, 3, size)
    # ReLU's kink must not lie within a finite difference.
    assume(F.interpolate(heatmap[:, None], size, mode="bilinear").abs().min() > 1e-5)
    loss = functools.partial(energy_loss, masks=masks, reduction=reduction)
    assert torch.autograd.gradcheck(loss, heatmap.requires_grad_())


@laws
@given(seeds, sizes(high=4), sizes(high=9))
def test_gradient_is_orthogonal_to_each_heatmap(seed, grid, size):
    # The scale of a heatmap does not count, so there is nothing to gain in its direction.
    heatmap, masks = maps_of(seed, 3, grid).requires_grad_(), where_of(seed + 2, 3, size)
    (gradient,) = torch.autograd.grad(each_loss(heatmap, masks).sum(), heatmap)
    assert (heatmap * gradient).sum(dim=(1, 2)).abs().max() < 1e-12


@laws
@given(seeds, st.integers(1, 3), st.integers(0, 3))
def test_images_without_an_object_count_for_nothing(seed, known, unknown):
    heatmap, masks = maps_of(seed, known + unknown, (3, 3)), noise(seed + 2, known + unknown, 6, 6) > 0.5
    masks[known:] = False
    heatmap.requires_grad_()
    (gradient,) = torch.autograd.grad(energy_loss(heatmap, masks), heatmap)
    alone = heatmap[:known].detach().requires_grad_()
    (expected,) = torch.autograd.grad(energy_loss(alone, masks[:known]), alone)
    torch.testing.assert_close(energy_loss(heatmap, masks), energy_loss(alone, masks[:known]))
    torch.testing.assert_close(gradient, torch.cat([expected, torch.zeros(unknown, 3, 3).double()]))


@nowhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_batch_without_an_object_costs_nothing_and_has_a_gradient(where, reduction, value):
    heatmap = torch.full((1, 2, 2), value, requires_grad=True)
    loss = energy_loss(heatmap, **where, reduction=reduction)
    assert loss.tolist() == ([0] if reduction == "none" else 0)
    loss.sum().backward()
    assert heatmap.grad.tolist() == [[[0, 0], [0, 0]]]


def test_a_heatmap_that_counts_for_nothing_leaves_no_nan_in_the_gradient():
    heatmap, masks = noise(0, 2, 4, 4), torch.zeros(2, 8, 8)
    masks[0, :3] = 1
    heatmap[1, 1] = math.nan
    heatmap.requires_grad_()
    loss = energy_loss(heatmap, masks)
    assert loss == energy_loss(heatmap[:1], masks[:1])
    loss.backward()
    assert heatmap.grad[0].any()
    assert not heatmap.grad[1].any()


def test_a_mask_that_is_no_number_marks_something():
    """On a GPU, where the values of masks are not looked at, the loss shows it; elsewhere it is refused."""
    masks = torch.zeros(3, 2, 2)
    masks[1], masks[2, 0, 0] = math.nan, 1
    assert has_object(masks).tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"`masks` must be from 0 to 1 .* got values from nan to nan"):
        energy_loss(noise(0, 3, 2, 2), masks)


def test_boxes_that_know_their_format_are_read_in_it():
    corners = torch.tensor([[2.0, 1.0, 7.0, 4.0]])
    sizes = BoundingBoxes(torch.tensor([[2.0, 1.0, 5.0, 3.0]]), format="XYWH", canvas_size=(8, 8))
    heatmap, size = noise(0, 1, 4, 4).abs(), (8, 8)
    expected = content_heatmap(heatmap, boxes=corners, image_size=size)
    assert content_heatmap(heatmap, boxes=sizes, image_size=size) == expected
    assert content_heatmap(heatmap, boxes=[sizes], image_size=size) == expected


def test_empty_batch_costs_nothing():
    heatmap = torch.zeros(0, 2, 2, requires_grad=True)
    for where in ({"masks": torch.zeros(0, 4, 4)}, {"boxes": [], "image_size": (4, 4)}):
        assert energy_loss(heatmap, **where).item() == 0


@pytest.mark.parametrize("blank", [0.0, -1.0, 1e-40])
def test_blank_heatmap_costs_1_and_is_pulled_nowhere(blank):
    heatmap = torch.stack([torch.full((2, 2), blank), torch.eye(2)]).requires_grad_()
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 2, 2)
    loss = each_loss(heatmap, mask)
    assert loss.tolist() == [1, 0.5]
    (gradient,) = torch.autograd.grad(loss.sum(), heatmap)
    assert gradient[0].tolist() == [[0, 0], [0, 0]]
    assert gradient[1].tolist() == [[-0.25, 0], [0, 0.25]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_visible(bad):
    heatmap, masks = noise(0, 3, 4, 4), torch.ones(3, 4, 4)
    heatmap[1, 2, 2] = bad
    assert each_loss(heatmap, masks).isnan().tolist() == [False, True, False]
    assert energy_loss(heatmap, masks).isnan()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(autocast):
    heatmap, masks = noise(0, 4, 5, 5, dtype=torch.float32), noise(1, 4, 9, 9, dtype=torch.float32)
    boxes = [torch.tensor([[1.0, 1.0, 5.0, 5.0], [2.0, 0.0, 9.0, 3.0]])] * 4
    with torch.autocast("cpu", autocast):
        inside = energy_loss(heatmap, masks), energy_loss(heatmap, boxes=boxes, image_size=(9, 9))
    assert [loss.dtype for loss in inside] == [torch.float32] * 2
    assert inside == (energy_loss(heatmap, masks), energy_loss(heatmap, boxes=boxes, image_size=(9, 9)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # A sum of 100 x 100 energies of 60000 is beyond float16, as is the number of pixels that a mask of it marks.
    heatmap, masks = 6e4 * noise(0, 2, 5, 5).to(dtype), torch.ones(2, 300, 300, dtype=dtype)
    masks[:, :100] = 0
    for measure in (each_loss, content_heatmap, object_coverage):
        found = measure(heatmap, masks)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, measure(heatmap.float(), masks.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heatmap": torch.ones(1)}, ValueError, r"`heatmap` must be floating-point heatmaps of shape"),
        ({"heatmap": torch.ones(1, 2, 2).long()}, ValueError, r"`heatmap` must be floating-point heatmaps of shape"),
        ({"heatmap": None}, TypeError, r"`heatmap` must be a tensor of heatmaps"),
        ({"masks": torch.ones(2, 2, 2)}, ValueError, r"`masks` must be of shape \(1, H, W\); got [^.]*\.$"),
        ({"masks": torch.ones(1, 1, 4, 4)}, ValueError, r"got .* \(1, 1, 4, 4\)\. Pass `masks\[:, 0\]`\.$"),
        ({"heatmap": torch.ones(1, 1, 2, 2)}, ValueError, r"Of heatmaps \(n, 1, h, w\) pass `heatmaps\[:, 0\]`"),
        ({"masks": torch.full((1, 4, 4), 255.0)}, ValueError, "`masks` must be from 0 to 1 .* got values from 255 to"),
        ({"masks": None}, ValueError, "Exactly one of `masks` and `boxes` must be given; got neither"),
        ({"boxes": torch.ones(1, 4)}, ValueError, "Exactly one of `masks` and `boxes` must be given; got both"),
        ({"image_size": (2, 2)}, ValueError, "`image_size` must be given with `boxes` alone"),
        ({"masks": None, "boxes": [torch.ones(1, 4)]}, ValueError, "`image_size` must be two positive integers"),
        ({"reduction": "max"}, ValueError, "`reduction` must be one of"),
    ],
)
def test_loss_refuses_other_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        energy_loss(**{"heatmap": torch.ones(1, 2, 2), "masks": torch.ones(1, 4, 4), **arguments})
