"""Laws of ContrastiveTransforms: image, view and map belong together, through a real DataLoader too."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import generator, laws, noise, seeds, sizes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import CenterCrop, ColorJitter, Compose, Normalize, RandomCrop, Resize, ToTensor

from cgc_reg import ContrastiveTransforms, RandomAffine, RandomResizedCropFlip, SpatialTransform

RNG_OF_WORKERS = pytest.mark.filterwarnings(
    # A machine with one core suggests fewer workers; Python 3.12 warns of fork beside torch's idle threads.
    "ignore:This DataLoader will create",
    "ignore:This process .* is multi-threaded",
)

samplers = st.sampled_from([RandomResizedCropFlip(), RandomAffine(30, (0.2, 0.1), (0.5, 1.5), 10)])
normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def pixels(seed, size):
    """A photograph's numbers: uint8 (3, h, w)."""
    return torch.randint(256, (3, *size), generator=generator(seed), dtype=torch.uint8)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def apply(theta, image, size=None):
    """The T of one sample, applied to its image."""
    return SpatialTransform(theta[None])(image[None], size)[0]


class Repeated(Dataset):
    """One image again and again, so that whatever differs was drawn."""

    def __init__(self, count, transform, image):
        self.count, self.transform, self.image = count, transform, image

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return *self.transform(self.image), index


def load(workers, transform=None, count=10, image=None):
    """Every batch of one pass over a small data set: image, view, theta, index."""
    if image is None:
        image = as_pil(pixels(0, (10, 14)))
    data = Repeated(count, ContrastiveTransforms() if transform is None else transform, image)
    context = "fork" if workers else None  # spawned workers would import torch again, for seconds
    return list(DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context))


# One sample


@laws
@given(samplers, seeds, sizes(2, 20))
def test_the_map_turns_the_image_into_the_view(sampler, seed, size):
    torch.manual_seed(seed)
    image, view, theta = ContrastiveTransforms(transform=sampler)(noise(seed, 3, *size, dtype=torch.float32))
    assert (theta.shape, theta.dtype) == ((2, 3), torch.float32)
    assert torch.equal(apply(theta, image), view)


@laws
@given(seeds, sizes(1, 20))
def test_bytes_become_shares_of_one_whatever_holds_them(seed, size):
    raw = pixels(seed, size)
    expected = raw.float() / 255
    for held in (raw, as_pil(raw), tv_tensors.Image(raw), tv_tensors.Image(expected), expected, expected.double()):
        image, view, theta = ContrastiveTransforms()(held)
        assert type(image) is type(view) is type(theta) is Tensor
        assert image.dtype == view.dtype == theta.dtype == torch.float32
        # uint8 / 255 in float32 is one rounding; going through float64 changes nothing.
        torch.testing.assert_close(image, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3)])
def test_pil_images_are_grey_or_have_three_colours(mode, channels):
    image, view, _ = ContrastiveTransforms()(Image.new(mode, (7, 5)))
    assert image.shape == view.shape == (channels, 5, 7)


@laws
@given(samplers, seeds, sizes(2, 20), sizes(1, 20))
def test_a_view_has_the_size_asked_for(sampler, seed, size, view_size):
    torch.manual_seed(seed)
    transforms = ContrastiveTransforms(transform=sampler, view_size=view_size)
    image, view, theta = transforms(noise(seed, 3, *size, dtype=torch.float32))
    assert (image.shape, view.shape) == ((3, *size), (3, *view_size))
    assert torch.equal(apply(theta, image, view_size), view)


@laws
@given(seeds, sizes(8, 20))
def test_the_map_is_relative_to_the_final_image(seed, size):
    raw = noise(seed, 3, *size, dtype=torch.float32)
    for last in (ToTensor(), lambda image: image):  # a PIL image may be the final one
        before = [Resize(12), RandomCrop((6, 9)), last]
        torch.manual_seed(seed)
        image, view, theta = ContrastiveTransforms(Compose(before))(as_pil((raw * 255).byte()))
        assert image.shape == view.shape == (3, 6, 9)
        assert torch.equal(apply(theta, image), view)


@laws
@given(seeds, sizes(4, 20))
def test_the_box_is_drawn_in_the_final_images_pixels(seed, size):
    torch.manual_seed(seed)
    _, _, theta = ContrastiveTransforms(CenterCrop((6, 10)))(pixels(seed, size))
    # A side of h whole pixels out of H is the share h / H of it.
    shares = theta[[1, 0], [1, 0]].abs() * torch.tensor([6.0, 10.0])
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-5)


@laws
@given(seeds, sizes(2, 20))
def test_the_value_transform_changes_image_and_view_after_the_map(seed, size):
    raw = noise(seed, 3, *size, dtype=torch.float32)
    torch.manual_seed(seed)
    image, view, theta = ContrastiveTransforms(value_transform=normalize)(raw)
    torch.manual_seed(seed)
    plain_image, plain_view, plain_theta = ContrastiveTransforms()(raw)
    assert torch.equal(theta, plain_theta)
    assert torch.equal(image, normalize(plain_image))
    assert torch.equal(view, normalize(plain_view))
    assert torch.equal(normalize(apply(theta, raw)), view)


