"""Laws that hold in one, two and three dimensions alike: signals, images and volumes."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, laws, maps_of, noise, seeds, spaces, uniform

from cgc_reg import Compose, RandomAffine, RandomFlip, RandomResizedCropFlip, SpatialTransform
from cgc_reg.transforms import _gather_linear, _grid_sample

ROUNDING = 1e-10  # of positions on at most some ten pixels, in float64, and of values that change by 1 between two

kinds = pytest.mark.parametrize("channels", [(), (2,)], ids=["heatmaps", "images"])


def centres(size):
    """The coordinates of every pixel's centre, the last axis first: (*size, d)."""
    along = [torch.tensor([-1 + (2 * i + 1) / n for i in range(n)], dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*along, indexing="ij")[::-1], dim=-1)


def sources(transform, size):
    """Where every pixel of the output looks: (n, *size, d)."""
    theta = transform.theta.double()
    looked = torch.einsum("nij,...j->n...i", theta[:, :, :-1], centres(size))
    return looked + theta[:, :, -1].view(-1, *[1] * len(size), len(size))


def interpolated(x, transform, size):
    """Transform (n, *space), one pixel at a time, by the definition of linear interpolation."""
    result = torch.empty(len(x), *size, dtype=x.dtype)
    positions = sources(transform, size)
    for place in itertools.product(range(len(x)), *(range(n) for n in size)):
        sides = x.shape[1:]
        at = [(p + 1) * n / 2 - 0.5 for p, n in zip(positions[place].tolist()[::-1], sides, strict=True)]
        at = [min(max(p, 0), n - 1) for p, n in zip(at, sides, strict=True)]
        value = 0.0
        for corner in itertools.product(*((math.floor(p), math.floor(p) + 1) for p in at)):
            weight = math.prod(1 - abs(p - c) for p, c in zip(at, corner, strict=True))
            if weight > 0:
                value += weight * x[place[0]][corner].item()
        result[place] = value
    return result


