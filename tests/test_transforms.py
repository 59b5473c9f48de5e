"""Laws of SpatialTransform: what a batch of affine maps does to images, heatmaps and other maps."""

import dataclasses
import math
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import skimage.transform
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    affine_maps,
    away_from_rim,
    batch_sizes,
    boxes,
    centres,
    crop,
    crops,
    dtypes,
    generator,
    laws,
    noise,
    seeds,
    sizes,
    source_positions,
    uniform,
    wide_dtypes,
)
from torchvision.transforms.functional import InterpolationMode, affine, hflip, resized_crop

from cgc_reg import RandomAffine, SpatialTransform
from cgc_reg.transforms import _grid_sample

# What an output value in [0, 1] may be off by. A position on at most 12 pixels, the largest side drawn below unless a
# test says otherwise, carries a handful of roundings of numbers up to 12 or so: 5 * 12 * 2**-24 is 4e-6 of a pixel in
# float32 and 7e-15 in float64, and noise changes by at most 1 per pixel along x and along y. bfloat16 is computed in
# float32 and rounded once, to 8 binary digits.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}

IDENTITY = SpatialTransform.identity(2)

images_and_heatmaps = pytest.mark.parametrize("channels", [(), (2,)], ids=["heatmaps", "images"])
small = {"zoom": (0.4, 0.9), "shift": 0.2}  # maps that keep much of the output inside the input


def assert_equal_up_to_rounding(actual, expected, dtype=None):
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING[dtype or actual.dtype])


def flips(horizontal, vertical, n=1):
    diagonal = torch.tensor([-1.0 if horizontal else 1.0, -1.0 if vertical else 1.0])
    return SpatialTransform(F.pad(torch.diag(diagonal), (0, 1)).repeat(n, 1, 1))


def as_3x3(transform):
    bottom = torch.tensor([0.0, 0.0, 1.0], dtype=transform.theta.dtype).expand(len(transform), 1, 3)
    return torch.cat([transform.theta, bottom], dim=1)


def pixel_matrix(transform, size):
    """The linear part in pixels instead of [-1, 1]: (n, 2, 2)."""
    unit = torch.tensor([2 / size[1], 2 / size[0]], dtype=torch.float64)
    return transform.theta.double()[:, :, :2] * unit[None, None, :] / unit[None, :, None]


@contextmanager
def deterministic_algorithms():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Identity and flips


@laws
@given(seeds, batch_sizes, sizes(), dtypes)
def test_identity_returns_heatmaps_bit_for_bit(seed, n, size, dtype):
    x = noise(seed, n, *size, dtype=dtype)
    assert torch.equal(SpatialTransform.identity(n)(x), x)


@laws
@given(seeds, batch_sizes, sizes(), dtypes)
def test_identity_returns_images_up_to_rounding(seed, n, size, dtype):
    x = noise(seed, n, 3, *size, dtype=dtype)
    assert_equal_up_to_rounding(SpatialTransform.identity(n)(x), x)


@laws
@given(seeds, batch_sizes, sizes(), dtypes, st.booleans(), st.booleans())
def test_flips_reverse_heatmaps_bit_for_bit_and_return_them_when_repeated(seed, n, size, dtype, horizontal, vertical):
    x = noise(seed, n, *size, dtype=dtype)
    flip = flips(horizontal, vertical, n)
    flipped = flip(x)
    assert torch.equal(flipped, x.flip([axis for axis, on in ((2, horizontal), (1, vertical)) if on]))
    assert torch.equal(flip(flipped), x)


@laws
@given(seeds, batch_sizes, sizes(), dtypes, st.booleans(), st.booleans())
def test_flips_reverse_images_and_return_them_when_repeated(seed, n, size, dtype, horizontal, vertical):
    x = noise(seed, n, 2, *size, dtype=dtype)
    flip = flips(horizontal, vertical, n)
    flipped = flip(x)
    assert_equal_up_to_rounding(flipped, x.flip([axis for axis, on in ((3, horizontal), (2, vertical)) if on]))
    assert_equal_up_to_rounding(flip(flipped), x)


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), flip=st.lists(st.booleans(), min_size=1, max_size=4))
def test_the_whole_image_as_a_box_is_a_flip_where_asked_and_nothing_elsewhere(channels, seed, size, flip):
    x = noise(seed, len(flip), *channels, *size)
    t = crop([(0, 0, *size)] * len(flip), flip, size)
    expected = torch.stack([hflip(image) if on else image for image, on in zip(x, flip, strict=True)])
    assert_equal_up_to_rounding(t(x), expected)


# Inverse and composition, on the parameters

# The maps drawn have entries up to 2 and singular values from 0.3 to 2, so an entry of an inverse or a product is a sum
# of a few terms below 20 with a few roundings each.
PARAMETER_ROUNDING = {torch.float32: 100 * 2**-23, torch.float64: 100 * 2**-52}


@laws
@given(affine_maps(), wide_dtypes)
def test_the_inverse_is_that_of_the_homogeneous_matrix(t, dtype):
    t = SpatialTransform(t.theta.to(dtype))
    inverse = t.inverse()
    assert inverse.theta.dtype == dtype
    expected = torch.linalg.inv(as_3x3(t).double()).to(dtype)
    torch.testing.assert_close(as_3x3(inverse), expected, rtol=0, atol=PARAMETER_ROUNDING[dtype])


