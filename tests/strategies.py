"""What hypothesis draws for the spatial tests, and positions worked out the slow way."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cgc_reg import SpatialTransform

# A shared machine can be slow for a moment; that is no finding.
laws = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

seeds = st.integers(0, 2**31 - 1)
batch_sizes = st.integers(1, 4)
wide_dtypes = st.sampled_from([torch.float32, torch.float64])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def sizes(low=1, high=12):
    """(height, width), square or not."""
    return st.tuples(st.integers(low, high), st.integers(low, high))


def spaces(low=1, high=12):
    """Sides along one, two or three axes."""
    return st.integers(1, 3).flatmap(lambda dims: st.tuples(*[st.integers(low, high)] * dims))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def noise(seed, *shape, dtype=torch.float64):
    """Values from 0 to 1 without any smoothness, the hardest case for interpolation."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def uniform(low, high):
    return st.floats(low, high, allow_subnormal=False)


def affine_thetas(shift=0.6, zoom=(0.4, 1.6)):
    """One theta (2, 3), never singular: a rotation, two stretches, a slant, a mirror and a shift.

    Its numbers are float32 ones in a float64 tensor, so that a cast to float32 gives the same map.
    """

    def build(angle, stretch_x, stretch_y, slant, mirror, shift_x, shift_y):
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        stretch = torch.tensor([[-stretch_x if mirror else stretch_x, slant], [0.0, stretch_y]])
        return torch.cat([rotation @ stretch, torch.tensor([[shift_x], [shift_y]])], dim=1).double()

    return st.builds(
        build,
        uniform(-math.pi, math.pi),
        uniform(*zoom),
        uniform(*zoom),
        uniform(-0.5, 0.5),
        st.booleans(),
        uniform(-shift, shift),
        uniform(-shift, shift),
    )


@st.composite
def affine_maps(draw, count=batch_sizes, **limits):
    """A batch of invertible maps in float64."""
    n = draw(count)
    return SpatialTransform(torch.stack([draw(affine_thetas(**limits)) for _ in range(n)]))


@st.composite
def maps_of(draw, dims, n=3, shift=0.6):
    """Maps of so many dimensions in float64, never singular: products of stretches, slants and mirrors, and shifts."""
    lower = torch.eye(dims).repeat(n, 1, 1) + noise(draw(seeds), n, dims, dims).sub(0.5).tril(-1)
    upper = torch.diag_embed(noise(draw(seeds), n, dims) + 0.4) + noise(draw(seeds), n, dims, dims).sub(0.5).triu(1)
    mirror = torch.tensor(draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=dims, max_size=dims)))
    linear = (lower.double() @ upper) * mirror
    return SpatialTransform(torch.cat([linear, shift * noise(draw(seeds), n, dims, 1).mul(2).sub(1)], dim=2))


@st.composite
def boxes(draw, image_size):
    """(top, left, height, width) in whole pixels, inside the image."""
    height, width = draw(st.integers(1, image_size[0])), draw(st.integers(1, image_size[1]))
    return (
        draw(st.integers(0, image_size[0] - height)),
        draw(st.integers(0, image_size[1] - width)),
        height,
        width,
    )


def crop(box_list, flips, image_size, dtype=torch.float64):
    """One map for each box and flip."""
    start, size = torch.tensor(box_list, dtype=dtype).split(2, dim=1)
    return SpatialTransform.from_crop(start, size, horizontal(flips), image_size=image_size)


def horizontal(flips):
    """Flips along the last axis of images alone."""
    return F.pad(torch.as_tensor(flips)[:, None], (1, 0))


@st.composite
def crops(draw, image_size, count=batch_sizes):
    """A batch of cropping and flipping maps in float64."""
    n = draw(count)
    box_list = [draw(boxes(image_size)) for _ in range(n)]
    return crop(box_list, [draw(st.booleans()) for _ in range(n)], image_size)


@cache
def centres(size):
    """The (x, y) of every pixel centre, [-1, 1] from edge to edge: (height, width, 2)."""
    rows = [-1 + (2 * i + 1) / size[0] for i in range(size[0])]
    columns = [-1 + (2 * j + 1) / size[1] for j in range(size[1])]
    return torch.tensor([[[x, y] for x in columns] for y in rows], dtype=torch.float64)


def source_positions(transform, size):
    """Where each output pixel looks, in the input's coordinates: (n, height, width, 2)."""
    theta = transform.theta.double()
    return torch.einsum("nij,hwj->nhwi", theta[:, :, :2], centres(size)) + theta[:, None, None, :, 2]


def away_from_rim(positions, size, margin=0.0):
    """Mark positions that no border pixel had to be repeated for, at least `margin` pixels from there."""
    height, width = size
    x, y = positions.unbind(dim=-1)
    return (x.abs() * width <= width - 1 - 2 * margin) & (y.abs() * height <= height - 1 - 2 * margin)