@laws
@given(spaces(1, 4), spaces(1, 4), seeds, st.data())
def test_every_pixel_is_interpolated_where_its_map_looks(size, other, seed, data):
    output = (*other, 2, 3)[: len(size)]
    x, transform = noise(seed, 3, *size), data.draw(maps_of(len(size)))
    expected = interpolated(x, transform, output)
    torch.testing.assert_close(transform(x, output), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(transform(x[:, None], output)[:, 0], expected, rtol=0, atol=ROUNDING)


@laws
@given(spaces(), seeds, st.data())
def test_both_ways_to_interpolate_agree_and_so_do_their_gradients(size, seed, data):
    x, transform = noise(seed, 3, 2, *size).requires_grad_(), data.draw(maps_of(len(size)))
    weights = noise(seed + 1, 3, 2, *size)
    results = [way(x, transform.theta, size) for way in (_gather_linear, _grid_sample)]
    torch.testing.assert_close(*results, rtol=0, atol=ROUNDING)
    gradients = [torch.autograd.grad((result * weights).sum(), x)[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=ROUNDING)


@laws
@given(spaces(), seeds, st.data())
def test_flips_and_the_identity_move_heatmaps_bit_for_bit(size, seed, data):
    axes = data.draw(st.sets(st.integers(1, len(size))))
    x = noise(seed, 2, *size, dtype=torch.float32)
    signs = torch.tensor([-1.0 if axis in axes else 1.0 for axis in range(len(size), 0, -1)])
    flip = SpatialTransform(F.pad(torch.diag(signs), (0, 1)).repeat(2, 1, 1))
    assert torch.equal(flip(x), x.flip(sorted(axes)))
    assert torch.equal(SpatialTransform.identity(2, dims=len(size))(x), x)
    assert flip.dims == len(size)


@kinds
@laws
@given(size=spaces(2, 9), seed=seeds, data=st.data())
def test_a_crop_is_a_slice(channels, size, seed, data):
    start = [data.draw(st.integers(0, n - 1)) for n in size]
    extent = [data.draw(st.integers(1, n - s)) for n, s in zip(size, start, strict=True)]
    flips = [data.draw(st.booleans()) for _ in size]
    x = noise(seed, 1, *channels, *size)
    crop = SpatialTransform.from_crop(
        torch.tensor([start]).double(), torch.tensor([extent]), torch.tensor([flips]), image_size=size
    )
    box = x[(..., *(slice(s, s + e) for s, e in zip(start, extent, strict=True)))]
    expected = box.flip([axis - len(size) for axis, on in enumerate(flips) if on])
    torch.testing.assert_close(crop(x, tuple(extent)), expected, rtol=0, atol=1e-5)  # sizes are whole, so float32 here


@laws
@given(st.integers(1, 3), seeds, st.data())
def test_inverse_and_composition_are_those_of_maps(dims, seed, data):
    t, u = data.draw(maps_of(dims)), data.draw(maps_of(dims))
    points = noise(seed, 3, 5, dims)

    def applied(transform, to):
        return torch.einsum("nij,npj->npi", transform.theta[:, :, :-1], to) + transform.theta[:, None, :, -1]

    torch.testing.assert_close(applied(t.inverse(), applied(t, points)), points, rtol=0, atol=1e-9)
    torch.testing.assert_close(applied(t, applied(t.inverse(), points)), points, rtol=0, atol=1e-9)
    # t(u(x)) looks through t first, since maps go from output to input.
    torch.testing.assert_close(applied(t @ u, points), applied(u, applied(t, points)), rtol=0, atol=1e-9)


@laws
@given(spaces(), st.data())
def test_covered_is_what_looks_into_the_input(size, data):
    transform = data.draw(maps_of(len(size)))
    looked = sources(transform, size).abs()
    away = ((looked - 1).abs() > 1e-9).all(dim=-1)  # from the rim, where rounding decides
    assert torch.equal(transform.coverage(size).bool()[away], (looked <= 1).all(dim=-1)[away])


@laws
@given(spaces(1, 300), spaces(), st.data())
def test_matrices_in_pixels_come_in_and_go_out(size, other, data):
    output = (*other, 20, 30)[: len(size)]
    transform = data.draw(maps_of(len(size)))
    matrix = transform.matrix(size, output)
    for given_matrix in (matrix, matrix[:, :-1]):
        back = SpatialTransform.from_matrix(given_matrix, size, output)
        torch.testing.assert_close(back.theta, transform.theta, rtol=1e-9, atol=1e-9)
    # A pixel of the output, in the coordinates of the input and back in pixels of the output.
    units = torch.tensor(size[::-1], dtype=torch.float64)
    looked = (sources(transform, output) + 1) * units / 2 - 0.5
    ones = torch.ones(*looked.shape[:-1], 1, dtype=torch.float64)
    pixels = torch.einsum("nij,n...j->n...i", matrix, torch.cat([looked, ones], dim=-1))[..., :-1]
    along = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in output), indexing="ij")[::-1]
    torch.testing.assert_close(pixels, torch.stack(along, dim=-1).expand_as(pixels), rtol=0, atol=1e-6)


@laws
@given(seeds, st.data())
def test_a_map_of_the_plane_acts_on_every_slice_of_a_volume(seed, data):
    plane = data.draw(maps_of(2))
    theta = F.pad(plane.theta, (0, 0, 0, 1))
    theta = torch.cat([theta[:, :, :2], torch.zeros(3, 3, 1), theta[:, :, 2:]], dim=2)
    theta[:, 2, 2] = 1
    x = noise(seed, 3, 2, 4, 5, 6)
    slices = torch.stack([plane(each) for each in x.unbind(dim=2)], dim=2)
    torch.testing.assert_close(SpatialTransform(theta)(x), slices, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_memory_format_and_type_of_volumes_stay(layout):
    x = torch.rand(2, 3, 4, 5, 6, dtype=torch.bfloat16).contiguous(memory_format=layout)
    result = RandomAffine(10).sample(2, (4, 5, 6), generator=generator(0))(x)
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=layout)