@laws
@given(affine_maps(), wide_dtypes)
def test_a_map_and_its_inverse_compose_to_the_identity_either_way(t, dtype):
    t = SpatialTransform(t.theta.to(dtype))
    identity = SpatialTransform.identity(len(t)).theta.to(dtype)
    for composed in (t @ t.inverse(), t.inverse() @ t):
        torch.testing.assert_close(composed.theta, identity, rtol=0, atol=PARAMETER_ROUNDING[dtype])


@laws
@given(st.data(), batch_sizes, wide_dtypes)
def test_composition_is_the_product_of_homogeneous_matrices_inner_map_first(data, n, dtype):
    t, u = (SpatialTransform(data.draw(affine_maps(st.just(n))).theta.to(dtype)) for _ in range(2))
    # t(u(x)) looks where u looks from where t looks: theta of u after theta of t.
    expected = (as_3x3(u).double() @ as_3x3(t).double()).to(dtype)
    torch.testing.assert_close(as_3x3(t @ u), expected, rtol=0, atol=PARAMETER_ROUNDING[dtype])


@laws
@given(st.data(), batch_sizes)
def test_composition_is_associative_and_inverts_in_reverse_order(data, n):
    t, u, v = (data.draw(affine_maps(st.just(n))) for _ in range(3))
    rounding = {"rtol": 0, "atol": 10 * PARAMETER_ROUNDING[torch.float64]}  # three maps: entries up to 8, not 2
    torch.testing.assert_close(((t @ u) @ v).theta, (t @ (u @ v)).theta, **rounding)
    torch.testing.assert_close((t @ u).inverse().theta, (u.inverse() @ t.inverse()).theta, **rounding)


# Inverse and composition, on data


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), data=st.data())
def test_an_integer_crop_is_a_slice(channels, seed, size, data):
    top, left, height, width = box = data.draw(boxes(size))
    x = noise(seed, 1, *channels, *size)
    cropped = crop([box], [False], size)(x, (height, width))
    assert_equal_up_to_rounding(cropped, x[..., top : top + height, left : left + width])


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), data=st.data())
def test_integer_crops_and_flips_compose_on_data(channels, seed, size, data):
    outer, inner = data.draw(st.booleans()), data.draw(st.booleans())
    first = data.draw(boxes(size))
    between = first[2:]
    second = data.draw(boxes(between))
    x = noise(seed, 1, *channels, *size)
    u, t = crop([first], [inner], size), crop([second], [outer], between)
    assert_equal_up_to_rounding((t @ u)(x, second[2:]), t(u(x, between), second[2:]))


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), data=st.data(), flip=st.booleans())
def test_the_inverse_puts_an_integer_crop_back_and_covers_nothing_else(channels, seed, size, data, flip):
    top, left, height, width = box = data.draw(boxes(size))
    x = noise(seed, 1, *channels, *size)
    t = crop([box], [flip], size)
    back, coverage = t.inverse()(t(x, (height, width)), size), t.inverse().coverage(size)
    inside = torch.zeros(1, *size, dtype=torch.float64)
    inside[:, top : top + height, left : left + width] = 1
    assert torch.equal(coverage, inside)
    mask = inside if x.ndim == 3 else inside[:, None]
    assert_equal_up_to_rounding(back * mask, x * mask)


def assert_composes_on_waves(t, u, size, frequency, channels):
    r"""Compare t(u(x)) with (t @ u)(x) for a plane wave x, where no rim pixel plays a part.

    Bilinear interpolation of cos(w . p), p in pixels, errs by at most (w_x^2 + w_y^2) / 8. Once for the composition;
    for t(u(x)) once for u, whose errors t only averages, and once for t, on whose grid the wave u(x) has frequency
    P^T w, with P the linear part of u in pixels.
    """
    height, width = size
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    w = torch.tensor(frequency, dtype=torch.float64)
    wave = (w[0] * columns[None, :] + w[1] * rows[:, None]).cos()
    x = wave.expand(len(t), *channels, height, width)
    difference = ((t @ u)(x) - t(u(x))).abs()
    if channels:
        difference = difference.amax(dim=1)

    pixels = pixel_matrix(u, size)
    tolerance = (2 * w.square().sum() + (pixels.mT @ w).square().sum(dim=1)) / 8 + ROUNDING[torch.float64]
    # u is read at up to four pixels around where t looks: one step of u's grid, P's row sums in pixels of x.
    step = pixels.abs().sum(dim=2).amax(dim=1)[:, None, None]
    mask = away_from_rim(source_positions(t, size), size)
    mask &= away_from_rim(source_positions(t @ u, size), size, step)
    assume(mask.any())
    assert (difference <= tolerance[:, None, None])[mask].all()


@images_and_heatmaps
@laws
@given(size=sizes(12, 24), data=st.data(), frequency=st.tuples(uniform(-0.4, 0.4), uniform(-0.4, 0.4)))
def test_composition_holds_on_smooth_images_away_from_the_rim(channels, size, data, frequency):
    t, u = (data.draw(affine_maps(st.just(2), **small)) for _ in range(2))
    assert_composes_on_waves(t, u, size, frequency, channels)


@images_and_heatmaps
@laws
@given(
    size=sizes(12, 24),
    t=affine_maps(st.just(2), **small),
    frequency=st.tuples(uniform(-0.4, 0.4), uniform(-0.4, 0.4)),
)
def test_the_inverse_returns_smooth_images_away_from_the_rim(channels, size, t, frequency):
    assert_composes_on_waves(t.inverse(), t, size, frequency, channels)


