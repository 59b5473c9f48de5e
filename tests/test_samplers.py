"""Laws of the samplers: what they draw, how often, and that it is what torchvision's transforms of these names do."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from strategies import batch_sizes, dtypes, generator, laws, noise, seeds, sizes, spaces, uniform, wide_dtypes
from torchvision.transforms import RandomAffine as TorchvisionRandomAffine
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, affine

from cgc_reg import Compose, RandomAffine, RandomFlip, RandomQuarterTurn, RandomResizedCropFlip, SpatialTransform

SAMPLERS = [
    RandomResizedCropFlip(),
    RandomResizedCropFlip(scale=(0.5, 0.9), ratio=(0.2, 5.0), flip_p=0.1),
    RandomAffine(0),
    RandomAffine(30, translate=(0.2, 0.1), scale=(0.5, 1.5), shear=(-10, 10, -5, 5)),
    RandomFlip(),
    Compose([RandomResizedCropFlip(), RandomAffine(10)]),
]
OF_SQUARES = [RandomQuarterTurn(), Compose([RandomFlip(), RandomQuarterTurn(p=1.0), RandomAffine(10)])]
samplers_and_sizes = st.one_of(
    st.tuples(st.sampled_from(SAMPLERS), sizes(4, 300)),
    st.tuples(st.sampled_from(OF_SQUARES), st.integers(4, 300).map(lambda side: (side, side))),
)


def ranges(low, high):
    """(minimum, maximum), also with both the same."""
    return st.tuples(uniform(low, high), uniform(low, high)).map(lambda pair: tuple(sorted(pair)))


crop_samplers = st.builds(
    RandomResizedCropFlip, scale=ranges(0.01, 1.0), ratio=ranges(0.1, 10.0), flip_p=uniform(0.0, 1.0)
)


def torchvision_boxes(count, image_size, scale, ratio):
    """(4, count): top, left, height, width, one box at a time."""
    image = torch.empty(1, *image_size)
    draws = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    return torch.tensor(draws).T.double()


def is_flipped(transform):
    return transform.theta[:, 0, 0] < 0


# All samplers


@laws
@given(samplers_and_sizes, seeds, batch_sizes)
def test_a_sample_has_one_float32_map_per_image(sampler_and_size, seed, n):
    sampler, image_size = sampler_and_size
    t = sampler.sample(n, image_size, generator=generator(seed))
    assert (t.theta.shape, t.theta.dtype, t.theta.device) == ((n, 2, 3), torch.float32, torch.device("cpu"))
    assert torch.isfinite(t.theta).all()


@laws
@given(samplers_and_sizes, seeds, batch_sizes)
def test_one_seed_draws_one_transform_whatever_the_source_of_randomness(sampler_and_size, seed, n):
    sampler, image_size = sampler_and_size
    first = sampler.sample(n, image_size, generator=generator(seed))
    assert torch.equal(first.theta, sampler.sample(n, image_size, generator=generator(seed)).theta)
    torch.manual_seed(seed)
    assert torch.equal(first.theta, sampler.sample(n, image_size).theta)


@laws
@given(samplers_and_sizes, seeds, batch_sizes)
def test_a_generator_moves_on_and_the_global_one_stays(sampler_and_size, seed, n):
    sampler, image_size = sampler_and_size
    source, before = generator(seed), torch.get_rng_state()
    sampler.sample(n, image_size, generator=source)
    assert not torch.equal(source.get_state(), generator(seed).get_state())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[3]], ids=repr)
def test_images_of_a_batch_get_different_maps(sampler):
    theta = sampler.sample(64, (224, 160), generator=generator(0)).theta
    assert len(theta.unique(dim=0)) == 64


@laws
@given(samplers_and_sizes, batch_sizes, st.booleans())
def test_samples_without_data_and_moves_to_the_device_asked_for(sampler_and_size, n, seeded):
    sampler, image_size = sampler_and_size
    source = generator(0) if seeded else None
    t = sampler.sample(n, image_size, device="meta", generator=source)
    assert t.theta.is_meta
    assert t.theta.shape == (n, 2, 3)


@pytest.mark.parametrize("sampler", SAMPLERS + OF_SQUARES, ids=repr)
def test_an_empty_batch_gets_no_maps(sampler):
    assert len(sampler.sample(0, (8, 8))) == 0


# RandomResizedCropFlip: the boxes


@laws
@given(crop_samplers, seeds, st.integers(1, 50), spaces(1, 300))
def test_boxes_are_whole_pixels_inside_the_image(sampler, seed, n, image_size):
    start, size = sampler.sample_boxes(n, image_size, generator=generator(seed))
    for value in (start, size):
        assert (value.shape, value.dtype) == ((n, len(image_size)), torch.float32)
        assert torch.equal(value, value.round())
    assert (start >= 0).all()
    assert (size >= 1).all()
    assert (start + size <= torch.tensor(image_size)).all()


@laws
@given(seeds, sizes(4, 300), uniform(0.01, 1.0), uniform(0.1, 10.0))
def test_a_box_of_one_area_and_one_ratio_has_torchvisions_height_and_width(seed, image_size, scale, ratio):
    area = scale * image_size[0] * image_size[1]
    sides = [math.sqrt(area / ratio), math.sqrt(area * ratio)]
    # A side of about n and a half pixels is rounded up or down by the last digit of float32.
    assume(all(abs(side % 1 - 0.5) > 1e-3 for side in sides))
    fallback = [image_size[1] / ratio, image_size[0] * ratio]
    assume(all(abs(side % 1 - 0.5) > 1e-3 and side > 0.5 for side in fallback))
    torch.manual_seed(seed)
    expected = torchvision_boxes(1, image_size, (scale, scale), (ratio, ratio))[2:, 0].tolist()
    sampler = RandomResizedCropFlip(scale=(scale, scale), ratio=(ratio, ratio))
    _, size = sampler.sample_boxes(3, image_size, generator=generator(seed))
    assert size.tolist() == [expected] * 3


@laws
@given(sizes(4, 300), ranges(0.2, 5.0))
def test_the_fall_back_is_torchvisions(image_size, ratio):
    # A box as large as the image fits if its sides round to the image's at the most: then it is no fall-back.
    height, width = image_size
    fitting = [height * width / (height + 0.5) ** 2, (width + 0.5) ** 2 / (height * width)]
    assume(ratio[0] > 1.001 * fitting[1] or ratio[1] < 0.999 * fitting[0])
    fallback = [image_size[1] / ratio[0], image_size[0] * ratio[1]]
    assume(all(abs(side % 1 - 0.5) > 1e-3 and side > 0.5 for side in fallback))
    expected = torchvision_boxes(1, image_size, (1.0, 1.0), ratio)[:, 0].tolist()
    boxes = RandomResizedCropFlip(scale=(1.0, 1.0), ratio=ratio).sample_boxes(3, image_size)
    assert torch.cat(boxes, dim=1).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("image_size", "scale", "ratio"),
    [
        ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((90, 160), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((30, 200), (0.08, 1.0), (3 / 4, 4 / 3)),  # nearly always the fall-back
        ((200, 60), (0.2, 0.9), (1 / 2, 2)),  # about half the time
        ((64, 64), (0.5, 1.0), (1 / 4, 4)),
        ((8, 8), (0.002, 0.02), (1 / 4, 4)),  # sides that round to 0 are drawn again
    ],
)
def test_boxes_are_distributed_as_torchvisions(image_size, scale, ratio):
    torch.manual_seed(0)
    theirs = torchvision_boxes(3000, image_size, scale, ratio)
    sampler = RandomResizedCropFlip(scale=scale, ratio=ratio)
    ours = torch.cat(sampler.sample_boxes(20000, image_size, generator=generator(1)), dim=1).double().T
    # Beyond the four numbers, what couples them.
    for statistic in (
        lambda top, left, height, width: top,
        lambda top, left, height, width: left,
        lambda top, left, height, width: height,
        lambda top, left, height, width: width,
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top / (image_size[0] - height + 1),
        lambda top, left, height, width: left / (image_size[1] - width + 1),
        lambda top, left, height, width: top + left,
    ):
        # 54 comparisons: one of them falls below 1e-4 by chance for one seed in 185, and the seeds are fixed.
        assert stats.ks_2samp(statistic(*ours), statistic(*theirs)).pvalue > 1e-4


def test_a_box_is_tried_ten_times():
    # On 40 rows and 400 columns a box fits if its height rounds to at most 40, that is area / ratio <= 40.5^2. With
    # ln(area / 40.5^2) at 0.8 of ln(4/3), one draw of ln(ratio) from [-ln(4/3), ln(4/3)] in ten is large enough.
    area = 40.5**2 * (4 / 3) ** 0.8
    share = area / (40 * 400)
    sampler = RandomResizedCropFlip(scale=(share, share))
    (top, left), (height, width) = (v.T for v in sampler.sample_boxes(100_000, (40, 400), generator=generator(0)))
    fallback = (height == 40) & (width == 53) & (top == 0) & (left == (400 - 53) // 2)
    # 5 standard deviations are 0.0075; a drawn box is the fall-back's by chance in less than 1 of 348 of the rest,
    # 0.002. Nine tries would give 0.039 more.
    assert fallback.double().mean().item() == pytest.approx(0.9**10, abs=0.01)


@laws
@given(seeds, spaces(4, 300))
def test_a_sample_cuts_out_the_boxes_drawn(seed, image_size):
    sampler = RandomResizedCropFlip(flip_p=0.0)
    box = sampler.sample_boxes(5, image_size, generator=generator(seed))
    expected = SpatialTransform.from_crop(*box, image_size=image_size)
    assert torch.equal(sampler.sample(5, image_size, generator=generator(seed)).theta, expected.theta)


@pytest.mark.parametrize("flip_p", [0.0, 0.2, 0.5, 1.0])
def test_a_flip_is_as_frequent_as_asked(flip_p):
    flipped = is_flipped(RandomResizedCropFlip(flip_p=flip_p).sample(10_000, (32, 48), generator=generator(0)))
    # Below 1e-4 by chance for one seed in 10,000; with 0 and 1 any exception gives a p-value of 0.
    assert stats.binomtest(int(flipped.sum()), 10_000, flip_p).pvalue > 1e-4


def test_a_flip_does_not_depend_on_the_box():
    theta = RandomResizedCropFlip().sample(10_000, (64, 48), generator=generator(0)).theta
    flipped = theta[:, 0, 0] < 0
    for value in (theta[:, 0, 0].abs(), theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2]):
        assert stats.ks_2samp(value[flipped], value[~flipped]).pvalue > 1e-4


@laws
@given(seeds, sizes(1, 300), uniform(0.1, 1.0))
def test_a_flip_mirrors_the_box_and_leaves_its_place(seed, image_size, scale):
    plain, mirrored = (
        RandomResizedCropFlip(scale=(scale, 1.0), flip_p=p).sample(5, image_size, generator=generator(seed)).theta
        for p in (0.0, 1.0)
    )
    sign = torch.tensor([[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert torch.equal(mirrored, plain * sign)


# RandomAffine


def in_pixels(transform, image_size):
    """Return the map from input to output in pixels from the centre: linear part (n, 2, 2), shift (n, 2)."""
    theta = transform.inverse().theta.double()
    half = torch.tensor([image_size[1] / 2, image_size[0] / 2], dtype=torch.float64)
    return theta[:, :, :2] * half[:, None] / half, theta[:, :, 2] * half


@laws
@given(batch_sizes, sizes(1, 300))
def test_an_affine_without_arguments_is_the_identity(n, image_size):
    assert torch.equal(RandomAffine(0).sample(n, image_size).theta, SpatialTransform.identity(n).theta)


@laws
@given(
    seed=seeds,
    size=sizes(4, 32),
    angle=uniform(-180, 180),
    zoom=uniform(0.5, 2),
    shear=st.tuples(uniform(-40, 40), uniform(-40, 40)),
    translate=st.tuples(uniform(0, 0.4), uniform(0, 0.4)),
)
def test_equals_torchvisions_affine_where_both_see_the_image(seed, size, angle, zoom, shear, translate):
    shears = (shear[0], shear[0], shear[1], shear[1])
    t = RandomAffine((angle, angle), translate, (zoom, zoom), shears).sample(1, size, generator=generator(seed))
    # Only the shift is drawn at random, so it is read off what was drawn.
    shift = in_pixels(SpatialTransform(t.theta.double()), size)[1][0].tolist()

    def torchvisions(image):
        return affine(image, angle, shift, zoom, list(shear), interpolation=InterpolationMode.BILINEAR)

    x = noise(seed, 1, 2, *size)
    inside = torchvisions(torch.ones_like(x)) > 1 - 1e-6  # it fills with zeros, ours with the border
    # A float32 theta places a pixel among 32 to within about ten roundings of a number up to 2 * 32, the inverse of a
    # sheared and shrunk map: 10 * 64 * 2**-24 is 4e-5, times the slope of noise, at most 1 per pixel along x and y.
    torch.testing.assert_close(t(x)[inside], torchvisions(x)[inside], rtol=0, atol=1e-4)


@laws
@given(seeds, sizes(2, 12), st.sampled_from([1, 2, 3]))
def test_right_angles_turn_an_image_clockwise_in_pixels(seed, size, quarters):
    x = noise(seed, 1, *size)
    degrees = 90.0 * quarters
    t = RandomAffine((degrees, degrees)).sample(1, size)
    turned = torch.rot90(x, -quarters, dims=(1, 2))  # rot90 counts from rows to columns: counter-clockwise
    # Aligned at their centres, an image and a turned one of other proportions share this many rows and columns.
    rows, columns = (min(a, b) for a, b in zip(x.shape[1:], turned.shape[1:], strict=True))
    assume(all((a - b) % 2 == 0 for a, b in zip(x.shape[1:], turned.shape[1:], strict=True)))

    def middle(image):
        top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
        return image[:, top : top + rows, left : left + columns]

    torch.testing.assert_close(middle(t(x)), middle(turned), rtol=0, atol=1e-5)
    covered = torch.zeros(1, *size)
    middle(covered).fill_(1)
    assert torch.equal(t.coverage(size), covered)


@laws
@given(
    seed=seeds,
    size=sizes(4, 300),
    degrees=ranges(-180, 180),
    zoom=ranges(0.5, 2.0),
    translate=st.tuples(uniform(0, 1), uniform(0, 1)),
)
def test_drawn_parameters_lie_in_their_ranges(seed, size, degrees, zoom, translate):
    t = RandomAffine(degrees, translate, zoom).sample(20, size, generator=generator(seed))
    linear, shift = in_pixels(SpatialTransform(t.theta.double()), size)
    # A rotation and a zoom, nothing else, in pixels.
    scale = linear.det().sqrt()
    unit = linear / scale[:, None, None]
    torch.testing.assert_close(unit @ unit.mT, torch.eye(2).double().expand(20, 2, 2), rtol=0, atol=1e-5)
    # Ten or so roundings in float32, relative to 2 or to the image's side.
    assert ((scale >= zoom[0] - 1e-5) & (scale <= zoom[1] + 1e-5)).all()
    limits = torch.tensor([translate[0] * size[1], translate[1] * size[0]])
    assert (shift.abs() <= limits + 1e-5 * max(size)).all()
    middle, half = math.radians(sum(degrees) / 2), math.radians((degrees[1] - degrees[0]) / 2)
    # The angle from the middle of the range: at most 180 degrees, where the sign may turn over by rounding.
    angle = torch.atan2(unit[:, 1, 0], unit[:, 0, 0]) - middle
    angle = torch.atan2(angle.sin(), angle.cos())
    assert (angle.abs() <= half + 1e-5).all()


@pytest.mark.parametrize(
    ("sampler", "parameter", "low", "high"),
    [
        (RandomAffine((-20, 70)), lambda m, b: torch.atan2(m[:, 1, 0], m[:, 0, 0]).rad2deg(), -20, 70),
        (RandomAffine(45), lambda m, b: torch.atan2(m[:, 1, 0], m[:, 0, 0]).rad2deg(), -45, 45),
        (RandomAffine(0, translate=(0.2, 0.1)), lambda m, b: b[:, 0] / 48, -0.2, 0.2),
        (RandomAffine(0, translate=(0.2, 0.1)), lambda m, b: b[:, 1] / 32, -0.1, 0.1),
        (RandomAffine(0, scale=(0.5, 2)), lambda m, b: m[:, 0, 0], 0.5, 2),
        (RandomAffine(0, shear=10), lambda m, b: (-m[:, 0, 1]).atan().rad2deg(), -10, 10),
        (RandomAffine(0, shear=(5, 15)), lambda m, b: (-m[:, 0, 1]).atan().rad2deg(), 5, 15),
        (RandomAffine(0, shear=(0, 0, -5, 20)), lambda m, b: (-m[:, 1, 0]).atan().rad2deg(), -5, 20),
    ],
)
def test_parameters_are_uniform_and_each_image_draws_its_own(sampler, parameter, low, high):
    t = sampler.sample(5000, (32, 48), generator=generator(0))
    drawn = parameter(*in_pixels(SpatialTransform(t.theta.double()), (32, 48)))
    assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-4


def test_parameters_are_drawn_independently():
    t = RandomAffine(20, (0.2, 0.2), (0.8, 1.2)).sample(5000, (32, 48), generator=generator(0))
    linear, shift = in_pixels(SpatialTransform(t.theta.double()), (32, 48))
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    drawn = torch.stack([angle, shift[:, 0], shift[:, 1], linear.det().sqrt()])
    # A correlation of 5000 independent pairs has a standard deviation of 1 / sqrt(5000): five of them.
    off_diagonal = drawn.corrcoef() - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / math.sqrt(5000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"degrees": 10},
        {"degrees": (0, 20), "translate": (0.3, 0.1)},
        {"degrees": 0, "scale": (0.7, 1.1), "shear": 8},
        {"degrees": (-5, 15), "shear": (3, 9)},
        {"degrees": (-5, 15), "translate": (0.0, 0.2), "scale": (1.0, 2.0), "shear": (-3, 9, 0, 4)},
    ],
    ids=repr,
)
def test_arguments_mean_what_they_mean_to_torchvision(arguments):
    # On 4000 pixels a side torchvision's rounding of translations to whole ones is far below what can be told apart.
    theirs = TorchvisionRandomAffine(**arguments)
    torch.manual_seed(0)
    ranges = theirs.degrees, theirs.translate, theirs.scale, theirs.shear
    drawn = [theirs.get_params(*ranges, [4000, 4000]) for _ in range(1000)]
    expected = torch.stack([torchvision_matrix(*parameters) for parameters in drawn])
    t = RandomAffine(**arguments).sample(5000, (4000, 4000), generator=generator(1))
    linear, shift = in_pixels(SpatialTransform(t.theta.double()), (4000, 4000))
    ours = torch.cat([linear.flatten(1), shift], dim=1)
    for entry in range(6):
        # Rounded, so that an entry that never varies is one value for both.
        a, b = ((value[:, entry] * 1000).round() for value in (ours, expected))
        assert stats.ks_2samp(a, b).pvalue > 1e-4


def torchvision_matrix(angle, translate, scale, shear):
    """Entries of the map from input to output, in pixels from the centre, as torchvision's documentation states it."""
    angle, shear_x, shear_y = (math.radians(value) for value in (angle, *shear))
    rotate = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    along_x = torch.tensor([[1.0, -math.tan(shear_x)], [0.0, 1.0]])
    along_y = torch.tensor([[1.0, 0.0], [-math.tan(shear_y), 1.0]])
    linear = scale * (rotate @ along_y @ along_x)
    return torch.cat([linear.flatten(), torch.tensor(translate)]).double()


