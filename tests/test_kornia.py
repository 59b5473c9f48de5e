"""kornia's matrices in pixels mean what they mean to kornia: its views are those of the transforms made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import affine_maps, laws, maps_of, noise, seeds, sizes

from cgc_reg import SpatialTransform

kornia = pytest.importorskip("kornia", reason="needs Python 3.11")
from kornia.augmentation import (  # noqa: E402 - after the question whether it is there
    AugmentationSequential,
    ColorJiggle,
    RandomAffine,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation3D,
    RandomRotation90,
    RandomVerticalFlip,
)


def kornias(x, matrix, size, align_corners):
    return kornia.geometry.transform.warp_affine(x, matrix[:, :2], size, align_corners=align_corners)


@laws
@given(
    seed=seeds,
    size=sizes(2, 12),
    output_size=sizes(2, 12),
    t=affine_maps(zoom=(0.6, 1.4), shift=0.3),
    align_corners=st.booleans(),
)
def test_a_warp_of_a_matrix_is_kornias_where_both_see_the_image(seed, size, output_size, t, align_corners):
    x, matrix = noise(seed, len(t), 2, *size), t.matrix(size, output_size)
    inside = kornias(torch.ones_like(x), matrix, output_size, align_corners) > 1 - 1e-9  # it fills with zeros
    ours = SpatialTransform.from_matrix(matrix, size, output_size)(x, output_size)
    theirs = kornias(x, matrix, output_size, align_corners)
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-9)


volumes = st.tuples(*[st.integers(2, 8)] * 3)


@laws
@given(seed=seeds, size=volumes, output_size=volumes, t=maps_of(3, shift=0.3))
def test_a_warp_of_a_volume_is_kornias_where_both_see_the_volume(seed, size, output_size, t):
    x, matrix = noise(seed, len(t), 2, *size), t.matrix(size, output_size)
    warp = kornia.geometry.transform.warp_affine3d
    ones, theirs = (warp(each, matrix[:, :3], output_size) for each in (torch.ones_like(x), x))
    inside = ones > 1 - 1e-9  # it fills with zeros
    ours = SpatialTransform.from_matrix(matrix, size, output_size)(x, output_size)
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-9)


AUGMENTATIONS = {
    "horizontal flip": RandomHorizontalFlip(),
    "vertical flip": RandomVerticalFlip(),
    "affine": RandomAffine(30, (0.1, 0.2), (0.7, 1.3), 10, p=1.0),
    "affine between corners": RandomAffine(30, (0.1, 0.2), (0.7, 1.3), 10, p=0.5, align_corners=True),
    "quarter turns": RandomRotation90(times=(0, 3), p=1.0),
    "crop": RandomResizedCrop((24, 28), scale=(0.3, 1.0)),
    "crop by edges": RandomResizedCrop((24, 28), scale=(0.3, 1.0), align_corners=False),
    "crop by warping": RandomResizedCrop((24, 28), scale=(0.3, 1.0), cropping_mode="resample"),
    "several": AugmentationSequential(RandomHorizontalFlip(), RandomAffine(30, scale=(0.7, 1.3), p=1.0)),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_transform_of_an_augmentation_makes_its_view(name):
    augmentation, size = AUGMENTATIONS[name], (32, 32) if name == "quarter turns" else (32, 40)
    # Waves of a period of 20 pixels and more, which two interpolations in a row change little.
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    x = torch.stack([(0.3 * rows[:, None] + phase + 0.2 * columns[None]).cos() for phase in range(8)])[:, None]
    view = augmentation(x)
    size_of_view = (view.shape[2], view.shape[3])
    transform = SpatialTransform.from_matrix(augmentation.transform_matrix, size, size_of_view)
    inside = augmentation(torch.ones_like(x), params=augmentation._params) > 1 - 1e-4  # what is not shown it fills
    assert inside.float().mean() > 0.3
    if name == "crop by edges":  # it repeats the box's border, where ours sees the pixels beyond
        inside[:, :, [0, -1], :] = inside[:, :, :, [0, -1]] = False
    # One interpolation of such a wave errs by (0.3^2 + 0.2^2) / 8 = 0.016 at the most, and two by twice that.
    atol = 0.04 if name == "several" else 1e-3
    torch.testing.assert_close(transform(x, size_of_view)[inside], view[inside], rtol=0, atol=atol)


def test_the_transform_of_a_rotation_in_space_makes_its_view():
    augmentation, size = RandomRotation3D((30.0, 30.0, 30.0), p=1.0, align_corners=True), (12, 16, 20)
    axes = (torch.arange(side) * 0.3 for side in size)
    x = sum(torch.meshgrid(*axes, indexing="ij")).cos().expand(4, 1, -1, -1, -1).contiguous()
    view = augmentation(x)
    inside = augmentation(torch.ones_like(x), params=augmentation._params) > 1 - 1e-4
    assert inside.float().mean() > 0.3
    view_of_ours = SpatialTransform.from_matrix(augmentation.transform_matrix, size)(x)
    torch.testing.assert_close(view_of_ours[inside], view[inside], rtol=0, atol=1e-3)


def test_colours_leave_the_matrix_alone():
    augmentation = AugmentationSequential(RandomHorizontalFlip(p=1.0), ColorJiggle(0.2, 0.2, 0.2, 0.1, p=1.0))
    augmentation(torch.rand(2, 3, 8, 8))
    transform = SpatialTransform.from_matrix(augmentation.transform_matrix, (8, 8))
    heatmap = noise(0, 2, 8, 8)
    assert torch.equal(transform(heatmap), heatmap.flip(2))