# A batch


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), output_size=sizes(), t=affine_maps(), dtype=dtypes)
def test_an_image_gets_in_a_batch_what_it_gets_alone(channels, seed, size, output_size, t, dtype):
    x = noise(seed, len(t), *channels, *size, dtype=dtype)
    together = t(x, output_size)
    for i in range(len(t)):
        assert_equal_up_to_rounding(t[i](x[i : i + 1], output_size), together[i : i + 1])
        assert torch.equal(t[i].coverage(output_size), t.coverage(output_size)[i : i + 1])


@laws
@given(affine_maps(), st.integers(-5, 5), st.integers(-5, 5))
def test_indexing_follows_lists(t, start, stop):
    assert len(t) == len(t.theta)
    assert torch.equal(t[start:stop].theta, t.theta[start:stop])
    assert len(t[start:stop]) == len(range(len(t))[start:stop])
    assert torch.equal(t[-1].theta, t.theta[-1:])
    order = torch.arange(len(t)).flip(0)
    assert torch.equal(t[order].theta, t.theta[order])
    assert torch.equal(t[order.tolist()].theta, t.theta[order])
    assert torch.equal(t[order != 0].theta, t.theta[order != 0])
    with pytest.raises(IndexError):
        t[len(t)]


@laws
@given(affine_maps())
def test_iteration_yields_every_map_and_ends(t):
    assert torch.equal(torch.cat([one.theta for one in t]), t.theta)


@images_and_heatmaps
def test_an_empty_slice_is_a_batch_of_no_images(channels):
    nothing = SpatialTransform.identity(3)[:0]
    assert nothing(torch.zeros(0, *channels, 4, 5), (2, 3)).shape == (0, *channels, 2, 3)


def test_a_transform_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpatialTransform.identity(2).theta = torch.zeros(2, 2, 3)


# Interpolation


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), output_size=sizes(), t=affine_maps(), a=uniform(-3, 3), b=uniform(-3, 3))
def test_linear_in_the_image(channels, seed, size, output_size, t, a, b):
    x, y = noise(seed, 2, len(t), *channels, *size)
    combined = t(a * x + b * y, output_size)
    assert_equal_up_to_rounding(combined, a * t(x, output_size) + b * t(y, output_size))


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), output_size=sizes(), t=affine_maps(shift=2.0), dtype=dtypes)
def test_values_stay_within_the_range_of_the_source(channels, seed, size, output_size, t, dtype):
    x = noise(seed, len(t), *channels, *size, dtype=dtype) - 0.5
    result = t(x, output_size).flatten(1)
    source = x.flatten(1)
    if channels:
        result, source = t(x, output_size).flatten(2), x.flatten(2)
    rounding = 4 * torch.finfo(dtype).eps  # the four weights add up to 1 up to rounding; values are below 1
    assert (result <= source.amax(-1, keepdim=True) + rounding).all()
    assert (result >= source.amin(-1, keepdim=True) - rounding).all()


@images_and_heatmaps
@laws
@given(
    size=sizes(2, 12),
    output_size=sizes(),
    t=affine_maps(),
    dtype=wide_dtypes,
    slopes=st.tuples(uniform(-1, 1), uniform(-1, 1)),
)
def test_a_linear_ramp_becomes_the_right_linear_ramp(channels, size, output_size, t, dtype, slopes):
    # Bilinear interpolation is exact for a ramp, so this pins every position, at every resolution.
    def ramp(positions):
        return slopes[0] * positions[..., 0] + slopes[1] * positions[..., 1]

    x = ramp(centres(size)).to(dtype).expand(len(t), *channels, *size)
    positions = source_positions(t, output_size)
    inside = away_from_rim(positions, size)
    expected = ramp(positions)
    result = t(x, output_size)
    if channels:
        inside, expected = (value[:, None].expand_as(result) for value in (inside, expected))
    assert_equal_up_to_rounding(result[inside], expected[inside].to(dtype))


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), right=st.integers(-4, 4), down=st.integers(-4, 4))
def test_a_whole_pixel_translation_repeats_the_border(channels, seed, size, right, down):
    x = noise(seed, 1, *channels, *size)
    rows = [min(max(i - down, 0), size[0] - 1) for i in range(size[0])]
    columns = [min(max(j - right, 0), size[1] - 1) for j in range(size[1])]
    theta = torch.tensor([[[1.0, 0.0, -2 * right / size[1]], [0.0, 1.0, -2 * down / size[0]]]], dtype=torch.float64)
    assert_equal_up_to_rounding(SpatialTransform(theta)(x), x[..., rows, :][..., columns])


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), output_size=sizes(1, 20), data=st.data(), flip=st.booleans())
def test_equals_torchvisions_resized_crop_inside_the_box(channels, seed, size, output_size, data, flip):
    box = data.draw(boxes(size))
    x = noise(seed, 1, *channels, *size)
    image = x if channels else x[:, None]
    expected = resized_crop(image, *box, list(output_size), InterpolationMode.BILINEAR, antialias=False)
    # Within half a pixel of the box's edge torchvision repeats the box's last pixel; ours sees the pixel beyond it.
    rows, columns = (
        [-1e-9 <= (i + 0.5) * side / count - 0.5 <= side - 1 + 1e-9 for i in range(count)]
        for side, count in zip(box[2:], output_size, strict=True)
    )
    result = crop([box], [False], size)(x, output_size).reshape(expected.shape)
    assert_equal_up_to_rounding(result[..., rows, :][..., columns], expected[..., rows, :][..., columns])
    # Mirrored, the same crop is torchvision's hflip of it, to the rim.
    mirrored = crop([box], [flip], size)(x, output_size).reshape(expected.shape)
    assert_equal_up_to_rounding(mirrored, hflip(result) if flip else result)