# RandomFlip and RandomQuarterTurn


def flipped_along(transform):
    """Return for each image the dimensions of a heatmap (h, w) that are reversed."""
    mirrored = transform.theta.diagonal(dim1=1, dim2=2) < 0  # x, y
    return [[dim for dim, on in ((1, x), (0, y)) if on] for x, y in mirrored.tolist()]


def quarter_turns(transform):
    """Return how many quarters each image is turned, as torch.rot90 counts them."""
    return (torch.atan2(transform.theta[:, 1, 0], transform.theta[:, 0, 0]) / (math.pi / 2)).round().long() % 4


def moved(x, transform, sampler):
    """Flip or turn each image by torch.flip or torch.rot90."""
    if isinstance(sampler, RandomFlip):
        dims = flipped_along(transform)
        return torch.stack([one.flip([dim - 2 for dim in on]) for one, on in zip(x, dims, strict=True)])
    turns = quarter_turns(transform).tolist()
    return torch.stack([one.rot90(quarters, dims=(-2, -1)) for one, quarters in zip(x, turns, strict=True)])


flips_and_their_sizes = st.tuples(st.builds(RandomFlip, uniform(0, 1), uniform(0, 1)), sizes())
turns_and_their_sizes = st.tuples(
    st.builds(RandomQuarterTurn, uniform(0, 1)), st.integers(1, 12).map(lambda side: (side, side))
)
moves = st.one_of(flips_and_their_sizes, turns_and_their_sizes)


