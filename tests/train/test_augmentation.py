"""Augmentation of batches on a device is that of single images on the host."""

import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ms_optim.train.augmentation import (
    DeviceAugmentation,
    Normalisation,
    RandomCrop,
    RandomCutout,
    crop_batch,
    crop_image,
    cut_batch,
    cut_image,
    flip_batch,
)
from ms_optim.train.images import to_bytes

side = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def pictures(seed, count, channels, height, width):
    shape = (count, channels, height, width)
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, size=shape, dtype=np.uint8))


def pil(image):
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def below(bound, count):
    return torch.tensor([random.randrange(bound) for _ in range(count)])


@hypothesis.given(seed=seeds, channels=st.sampled_from([1, 3]), height=side, width=side, padding=st.integers(0, 5))
def test_cropping_a_batch_is_cropping_each_image(seed, channels, height, width, padding):
    x = pictures(seed, 5, channels, height, width)
    top, left = below(2 * padding + 1, 5), below(2 * padding + 1, 5)
    found = crop_batch(x, padding, top, left)
    rows = zip(x, top.tolist(), left.tolist(), strict=True)
    expected = torch.stack([to_bytes(crop_image(pil(image), padding, t, ell)) for image, t, ell in rows])
    assert torch.equal(found, expected)
    assert torch.equal(crop_batch(x.float(), padding, top, left), expected.float())


def test_a_crop_shifts_the_image_and_brings_in_zeros():
    x = pictures(0, 1, 3, 6, 6)
    found = crop_batch(x, 2, torch.tensor([0]), torch.tensor([3]))
    assert torch.equal(found[0, :, 2:, :5], x[0, :, :4, 1:])
    assert found[0, :, :2].sum() == found[0, :, :, 5:].sum() == 0
    assert torch.equal(crop_batch(x, 2, torch.tensor([2]), torch.tensor([2])), x)


@hypothesis.given(seed=seeds, channels=st.sampled_from([1, 3]), height=side, width=side)
def test_mirroring_a_batch_is_mirroring_each_image(seed, channels, height, width):
    x = pictures(seed, 5, channels, height, width)
    flip = below(2, 5).bool()
    for dim, mirror in ((-1, ImageOps.mirror), (-2, ImageOps.flip)):
        rows = zip(x, flip.tolist(), strict=True)
        expected = torch.stack([to_bytes(mirror(pil(image)) if turned else pil(image)) for image, turned in rows])
        assert torch.equal(flip_batch(x, flip, dim), expected)


@hypothesis.given(seed=seeds, channels=st.sampled_from([1, 3]), height=side, width=side, square=st.integers(1, 12))
def test_cutting_a_batch_is_cutting_each_image(seed, channels, height, width, square):
    x = pictures(seed, 5, channels, height, width).float()
    row, column = below(height, 5), below(width, 5)
    rows = zip(x, row.tolist(), column.tolist(), strict=True)
    expected = torch.stack([cut_image(image, square, r, c) for image, r, c in rows])
    assert torch.equal(cut_batch(x, square, row, column), expected)


@pytest.mark.parametrize("square", [1, 4, 5])
def test_cutout_is_a_whole_square_inside_and_a_part_of_it_at_the_border(square):
    x = torch.ones(1, 3, 11, 11)
    inside = cut_image(x[0], square, 5, 5)
    assert (inside[0] == 0).sum() == square**2
    corner = cut_image(x[0], square, 0, 0)
    assert (corner[0] == 0).sum() == (square - square // 2) ** 2
    assert x.min() == 1  # left as it is


def test_normalisation_gives_mean_zero_and_deviation_one_of_what_it_was_told():
    x = pictures(1, 50, 3, 8, 8)
    scaled = x.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    found = Normalisation(mean.tolist(), std.tolist(), torch.device("cpu"))(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float32), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float32))


def test_random_steps_of_single_images_take_every_offset():
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    crops = {tuple(to_bytes(RandomCrop(1)(pil(x))).flatten().tolist()) for _ in range(300)}
    assert len(crops) == 9
    cuts = {tuple(RandomCutout(1)(x.float()).flatten().tolist()) for _ in range(300)}
    assert len(cuts) == 9


def test_random_steps_of_batches_take_every_offset_equally():
    count = 9000
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(count, 1, 3, 3)
    augmentation = DeviceAugmentation(0, 0, torch.device("cpu"), padding=1, hflip=0.25, cutout=1)
    cropped, frequency = augmentation.bytes(x).unique(dim=0, return_counts=True)
    # Nine shifts, each as it is and mirrored; the counts are binomial, six deviations of 1/27 to either side.
    assert len(cropped) == 18
    for kept, expected in ((frequency.max(), 0.75 / 9), (frequency.min(), 0.25 / 9)):
        assert abs(kept / count - expected) < 6 * (expected / count) ** 0.5
    cut, frequency = augmentation.numbers(x.float()).unique(dim=0, return_counts=True)
    assert len(cut) == 9
    assert (frequency / count - 1 / 9).abs().max() < 6 * (1 / 9 / count) ** 0.5


def test_device_augmentation_follows_seed_epoch_and_rank_and_leaves_the_global_streams_alone():
    from timm.data.random_erasing import RandomErasing

    x = pictures(0, 8, 3, 12, 12)

    def augmented(seed, rank, epoch):
        erasing = RandomErasing(1.0, mode="pixel", device="cpu")
        found = DeviceAugmentation(seed, rank, x.device, padding=2, hflip=0.5, vflip=0.5, cutout=4, erasing=erasing)
        found.numbers(found.bytes(x).float())
        found.begin(epoch)
        return torch.stack([found.numbers(found.bytes(x).float()) for _ in range(2)])

    random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), float(torch.rand(()))
    random.seed(0)
    torch.manual_seed(0)
    found = [augmented(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))]
    assert (random.random(), float(torch.rand(()))) == expected
    assert torch.equal(found[0], found[-1])
    assert all(not torch.equal(found[0], other) for other in found[1:-1])
    assert not torch.equal(found[0][0], found[0][1])