@laws
@given(seeds, sizes(), sizes(), affine_maps(), wide_dtypes)
def test_images_and_heatmaps_are_treated_alike(seed, size, output_size, t, dtype):
    # Each goes its own way through the code. Positions 0.6 * 12 pixels outside are a little less exact, hence the 4.
    x = noise(seed, len(t), 2, *size, dtype=dtype)
    images = t(x, output_size)
    heatmaps = torch.stack([t(channel, output_size) for channel in x.unbind(dim=1)], dim=1)
    torch.testing.assert_close(images, heatmaps, rtol=0, atol=4 * ROUNDING[dtype])


@laws
@given(seeds, sizes(1, 6), affine_maps(st.integers(1, 2)))
def test_half_precision_is_computed_in_float32_and_rounded_once(seed, size, t):
    for dtype in (torch.float16, torch.bfloat16):
        for shape in ((len(t), *size), (len(t), 2, *size)):
            x = noise(seed, *shape, dtype=dtype)
            assert torch.equal(t(x), t(x.float()).to(dtype))


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), t=affine_maps())
def test_autocast_changes_nothing(channels, seed, size, t):
    t = SpatialTransform(t.theta.float())
    x = noise(seed, len(t), *channels, *size, dtype=torch.float32)
    expected, expected_inverse = t(x), (t @ t.inverse()).theta
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(t(x), expected)
        assert torch.equal((t @ t.inverse()).theta, expected_inverse)


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), t=affine_maps())
def test_the_inputs_are_left_alone(channels, seed, size, t):
    x, theta = noise(seed, len(t), *channels, *size), t.theta.clone()
    before = x.clone()
    for result in (t(x), t.inverse().theta, (t @ t).theta, t.coverage(size)):
        result.fill_(7)
    assert torch.equal(x, before)
    assert torch.equal(t.theta, theta)


# Coverage


@laws
@given(affine_maps(shift=1.5), sizes())
def test_coverage_is_one_where_the_source_position_lies_in_the_image(t, size):
    def position(row, column, theta):
        x, y = -1 + (2 * column + 1) / size[1], -1 + (2 * row + 1) / size[0]
        return [a * x + b * y + shift for a, b, shift in theta]

    farthest = torch.tensor(
        [
            [[max(map(abs, position(i, j, theta))) for j in range(size[1])] for i in range(size[0])]
            for theta in t.theta.tolist()
        ],
        dtype=torch.float64,
    )
    decided = (farthest - 1).abs() > 1e-9  # a centre on the very edge may fall either way
    coverage = t.coverage(size)
    assert coverage.shape == (len(t), *size)
    assert torch.equal(coverage[decided], (farthest < 1).double()[decided])


@laws
@given(sizes(1, 300), sizes(1, 40), st.data(), wide_dtypes)
def test_a_crop_is_covered_everywhere(image_size, size, data, dtype):
    t = SpatialTransform(data.draw(crops(image_size)).theta.to(dtype))
    assert torch.equal(t.coverage(size), torch.ones(len(t), *size, dtype=dtype))


@laws
@given(sizes(), st.integers(-14, 14), st.integers(-14, 14))
def test_a_whole_pixel_translation_uncovers_as_many_rows_and_columns(size, right, down):
    theta = torch.tensor([[[1.0, 0.0, -2 * right / size[1]], [0.0, 1.0, -2 * down / size[0]]]])
    rows = torch.tensor([0 <= i - down < size[0] for i in range(size[0])])
    columns = torch.tensor([0 <= j - right < size[1] for j in range(size[1])])
    expected = (rows[:, None] & columns[None, :]).float()[None]
    assert torch.equal(SpatialTransform(theta).coverage(size), expected)


def rotation(angle):
    return SpatialTransform(
        torch.tensor([[[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]])
    )


@laws
@given(st.integers(1, 12), uniform(0, 2 * math.pi))
def test_a_rotation_covers_the_inscribed_disc(side, angle):
    disc = centres((side, side)).norm(dim=-1) < 1
    assert rotation(angle).coverage((side, side))[0][disc].all()


@pytest.mark.parametrize("side", range(1, 13))
def test_a_rotation_by_45_degrees_uncovers_the_corners(side):
    # A corner's centre lies sqrt(2) (1 - 1/side) from the middle; the rotation turns that diagonal onto an axis.
    coverage = rotation(math.pi / 4).coverage((side, side))[0]
    for corner in (coverage[0, 0], coverage[0, -1], coverage[-1, 0], coverage[-1, -1]):
        assert corner.item() == (math.sqrt(2) * (1 - 1 / side) < 1)


# One transform, two resolutions


def blob(size, centre, sigma=0.08):
    """A Gaussian at `centre`, (x, y) from 0 to 1 across the image, sampled at the pixels' centres."""
    positions = (centres(size) + 1) / 2
    return (-(positions - centre).square().sum(dim=-1) / (2 * sigma**2)).exp()


def centre_of_mass(x):
    positions = (centres(x.shape[-2:]) + 1) / 2
    return (x[..., None] * positions).sum(dim=(0, 1)) / x.sum()


@laws
@given(
    angle=uniform(-math.pi, math.pi),
    zoom=uniform(0.75, 1.25),
    mirror=st.booleans(),
    shift=st.tuples(uniform(-0.2, 0.2), uniform(-0.2, 0.2)),
    offset=st.tuples(uniform(-0.05, 0.05), uniform(-0.05, 0.05)),
)
def test_a_blob_moves_to_the_same_relative_place_at_224_and_at_7(angle, zoom, mirror, shift, offset):
    side = -zoom if mirror else zoom
    linear = torch.tensor(
        [[side * math.cos(angle), -zoom * math.sin(angle)], [side * math.sin(angle), zoom * math.cos(angle)]]
    ).double()
    b = torch.tensor(shift).double()
    t = SpatialTransform(torch.cat([linear, b[:, None]], dim=1)[None])
    wanted = 0.5 + torch.tensor(offset).double()  # where the blob is to come out
    centre = (linear @ (2 * wanted - 1) + b + 1) / 2  # hence where it must be put in
    image = t(blob((224, 224), centre)[None, None])[0, 0]
    heatmap = t(blob((7, 7), centre)[None])[0]
    # On 224 pixels only what the rim cuts off counts: more than 4 sigma away, hence less than 1e-4 of the blob. On 7
    # pixels sigma is about half a pixel, which is coarse for straight lines between samples: the centre was off by at
    # most 0.016 in 1500 draws with the parameters at the ends of their ranges. 0.02 is a seventh of such a pixel.
    assert (centre_of_mass(image) - wanted).abs().max() < 1e-3
    assert (centre_of_mass(heatmap) - wanted).abs().max() < 0.02


# Gradients, determinism, formats


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(1, 4), output_size=sizes(1, 4), t=affine_maps(st.integers(1, 2)))
def test_differentiable_in_the_image(channels, seed, size, output_size, t):
    x = noise(seed, len(t), *channels, *size).requires_grad_()
    assert torch.autograd.gradcheck(lambda image: t(image, output_size), x)