@laws
@given(moves, seeds, batch_sizes, dtypes)
def test_flips_and_turns_move_the_pixels_of_heatmaps_bit_for_bit(sampler_and_size, seed, n, dtype):
    sampler, size = sampler_and_size
    x = noise(seed, n, *size, dtype=dtype)
    t = sampler.sample(n, size, generator=generator(seed))
    assert torch.equal(t(x), moved(x, t, sampler))
    assert torch.equal(t.coverage(size), torch.ones(n, *size))


@laws
@given(moves, seeds, batch_sizes, wide_dtypes)
def test_flips_and_turns_move_the_pixels_of_images_up_to_rounding(sampler_and_size, seed, n, dtype):
    sampler, size = sampler_and_size
    x = noise(seed, n, 2, *size, dtype=dtype)
    t = sampler.sample(n, size, generator=generator(seed))
    # A position on 12 pixels is off by a few roundings of numbers up to 12, and noise changes by 1 per pixel.
    torch.testing.assert_close(t(x), moved(x, t, sampler), rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sampler", [RandomFlip(), RandomQuarterTurn()], ids=repr)
@pytest.mark.parametrize("side", [1, 2, 8, 64, 256])
def test_images_with_powers_of_two_as_sides_are_moved_bit_for_bit(sampler, side):
    x = noise(0, 16, 2, side, side, dtype=torch.float32)
    t = sampler.sample(16, (side, side), generator=generator(0))
    assert torch.equal(t(x), moved(x, t, sampler))


@pytest.mark.parametrize(("horizontal", "vertical"), [(0.0, 1.0), (0.2, 0.5), (1.0, 0.0), (0.5, 0.9)])
def test_flips_are_as_frequent_as_asked_and_independent(horizontal, vertical):
    t = RandomFlip(horizontal, vertical).sample(10_000, (32, 48), generator=generator(0))
    x, y = (t.theta.diagonal(dim1=1, dim2=2) < 0).T.double()
    # Below 1e-4 by chance for one seed in 10,000; with 0 and 1 any exception gives a p-value of 0.
    for flipped, p in ((x, horizontal), (y, vertical), (x * y, horizontal * vertical)):
        assert stats.binomtest(int(flipped.sum()), 10_000, p).pvalue > 1e-4


@pytest.mark.parametrize("p", [0.0, 0.3, 0.75, 1.0])
def test_turns_are_as_frequent_as_asked_and_each_is_equally_likely(p):
    counts = quarter_turns(RandomQuarterTurn(p).sample(12_000, (8, 8), generator=generator(0))).bincount(minlength=4)
    for quarters, expected in enumerate([1 - p, p / 3, p / 3, p / 3]):
        assert stats.binomtest(int(counts[quarters]), 12_000, expected).pvalue > 1e-4


def test_a_turn_of_what_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"`image_size` must be that of square images .* got \(224, 160\)"):
        RandomQuarterTurn().sample(2, (224, 160))