def test_images_of_other_dimensions_are_refused():
    for dims, shape in ((1, (2, 3, 4, 5)), (2, (2, 3)), (3, (2, 3, 4)), (3, (2, 3, 4, 5, 6, 7))):
        with pytest.raises(ValueError, match=rf"for thetas of shape \(n, {dims}, {dims + 1}\); got .* shape \("):
            SpatialTransform.identity(2, dims=dims)(torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"`size` must be three positive integers \(depth, height, width\); got \(2, 2"
    ):
        SpatialTransform.identity(2, dims=3)(torch.zeros(2, 3, 4, 5), size=(2, 2))
    with pytest.raises(ValueError, match=r"as many dimensions; got thetas of shapes \(2, 3, 4\) and \(2, 2, 3\)"):
        SpatialTransform.identity(2, dims=3) @ SpatialTransform.identity(2)
    singular = torch.tensor([[[1.0, 2.0, 3.0, 0.0], [2.0, 4.0, 6.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    with pytest.raises(ValueError, match="can be inverted; got the linear part"):
        SpatialTransform.from_matrix(singular, (4, 4, 4))
    perspective = torch.eye(4)[None].clone()
    perspective[0, 3, 0] = 0.1
    with pytest.raises(ValueError, match=r"must have \(0, 0, 0, 1\) as its last row"):
        SpatialTransform.from_matrix(perspective, (4, 4, 4))


# Samplers


@laws
@given(seeds, st.integers(1, 3), uniform(0.05, 1.0), uniform(1.0, 3.0))
def test_a_box_has_the_share_asked_for_and_its_axes_differ_by_the_ratio(seed, dims, share, ratio):
    size = (400, 200, 300)[:dims]
    sampler = RandomResizedCropFlip(scale=(share, share), ratio=(1 / ratio, ratio))
    _, extents = sampler.sample_boxes(50, size, generator=generator(seed))
    shares = extents.double() / torch.tensor(size)
    rounding = (0.5 / extents).sum(dim=1)
    drawn = dims != 2 or (extents < torch.tensor(size)).all(dim=1)  # and no fall-back, which only images have
    assert ((shares.prod(dim=1) / share).log().abs() <= rounding + 1e-3)[drawn].all()
    longest = (shares if dims != 2 else extents).log()
    spread = longest.max(dim=1).values - longest.min(dim=1).values
    assert (spread <= (1 if dims == 2 else 2) * math.log(ratio) + 2 * rounding + 1e-3)[drawn].all()


def test_boxes_that_are_nearly_the_volume_are_not_all_of_it():
    _, extents = RandomResizedCropFlip(scale=(0.8, 0.9)).sample_boxes(1000, (32, 224, 224), generator=generator(0))
    assert (extents.prod(dim=1) < 0.92 * 32 * 224 * 224).all()
    assert (extents[:, 1] != extents[:, 2]).double().mean() > 0.9


def test_boxes_of_thin_volumes_hold_a_pixel_of_each_axis():
    starts, extents = RandomResizedCropFlip(scale=(0.0, 0.1)).sample_boxes(1000, (1, 2, 40), generator=generator(0))
    assert (extents >= 1).all()
    assert (starts + extents <= torch.tensor([1, 2, 40])).all()


@pytest.mark.parametrize("size", [(16,), (8, 16), (4, 8, 16)], ids=str)
def test_a_flip_is_along_the_last_axis_or_by_axis(size):
    def flipped(**options):
        theta = RandomResizedCropFlip(scale=(1.0, 1.0), **options).sample(4, size, generator=generator(0)).theta
        return (theta.diagonal(dim1=1, dim2=2) < 0).flip(1).all(dim=0).tolist()  # by axis

    assert flipped(flip_p=1.0) == [*[False] * (len(size) - 1), True]
    assert flipped(flip_p=(1.0, *[0.0] * (len(size) - 1))) == [True, *[False] * (len(size) - 1)]
    flip = RandomFlip(horizontal=0.0, vertical=1.0, depth=0.0).sample(2, size, generator=generator(0))
    x = noise(0, 2, *size)
    assert torch.equal(flip(x), x.flip(-2) if len(size) > 1 else x)


@pytest.mark.parametrize("about", [0, 1, 2], ids=["x", "y", "z"])
def test_a_quarter_turn_of_a_cube_is_that_of_its_planes(about):
    degrees = tuple((90.0, 90.0) if axis == about else (0.0, 0.0) for axis in range(3))
    x = noise(0, 1, 4, 4, 4)
    turned = RandomAffine(degrees).sample(1, (4, 4, 4))(x)
    # x to y about z, y to z about x, z to x about y; the axes of x, y, z are the third, the second and the first.
    planes = {0: (2, 1), 1: (1, 3), 2: (3, 2)}[about]
    torch.testing.assert_close(turned, x.rot90(1, planes), rtol=0, atol=1e-5)


def test_a_turn_about_z_is_one_of_images_in_every_slice():
    x = noise(0, 1, 3, 8, 8, dtype=torch.float32)
    turned = RandomAffine(((0, 0), (0, 0), (25, 25))).sample(1, (3, 8, 8))(x)
    slices = RandomAffine((25, 25)).sample(1, (8, 8))(x[0][:, None].transpose(0, 1))
    torch.testing.assert_close(turned, slices, rtol=0, atol=1e-5)


@laws
@given(spaces(1, 300).filter(lambda size: len(size) > 1), seeds, st.data())
def test_a_rotation_is_one_in_space(size, seed, data):
    spacing = tuple(data.draw(uniform(0.2, 5.0)) for _ in size)
    theta = RandomAffine(180, spacing=spacing).sample(3, size, generator=generator(seed)).theta.double()
    unit = torch.tensor([n * s for n, s in zip(size, spacing, strict=True)], dtype=torch.float64).flip(0)
    rotation = theta[:, :, :-1] * unit[:, None] / unit
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(len(size)).double().expand(3, -1, -1), rtol=0, atol=1e-4
    )
    assert (torch.linalg.det(rotation) > 0).all()


def test_numbers_of_numpy_are_numbers():
    spacing = np.float32([2.5, 0.7, 0.7])  # as a file of a scan gives it
    theirs = RandomAffine(30, spacing=tuple(spacing)).sample(2, (4, 8, 8), generator=generator(0))
    ours = RandomAffine(30, spacing=tuple(map(float, spacing))).sample(2, (4, 8, 8), generator=generator(0))
    torch.testing.assert_close(theirs.theta, ours.theta, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda: RandomAffine(10).sample(1, (8,)), r"`degrees` must be 0 for signals, .* got 10"),
        (lambda: RandomAffine(((0, 1),) * 3).sample(1, (8, 8)), r"`degrees` must be one range, but for volumes"),
        (lambda: RandomAffine(0, shear=5).sample(1, (8, 8, 8)), r"`shear` must be None, but for images; got 5"),
        (lambda: RandomAffine(0, translate=(0.1, 0.1)).sample(1, (8, 8, 8)), r"`translate` must be as long as .*, 3"),
        (lambda: RandomAffine(0, spacing=(1.0, 1.0)).sample(1, (8, 8, 8)), r"`spacing` must be as long as .*, 3"),
        (lambda: RandomAffine(0, spacing=("1", 1.0)), r"`spacing` must be a positive number for each axis"),
        (lambda: RandomAffine(0, spacing=(1.0, 0.0)), r"`spacing` must be a positive number for each axis"),
        (lambda: RandomResizedCropFlip(flip_p=(0.5, 0.5)).sample(1, (8, 8, 8)), r"one for each of the 3 axes; got"),
        (lambda: RandomResizedCropFlip(flip_p=(0.5,)).sample(1, (8, 8)), r"one for each of the 2 axes; got \(0.5,\)"),
        (lambda: RandomFlip(depth=2.0), r"`depth` must be a probability"),
        (lambda: RandomFlip().sample(1, (8, 8, 8, 8)), r"`image_size` must be one positive .* three .* got"),
    ],
)
def test_options_that_do_not_go_with_the_dimensions_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        sample()


@pytest.mark.parametrize("size", [(30,), (8, 20, 12)], ids=str)
def test_composed_maps_of_any_dimensions_are_sampled(size):
    samplers = [RandomResizedCropFlip(), RandomAffine(0, translate=(0.1,) * len(size), scale=(0.8, 1.2)), RandomFlip()]
    composed = Compose(samplers).sample(5, size, generator=generator(0))
    assert composed.theta.shape == (5, len(size), len(size) + 1)
    assert composed(torch.rand(5, 2, *size)).shape == (5, 2, *size)