@laws
@given(seed=seeds, size=sizes(1, 4), output_size=sizes(1, 4), t=affine_maps(st.integers(1, 2)))
def test_differentiable_in_the_image_when_determinism_is_asked_for(seed, size, output_size, t):
    x = noise(seed, len(t), 2, *size).requires_grad_()
    with deterministic_algorithms():
        assert torch.autograd.gradcheck(lambda image: t(image, output_size), x)


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), output_size=sizes(), t=affine_maps(), dtype=wide_dtypes)
def test_determinism_changes_neither_values_nor_gradients(channels, seed, size, output_size, t, dtype):
    x = noise(seed, len(t), *channels, *size, dtype=dtype).requires_grad_()
    weight = noise(seed + 1, len(t), *channels, *output_size, dtype=dtype)
    expected = t(x, output_size)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    with deterministic_algorithms():
        result = t(x, output_size)
        (gradient,) = torch.autograd.grad((result * weight).sum(), x)
    torch.testing.assert_close(result, expected, rtol=0, atol=4 * ROUNDING[dtype])
    # A border pixel gathers the gradients of up to 144 output pixels.
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=144 * ROUNDING[dtype])


def graph_of(tensor):
    """Names of the operations between a tensor and its leaves."""
    names, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


@images_and_heatmaps
def test_what_must_repeat_has_no_grid_sample_in_its_graph(channels):
    # Its backward adds in any order on a GPU; there is none here, so the graph is asked.
    x = torch.rand(2, *channels, 4, 5, requires_grad=True)
    with deterministic_algorithms():
        assert not any("GridSampler" in name for name in graph_of(IDENTITY(x)))


def test_heatmaps_never_go_through_grid_sample():
    assert not any("GridSampler" in name for name in graph_of(IDENTITY(torch.rand(2, 4, 5, requires_grad=True))))


@pytest.mark.parametrize("deterministic", [False, True])
@laws
@given(seed=seeds, n=batch_sizes, size=sizes(2, 6), dtype=dtypes)
def test_type_and_memory_format_are_kept(deterministic, seed, n, size, dtype):
    t = SpatialTransform.identity(n)
    x = noise(seed, n, 3, *size, dtype=dtype)
    for format_ in (torch.contiguous_format, torch.channels_last):
        image = x.to(memory_format=format_).requires_grad_(deterministic)
        with deterministic_algorithms() if deterministic else torch.enable_grad():
            result = t(image)
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=format_)
    assert t(x[:, 0]).dtype == dtype


@laws
@given(seed=seeds, n=batch_sizes, size=sizes(2, 6), t=affine_maps(st.just(2)))
def test_memory_format_does_not_change_values(seed, n, size, t):
    x = noise(seed, 2, 3, *size)
    assert_equal_up_to_rounding(t(x.to(memory_format=torch.channels_last)), t(x))
    assert_equal_up_to_rounding(t(x.mT.contiguous().mT), t(x))


@images_and_heatmaps
@laws
@given(n=batch_sizes, size=sizes(), output_size=sizes(), dtype=dtypes)
def test_runs_without_data(channels, n, size, output_size, dtype):
    t = SpatialTransform.identity(n).to("meta")
    x = torch.empty(n, *channels, *size, dtype=dtype, device="meta")
    result = (t @ t.inverse())(x, output_size)
    assert result.is_meta
    assert (result.shape, result.dtype) == ((n, *channels, *output_size), dtype)
    assert t[0].coverage(output_size).shape == (1, *output_size)
    assert SpatialTransform.identity(n, device="meta").theta.is_meta