# Compose

several = st.lists(st.sampled_from([*SAMPLERS, *OF_SQUARES]), min_size=1, max_size=4)


@laws
@given(several, seeds, batch_sizes, st.integers(4, 300))
def test_a_composition_draws_one_after_another_and_applies_the_first_first(samplers, seed, n, side):
    source, by_hand = generator(seed), generator(seed)
    composed = Compose(samplers).sample(n, (side, side), generator=source)
    expected = SpatialTransform.identity(n)
    for sampler in samplers:
        expected = sampler.sample(n, (side, side), generator=by_hand) @ expected
    # The identity adds a product with 0 and with 1 to each number: a rounding or none.
    torch.testing.assert_close(composed.theta, expected.theta)
    assert torch.equal(source.get_state(), by_hand.get_state())


@laws
@given(st.lists(moves.map(lambda pair: pair[0]), min_size=1, max_size=4), seeds, batch_sizes, st.integers(1, 12))
def test_composed_flips_and_turns_equal_one_after_another_bit_for_bit(samplers, seed, n, side):
    x, size = noise(seed, n, side, side), (side, side)
    composed, by_hand = Compose(samplers).sample(n, size, generator=generator(seed)), generator(seed)
    expected = x
    for sampler in samplers:
        expected = moved(expected, sampler.sample(n, size, generator=by_hand), sampler)
    assert torch.equal(composed(x), expected)