def test_a_random_value_transform_treats_image_and_view_each_alone():
    grey = torch.full((3, 8, 8), 0.5)
    torch.manual_seed(0)
    image, view, _ = ContrastiveTransforms(value_transform=ColorJitter(brightness=0.9))(grey)
    # A constant image looks the same after every map, so only the brightness can differ.
    assert (image[0, 0, 0] - view[0, 0, 0]).abs() > 1e-3


def test_the_data_sets_image_is_left_alone():
    raw = noise(0, 3, 8, 8, dtype=torch.float32)
    before = raw.clone()
    ContrastiveTransforms(value_transform=normalize)(raw)
    assert torch.equal(raw, before)


def test_any_sampler_will_do():
    class Mirror:
        def sample(self, batch_size, image_size, *, device=None, generator=None):
            return SpatialTransform(torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]).repeat(batch_size, 1, 1))

    image, view, _ = ContrastiveTransforms(transform=Mirror())(noise(0, 3, 5, 7, dtype=torch.float32))
    torch.testing.assert_close(view, image.flip(-1), rtol=0, atol=1e-5)


@laws
@given(seeds)
def test_one_seed_draws_one_sample(seed):
    raw = noise(seed, 3, 9, 7, dtype=torch.float32)
    draws = []
    for _ in range(2):
        torch.manual_seed(seed)
        draws.append(ContrastiveTransforms()(raw)[2])
    assert torch.equal(*draws)


def test_pickles_for_workers_that_are_spawned():
    transforms = ContrastiveTransforms(CenterCrop(8), value_transform=normalize, view_size=(4, 4))
    copy = pickle.loads(pickle.dumps(transforms))
    draws = []
    for each in (transforms, copy):
        torch.manual_seed(0)
        draws.append(each(pixels(0, (9, 9))))
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


# Through a DataLoader


@RNG_OF_WORKERS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("view_size", [None, (6, 5)])
def test_default_collation_stacks_batches_whose_maps_give_the_views(workers, view_size):
    transforms = ContrastiveTransforms(view_size=view_size)
    for image, view, theta, _ in load(workers, transforms):
        n = len(image)
        assert (image.shape, theta.shape) == ((n, 3, 10, 14), (n, 2, 3))
        assert view.shape == (n, 3, *(view_size or (10, 14)))
        # A worker computes one image at a time: rounding of positions on 14 pixels, 1e-5 as in test_transforms.
        torch.testing.assert_close(SpatialTransform(theta)(image, view_size), view, rtol=0, atol=1e-5)


@RNG_OF_WORKERS
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_tensors_load_as_those_of_pil_images(workers):
    raw = pixels(0, (10, 14))
    batches = []
    for image in (raw, as_pil(raw)):
        torch.manual_seed(0)
        batches.append(load(workers, image=image))
    for from_tensor, from_pil in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(from_tensor, from_pil, strict=True))


@RNG_OF_WORKERS
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_every_worker_and_pass_draws_its_own_map(workers):
    theta = torch.cat([batch[2] for _ in range(2) for batch in load(workers, image=Image.new("RGB", (160, 120)))])
    assert len(theta.unique(dim=0)) == 20


@RNG_OF_WORKERS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_repeats_with_its_seed(workers):
    passes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passes.append(torch.cat([batch[2] for batch in load(workers)]))
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])


# Errors


@pytest.mark.parametrize("view_size", [7, (), (7, 0), (7.0, 7), "ab"])
def test_a_malformed_view_size_is_refused_at_once(view_size):
    with pytest.raises(ValueError, match=r"`view_size` must be .*two positive integers \(height, width\).*; got "):
        ContrastiveTransforms(view_size=view_size)


@pytest.mark.parametrize("shape", [(8,), (1, 3, 8, 8, 8)])
def test_a_tensor_that_is_not_one_image_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"`image` must be a PIL image, or a tensor \(c, h, w\), .*got a float32 tensor"
    ):
        ContrastiveTransforms()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_whose_range_is_not_used_are_refused(dtype):
    with pytest.raises(TypeError, match="`image` must hold pixels from 0 to the largest of their type"):
        ContrastiveTransforms()(torch.full((3, 8, 8), 255, dtype=dtype))


def test_a_view_of_another_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"`view_size` must be three positive integers .* got \(8, 8\)"):
        ContrastiveTransforms(view_size=(8, 8))(torch.rand(1, 8, 8, 8))


def test_an_array_is_refused():
    with pytest.raises(TypeError, match=r"`image` must be a PIL image or a tensor.*; got a numpy\.ndarray"):
        ContrastiveTransforms()(np.zeros((8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("moving", [CenterCrop(4), Resize((8, 9))])
def test_a_value_transform_that_moves_pixels_is_refused(moving):
    with pytest.raises(
        ValueError, match=r"`value_transform` must not move pixels; got .* Put resizing and cropping into"
    ):
        ContrastiveTransforms(value_transform=moving)(torch.zeros(3, 8, 8))