@laws
@given(sizes(), st.data())
def test_whole_numbers_give_float32_maps_and_float64_stays(image_size, data):
    start, size = torch.tensor([data.draw(boxes(image_size))]).split(2, dim=1)
    for given_type, wanted in ((torch.int64, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        t = SpatialTransform.from_crop(start.to(given_type), size.to(given_type), image_size=image_size)
        assert t.theta.dtype == wanted


# Maps in pixels


@laws
@given(affine_maps(), sizes(1, 300), sizes(1, 300), st.booleans())
def test_maps_come_back_from_their_matrices(t, image_size, output_size, two_rows):
    matrix = t.matrix(image_size, output_size)
    assert (matrix.shape, matrix.dtype) == ((len(t), 3, 3), torch.float64)
    back = SpatialTransform.from_matrix(matrix[:, :2] if two_rows else matrix, image_size, output_size)
    # Shifts of up to 300 pixels, with a few roundings each, in units of half a pixel or more.
    torch.testing.assert_close(back.theta, t.theta, rtol=0, atol=1e-10)
    again = back.matrix(image_size, output_size)
    torch.testing.assert_close(again, matrix, rtol=0, atol=1e-9)


@laws
@given(affine_maps(), sizes(), sizes())
def test_a_matrix_takes_what_an_output_pixel_shows_to_that_pixel(t, image_size, output_size):
    height, width = image_size
    x, y = source_positions(t, output_size).unbind(dim=-1)
    shown = torch.stack([(x + 1) * width / 2 - 0.5, (y + 1) * height / 2 - 0.5, torch.ones_like(x)], dim=-1)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in output_size)
    there = torch.cartesian_prod(rows, columns).flip(1).view(*output_size, 2)
    moved = torch.einsum("nij,nhwj->nhwi", t.matrix(image_size, output_size), shown)
    torch.testing.assert_close(moved[..., :2], there.expand_as(moved[..., :2]), rtol=0, atol=1e-9)
    assert torch.equal(moved[..., 2], torch.ones_like(x))


@laws
@given(st.data(), batch_sizes, sizes(), sizes(), sizes())
def test_composition_is_the_product_of_matrices_in_pixels(data, n, first, second, third):
    t, u = (data.draw(affine_maps(st.just(n))) for _ in range(2))
    product = t.matrix(second, third) @ u.matrix(first, second)
    torch.testing.assert_close((t @ u).matrix(first, third), product, rtol=0, atol=1e-9)


@images_and_heatmaps
@laws
@given(seed=seeds, size=sizes(), right=st.integers(-4, 4), down=st.integers(-4, 4))
def test_a_whole_pixel_translation_in_pixels_repeats_the_border(channels, seed, size, right, down):
    x = noise(seed, 1, *channels, *size)
    rows = [min(max(i - down, 0), size[0] - 1) for i in range(size[0])]
    columns = [min(max(j - right, 0), size[1] - 1) for j in range(size[1])]
    matrix = torch.tensor([[[1.0, 0.0, right], [0.0, 1.0, down]]], dtype=torch.float64)
    assert_equal_up_to_rounding(SpatialTransform.from_matrix(matrix, size)(x), x[..., rows, :][..., columns])


@laws
@given(sizes(1, 300), st.booleans(), st.booleans(), wide_dtypes)
def test_flips_in_pixels_are_flips_bit_for_bit(size, horizontal, vertical, dtype):
    x = [-1.0, 0.0, size[1] - 1] if horizontal else [1.0, 0.0, 0.0]
    y = [0.0, -1.0, size[0] - 1] if vertical else [0.0, 1.0, 0.0]
    t = SpatialTransform.from_matrix(torch.tensor([[x, y]], dtype=dtype), size)
    assert torch.equal(t.theta, flips(horizontal, vertical).theta.to(dtype))
    assert torch.equal(t.matrix(size)[0, :2], torch.tensor([x, y], dtype=dtype))


@laws
@given(seeds, sizes(), sizes(1, 24), st.booleans())
def test_resizing_in_pixels_equals_interpolate(seed, size, output_size, align_corners):
    assume(not align_corners or min(*size, *output_size) > 1)  # whose only pixel has no two corners to align
    x = noise(seed, 1, 2, *size)
    rows = []
    for side, output_side in ((size[1], output_size[1]), (size[0], output_size[0])):
        scale = (output_side - 1) / (side - 1) if align_corners else output_side / side
        rows.append((scale, 0.0 if align_corners else (scale - 1) / 2))
    (scale_x, x_shift), (scale_y, y_shift) = rows
    matrix = torch.tensor([[[scale_x, 0.0, x_shift], [0.0, scale_y, y_shift]]], dtype=torch.float64)
    result = SpatialTransform.from_matrix(matrix, size, output_size)(x, output_size)
    expected = F.interpolate(x, output_size, mode="bilinear", align_corners=align_corners)
    assert_equal_up_to_rounding(result, expected)


@laws
@given(
    seed=seeds,
    size=sizes(4, 32),
    angle=uniform(-180, 180),
    zoom=uniform(0.5, 2),
    shift=st.tuples(uniform(-5, 5), uniform(-5, 5)),
)
def test_a_rotation_in_pixels_equals_torchvisions_affine_where_both_see_the_image(seed, size, angle, zoom, shift):
    def torchvisions(image):
        return affine(image, angle, list(shift), zoom, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)

    # About the image's centre, as torchvision's documentation has it: from there, turned, and back, then shifted.
    middle = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2], dtype=torch.float64)
    cos, sin = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
    linear = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    moved = middle + torch.tensor(shift, dtype=torch.float64) - linear @ middle
    t = SpatialTransform.from_matrix(torch.cat([linear, moved[:, None]], dim=1)[None], size)
    x = noise(seed, 1, 2, *size)
    inside = torchvisions(torch.ones_like(x)) > 1 - 1e-6  # it fills with zeros, ours with the border
    torch.testing.assert_close(t(x)[inside], torchvisions(x)[inside], rtol=0, atol=1e-4)