def test_a_crop_is_flipped_after_it_is_cut_out():
    x, size = noise(0, 8, 16, 16), (16, 16)
    crop = RandomResizedCropFlip(scale=(0.2, 0.5), flip_p=0.0)
    cut = crop.sample(8, size, generator=generator(0))(x)
    composed = Compose([crop, RandomFlip(horizontal=0.0, vertical=1.0)]).sample(8, size, generator=generator(0))
    torch.testing.assert_close(composed(x), cut.flip(1), rtol=0, atol=1e-5)


def test_flips_and_turns_reach_the_eight_positions_of_a_square_equally_often():
    t = Compose([RandomFlip(), RandomQuarterTurn()]).sample(16_000, (8, 8), generator=generator(0))
    positions, counts = t.theta.round().unique(dim=0, return_counts=True)
    assert len(positions) == 8
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_composition_is_a_value_and_takes_compositions():
    samplers = [RandomFlip(), RandomAffine(10)]
    flat, nested = Compose([*samplers, RandomFlip()]), Compose([Compose(samplers), RandomFlip()])
    drawn = [one.sample(4, (8, 12), generator=generator(0)).theta for one in (flat, nested)]
    torch.testing.assert_close(*drawn)
    composed = Compose(samplers)
    samplers.append(RandomFlip())
    assert composed == Compose((RandomFlip(), RandomAffine(10)))
    assert hash(composed) == hash(Compose((RandomFlip(), RandomAffine(10))))