def opencvs(image, matrix, size):
    return cv2.warpAffine(image, matrix[:2], size[::-1])


def scikit_images(image, matrix, size):
    to_input = skimage.transform.AffineTransform(matrix).inverse
    return skimage.transform.warp(image, to_input, output_shape=size, order=1, clip=False)


# OpenCV's positions are 32nds of a pixel in some versions.
@pytest.mark.parametrize(("warp", "rounding"), [(opencvs, 0.05), (scikit_images, 1e-9)])
@laws
@given(seed=seeds, size=sizes(4, 12), output_size=sizes(4, 12), t=affine_maps(zoom=(0.6, 1.4), shift=0.3))
def test_a_matrix_in_pixels_is_that_of_other_libraries(warp, rounding, seed, size, output_size, t):
    image, matrix = torch.rand(size, generator=generator(seed)).double(), t.matrix(size, output_size)[0].numpy()
    inside = torch.from_numpy(warp(np.ones(size), matrix, output_size)) > 1 - 1e-9  # they fill with zeros
    ours = SpatialTransform.from_matrix(torch.from_numpy(matrix)[None], size, output_size)(image[None], output_size)
    theirs = torch.from_numpy(warp(image.numpy(), matrix, output_size))
    torch.testing.assert_close(ours[0][inside], theirs[inside], rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_matrix_is_computed_in_at_least_float32(dtype):
    matrix = torch.tensor([[[0.5, 0.0, 3.0], [0.0, 2.0, -1.0]]], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    t = SpatialTransform.from_matrix(matrix, (7, 9))
    assert t.theta.dtype == wide
    assert torch.equal(t.theta, SpatialTransform.from_matrix(matrix.to(wide), (7, 9)).theta)


def test_a_matrix_carries_gradients():
    matrix = torch.tensor([[[0.5, 0.1, 3.0], [0.2, 2.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: SpatialTransform.from_matrix(m, (7, 9), (5, 4)).theta, matrix)


def test_roundings_of_a_last_row_are_let_through():
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[1, 2] = torch.tensor([1e-8, -1e-8, 1 + 1e-6])
    t = SpatialTransform.from_matrix(matrix, (224, 224))
    assert torch.equal(t.theta, IDENTITY.theta)


def test_no_maps_in_pixels_are_no_maps():
    assert len(SpatialTransform.from_matrix(torch.empty(0, 3, 3), (4, 4))) == 0


# Errors

THETA = IDENTITY.theta
ONE, TWO = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
PIXELS = torch.eye(3)[None]
ALMOST_SINGULAR = torch.tensor([[[0.1, 0.3, 0.0], [0.7, 2.1, 0.0]]])  # on paper it is; float32 rounds each number


def from_crop(start=ONE, size=ONE, flip=None, image_size=(4, 4)):
    return SpatialTransform.from_crop(start, size, flip, image_size=image_size)


def from_matrix(matrix, image_size=(4, 4), output_size=None):
    return SpatialTransform.from_matrix(matrix, image_size, output_size)


def changed(*entries, value):
    """Return one identity and one map with other values at these places."""
    matrix = PIXELS.repeat(2, 1, 1)
    for entry in entries:
        matrix[(1, *entry)] = value
    return matrix


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SpatialTransform([[1.0]]), ValueError, r"`theta` must be .* \(n, d, d \+ 1\), .*; got \[\[1.0\]\]"),
        (lambda: SpatialTransform(torch.zeros(2, 3)), ValueError, r"got a float32 tensor of shape \(2, 3"),
        (lambda: SpatialTransform(torch.zeros(5, 3, 2)), ValueError, r"`theta` must be .* got .* \(5, 3, 2\)"),
        (lambda: SpatialTransform(THETA.long()), TypeError, r"`theta` must be float32 or float64; got a int64"),
        (lambda: SpatialTransform(THETA.half()), TypeError, r"got a float16 tensor .* Convert with `.float\(\)`"),
        (lambda: from_crop(start=1.0), ValueError, r"`start` must be a tensor of shape \(n, 2\), .* \(4, 4\); got 1.0"),
        (lambda: from_crop(size=ONE[0]), ValueError, r"`size` must be .* got a float32 tensor of shape \(2,\)"),
        (lambda: from_crop(image_size=(4, 4, 4)), ValueError, r"`start` must be .* \(n, 3\), .* got .* \(1, 2\)"),
        (lambda: from_crop(size=TWO), ValueError, r"`size` must be as long as `start`, 1; got .* \(2, 2\)"),
        (lambda: from_crop(flip=ONE), ValueError, r"`flip` must be a bool tensor of shape \(1, 2\), .* got a float32"),
        (lambda: from_crop(flip=TWO > 1), ValueError, r"bool tensor of shape \(1, 2\), .*; got .* \(2, 2\)"),
        (lambda: from_crop(flip=True), ValueError, r"`flip` must be .* got True"),
        (lambda: from_crop(image_size=4), ValueError, r"`image_size` must be one positive integer .* got 4"),
        (lambda: from_crop(image_size=(4, 0)), ValueError, r"`image_size` must be .* got \(4, 0\)"),
        (lambda: from_crop(image_size=(4, 4, 4, 4)), ValueError, r"`image_size` must be .* got \(4, 4, 4, 4\)"),
        (lambda: from_matrix([[1.0]]), ValueError, r"`matrix` must be a tensor of shape \(n, 2, 3\) or .* got \[\[1.0"),
        (lambda: from_matrix(PIXELS[0]), ValueError, r"`matrix` must be .* \(3, 3\)\. .* `torch.as_tensor\(matrix\)"),
        (lambda: from_matrix(torch.eye(3).numpy()), ValueError, r"`matrix` must be a tensor .* got a numpy.ndarray"),
        (lambda: from_matrix(torch.zeros(5, 3, 2)), ValueError, r"`matrix` must be .* got .* \(5, 3, 2\)"),
        (lambda: from_matrix(PIXELS.long()), TypeError, r"`matrix` must be floating point; got a int64 .*`.float\(\)`"),
        (lambda: from_matrix(PIXELS, 4), ValueError, r"`image_size` must be one positive integer .* got 4"),
        (lambda: from_matrix(PIXELS, (4, 4, 4)), ValueError, r"`matrix` must be .* \(n, 3, 4\) or \(n, 4, 4\), .* got"),
        (lambda: from_matrix(PIXELS, (4, 4), (4, 0)), ValueError, r"`output_size` must be two .* got \(4, 0\)"),
        (
            lambda: from_matrix(changed((0, 0), value=0.0)),
            ValueError,
            r"be inverted; got .* \[\[0.0, 0.0\], \[0.0, 1.0",
        ),
        (lambda: from_matrix(changed((0, 0), (0, 1), (1, 0), value=1.0)), ValueError, r"be inverted; got the linear"),
        (lambda: from_matrix(ALMOST_SINGULAR), ValueError, r"can be inverted; got the linear part"),
        (lambda: from_matrix(changed((0, 0), value=math.nan)), ValueError, r"must hold finite numbers; got .*nan"),
        (lambda: from_matrix(changed((0, 2), value=math.nan)), ValueError, r"must hold finite numbers; got .*nan"),
        (lambda: from_matrix(changed((2, 0), value=0.25)), ValueError, r"last row, .* got \[0.25, 0.0, 1.0\]"),
        (lambda: from_matrix(changed((2, 1), value=0.25)), ValueError, r"last row, .* got \[0.0, 0.25, 1.0\]"),
        (
            lambda: from_matrix(changed((2, 2), value=2.0)),
            ValueError,
            r"`matrix` must have \(0, 0, 1\) as its last row",
        ),
        (lambda: IDENTITY.matrix(4), ValueError, r"`image_size` must be two positive integers .* got 4"),
        (lambda: IDENTITY.matrix((4, 4), (4,)), ValueError, r"`output_size` must be two positive .* got \(4,\)"),
        (
            lambda: IDENTITY @ SpatialTransform.identity(3),
            ValueError,
            r"one batch size .* got thetas of shapes \(2, 2, 3\) and \(3, 2, 3\)",
        ),
        (lambda: IDENTITY @ torch.eye(2), TypeError, r"unsupported operand"),
        (lambda: IDENTITY(torch.zeros(4, 4)), ValueError, r"images .* or heatmaps .* got a float32 .* \(4, 4\)"),
        (lambda: IDENTITY(torch.zeros(2, 1, 1, 4, 4)), ValueError, r"`x` must be images .* \(2, 1, 1, 4, 4\)"),
        (lambda: IDENTITY("cat"), ValueError, r"`x` must be images .* got 'cat'"),
        (lambda: IDENTITY(torch.zeros(2, 3, 4, 4).byte()), TypeError, r"`x` must be floating point; got a uint8"),
        (lambda: IDENTITY(torch.zeros(2, 4, 4).long()), TypeError, r"got a int64 .* Convert with `.float\(\)`"),
        (lambda: IDENTITY(torch.zeros(3, 4, 4)), ValueError, r"one image for each of the 2 maps; got .* \(3, 4, 4\)"),
        (lambda: IDENTITY(torch.zeros(1, 3, 4, 4)), ValueError, r"one image for each of the 2 maps"),
        (lambda: IDENTITY(torch.zeros(2, 4, 4), 7), ValueError, r"`size` must be two positive integers .* got 7"),
        (lambda: IDENTITY(torch.zeros(2, 4, 4), (7.0, 7)), ValueError, r"`size` must be .* got \(7.0, 7\)"),
        (lambda: IDENTITY.coverage((7,)), ValueError, r"`size` must be two positive integers .* got \(7,\)"),
        (lambda: IDENTITY.coverage((7, -1)), ValueError, r"`size` must be .* got \(7, -1\)"),
    ],
)
def test_an_error_says_what_must_hold_and_what_was_got(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_compiled_transform_gives_the_same_without_complex_numbers():
    """The compiler warns of complex numbers, and does not fuse them."""
    values = []

    def backend(graph, inputs):
        values.extend(node.meta.get("example_value") for node in graph.graph.nodes)
        return graph

    t, x = RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 10).sample(3, (9, 12)), torch.rand(3, 2, 9, 12)
    # The function alone: an older compiler cannot look through the check for autocast around it.
    compiled = torch.compile(lambda x: _grid_sample(x, t.theta, (7, 8)), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), t(x, (7, 8)), rtol=0, atol=1e-5)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert tensors
    assert not any(tensor.is_complex() for tensor in tensors)


def test_a_gradient_in_theta_is_that_of_affine_grid():
    theta = RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 10).sample(3, (9, 12)).theta.double()
    x = torch.rand(3, 2, 9, 12, dtype=torch.float64)

    def by_affine_grid(theta):
        grid = F.affine_grid(theta, [3, 2, 7, 8], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    theta.requires_grad_()
    results = [SpatialTransform(theta)(x, (7, 8)), by_affine_grid(theta)]
    torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), theta) for result in results))