@pytest.mark.parametrize("sampler", [3, RandomFlip, lambda x: x])
def test_what_draws_nothing_is_refused_by_its_place(sampler):
    with pytest.raises(TypeError, match=r"`samplers\[1\]` must draw transforms with a method `sample`; got "):
        Compose([RandomFlip(), sampler])


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomResizedCropFlip(scale=(1.0, 0.5)), r"`scale` must be \(minimum, maximum\); .* Swap the two"),
        (lambda: RandomResizedCropFlip(scale=(-0.1, 1.0)), r"`scale` must be two numbers .* got \(-0.1, 1.0\)"),
        (lambda: RandomResizedCropFlip(scale=(0.1, 1.5)), r"`scale` must be .* maximum <= 1; got \(0.1, 1.5\)"),
        (lambda: RandomResizedCropFlip(scale=(0, 0)), r"`scale` must allow boxes larger than nothing; got \(0, 0\)"),
        (lambda: RandomResizedCropFlip(scale=0.5), r"`scale` must be two numbers .* got 0.5"),
        (lambda: RandomResizedCropFlip(scale=(0.1, 0.5, 1)), r"`scale` must be two numbers .* got \(0.1, 0.5, 1\)"),
        (lambda: RandomResizedCropFlip(scale=(0.1, math.nan)), r"`scale` must be two numbers .* nan"),
        (lambda: RandomResizedCropFlip(ratio=(2, 1)), r"`ratio` must be \(minimum, maximum\); .* Swap the two"),
        (lambda: RandomResizedCropFlip(ratio=(0, 1)), r"`ratio` must be two positive numbers; got \(0, 1\)"),
        (lambda: RandomResizedCropFlip(ratio=(-1, 1)), r"`ratio` must be two numbers .* got \(-1, 1\)"),
        (lambda: RandomResizedCropFlip(ratio="34"), r"`ratio` must be two numbers .* got '34'"),
        (lambda: RandomResizedCropFlip(ratio=(1, math.inf)), r"`ratio` must be two numbers .* inf"),
        (lambda: RandomResizedCropFlip(flip_p=1.1), r"`flip_p` must be a probability from 0 to 1; got 1.1"),
        (lambda: RandomResizedCropFlip(flip_p=-0.1), r"`flip_p` must be a probability .* got -0.1"),
        (lambda: RandomResizedCropFlip(flip_p=True), r"`flip_p` must be a probability .* got True"),
        (lambda: RandomResizedCropFlip(flip_p=None), r"`flip_p` must be a probability .* got None"),
        (lambda: RandomFlip(horizontal=1.5), r"`horizontal` must be a probability from 0 to 1; got 1.5"),
        (lambda: RandomFlip(vertical=None), r"`vertical` must be a probability from 0 to 1; got None"),
        (lambda: RandomQuarterTurn(p=-0.1), r"`p` must be a probability from 0 to 1; got -0.1"),
        (lambda: Compose([]), r"`samplers` must be a list of at least one sampler; got \[\]"),
        (lambda: Compose(RandomFlip()), r"`samplers` must be a list .* got a cgc_reg.samplers.RandomFlip"),
        (lambda: RandomAffine(degrees=-5), r"`degrees` must not be negative when it is one number; got -5"),
        (lambda: RandomAffine(degrees=(20, 10)), r"`degrees` must be \(minimum, maximum\); .* Swap the two"),
        (
            lambda: RandomAffine(degrees=(1, 2, 3)),
            r"`degrees` must be a number, .* three .* got \(1, 2, 3\)",
        ),
        (lambda: RandomAffine(degrees=((0, 1), (0, 1))), r"`degrees` must be a number, .* three .* got \(\(0, 1\), "),
        (lambda: RandomAffine(degrees="30"), r"`degrees` must be two numbers .* got '30'"),
        (lambda: RandomAffine(0, translate=0.1), r"`translate` must be shares from 0 to 1, .* got 0.1"),
        (lambda: RandomAffine(0, translate=()), r"`translate` must be shares .* got \(\)"),
        (lambda: RandomAffine(0, translate=(0.1, 1.2)), r"`translate` must be shares .* got \(0.1, 1.2\)"),
        (lambda: RandomAffine(0, translate=(-0.1, 0.1)), r"`translate` must be shares .* got \(-0.1, 0.1\)"),
        (lambda: RandomAffine(0, translate=("a", 0.1)), r"`translate` must be shares .* got \('a', 0.1\)"),
        (lambda: RandomAffine(0, scale=(2, 1)), r"`scale` must be \(minimum, maximum\); .* Swap the two"),
        (lambda: RandomAffine(0, scale=(0, 1)), r"`scale` must be two positive numbers; got \(0, 1\)"),
        (lambda: RandomAffine(0, scale=(-1, 1)), r"`scale` must be two numbers .* got \(-1, 1\)"),
        (lambda: RandomAffine(0, scale=1.5), r"`scale` must be two numbers .* got 1.5"),
        (lambda: RandomAffine(0, shear=90), r"`shear` must lie between -90 and 90 degrees; got 90"),
        (lambda: RandomAffine(0, shear=(-90, 0)), r"`shear` must lie between -90 and 90 degrees; got \(-90, 0\)"),
        (lambda: RandomAffine(0, shear=(0, 0, 0, 95)), r"`shear` must lie between -90 and 90 .* got \(0, 0, 0, 95\)"),
        (lambda: RandomAffine(0, shear=(0, 0, 5, -5)), r"`shear` must be \(minimum, maximum\); .* Swap the two"),
        (lambda: RandomAffine(0, shear=(5, -5)), r"`shear` must be \(minimum, maximum\); .* Swap the two"),
        (lambda: RandomAffine(0, shear=(1, 2, 3)), r"`shear` must be two numbers .* got \(1, 2, 3\)"),
        (lambda: RandomAffine(0, shear=-5), r"`shear` must not be negative when it is one number; got -5"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "sampler", [RandomResizedCropFlip(), RandomAffine(10), RandomFlip(), RandomQuarterTurn()], ids=repr
)
@pytest.mark.parametrize("image_size", [224, (), (0, 5), (5, -1), (2.0, 3), (True, 3), (1, 2, 3, 4), None, "ab"])
def test_a_malformed_image_size_is_refused(sampler, image_size):
    with pytest.raises(ValueError, match=r"`image_size` must be .*two positive integers \(height, width\).*; got "):
        sampler.sample(2, image_size)
