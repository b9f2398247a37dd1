"""Noise patches: rectangles against a loop, the noise's values, how many there are, mistakes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter, median_filter

from data.augment.random_numbers import uniform
from data.defects.noise import NoisePatches, background, rectangles
from runtime.errors import UserError
from tests.data.defects.test_cutpaste import raw_images


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 130), (20, 47)])
def test_rectangles_and_noise(height, width):
    images, ids = raw_images(30, height, width), torch.arange(30)
    made, masks = NoisePatches()(images, ids, 2, seed=1)
    noise = uniform((1, 2, 0, ids, 5, 0), height * width).unflatten(1, (height, width)) * 2**24
    for i, u in enumerate(uniform((1, 2, 0, ids, 5), 17).tolist()):
        where = torch.zeros(height, width, dtype=torch.bool)
        for patch in range(math.floor(u[0] * 5)):
            spans = []
            for k, side in enumerate((height, width)):
                low, high = max(1, side // 40), max(1, side // 10 - 1)
                half = low + math.floor(u[1 + 2 * patch + k] * (high - low + 1))
                first = math.floor(u[9 + 2 * patch + k] * (side - 2 * half))  # official: where the whole patch fits
                spans.append(slice(first, first + 2 * half))
            where[spans[0], spans[1]] = True
        assert torch.equal(masks[i], where)
        assert torch.equal(made[i][:, ~where], images[i][:, ~where])
        bits = noise[i].long()
        expected = torch.stack([bits // 65536 % 256, bits // 256 % 256, bits % 256]) * 255 // 256
        assert torch.equal(made[i][:, where].long(), expected[:, where])


def test_values_and_numbers_of_patches():
    images, ids = torch.full((400, 3, 60, 60), 255, dtype=torch.uint8), torch.arange(400)
    made, masks = NoisePatches()(images, ids, 0, seed=0)
    assert torch.equal((made != 255).all(1), masks)  # the noise has no 255, so the masks are exact
    empty = (~masks.flatten(1).any(1)).double().mean()
    assert 0.13 < empty < 0.27  # one in five
    values = made.movedim(1, -1)[masks].double()
    assert values.min() == 0 and values.max() == 254
    assert (values.mean(0) - 127).abs().max() < 1.5 and (values.std(0) - 73.6).abs().max() < 1
    assert values.T.corrcoef().triu(1).abs().max() < 0.02


def test_enlarged_noise_is_that_of_a_larger_image_shrunk():
    images, ids = raw_images(24, 30, 36), torch.arange(24)
    made, masks = NoisePatches(enlarged=4)(images, ids, 0, seed=2)
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)  # shrunk again it is what it was
    noisy, where = NoisePatches()(large, ids, 0, seed=2)
    small = F.interpolate(torch.where(where[:, None], noisy, 0).float(), (30, 36), mode="bilinear", antialias=True)
    share = F.interpolate(where[:, None].float(), (30, 36), mode="bilinear", antialias=True)
    expected = small + (1 - share) * images
    assert (made - expected).abs().max() <= 0.501 and torch.equal(masks, share[:, 0] > 0)
    assert torch.equal((made != images).any(1) & ~masks, torch.zeros_like(masks)) and masks.any()
    inside = made.movedim(1, 3)[share[:, 0] == 1].double()
    assert 90 < inside.mean() < 165 and inside.std() < 35  # the noise of 16 pixels and more, averaged
    assert NoisePatches(enlarged=4)(images[:0], ids[:0], 0, seed=2)[0].shape == (0, 3, 30, 36)


def test_background_is_scipys_median_and_dilation():
    pixels = torch.randint(256, (3, 1, 60, 50)).expand(3, 3, 60, 50).to(torch.uint8).clone()
    pixels[:, :, 10:35, 20:40], pixels[:, :, 40:, :10], pixels[1] = 25, 230, 128
    found = background(pixels).numpy()
    for image in range(3):
        gray = pixels[image].double().mean(0).numpy()
        most = median_filter(((gray < 30) | (gray > 220)).astype(np.uint8), 7, mode="nearest")
        assert (found[image] == (maximum_filter(most, 19, mode="constant") > 0)).all()
    assert found[0].any() and not found[0].all() and not found[1].any()


def test_patches_keep_off_the_background():
    images, ids = torch.full((300, 3, 80, 120), 128, dtype=torch.uint8), torch.arange(300)
    images[:250, :, :, :51], images[250:] = 0, 0  # grown by 9 pixels: the left half; and everywhere
    made, masks = NoisePatches(skip_background=True)(images, ids, 1, seed=3)
    assert not masks[250:].any() and masks[:250].any(2).any(0)[3:-3].all()
    assert not masks[:, :, :49].any() and masks[:, :, 49:].any()  # a centre on 60 reaches 11 to the left
    empty = (~masks[:250].flatten(1).any(1)).double().mean()
    assert 0.12 < empty < 0.28
    assert torch.equal((made != images).any(1) & ~masks, torch.zeros_like(masks))


def test_the_first_rectangle_off_the_background_is_taken():
    images, ids = torch.full((40, 3, 40, 60), 128, dtype=torch.uint8), torch.arange(40)
    images[:, :, :15, :25] = 255
    away = background(images)
    _, masks = NoisePatches(skip_background=True, most=2)(images, ids, 0, seed=7)
    counts = uniform((7, 0, 0, ids, 5), 9)[:, 0]
    numbers = uniform((7, 0, 0, ids, 5, 1), 4 * 2 * 200).unflatten(1, (2, 2, 200, 2))
    for i in range(40):
        where = torch.zeros(40, 60, dtype=torch.bool)
        for patch in range(math.floor(counts[i] * 3)):
            for half, place in zip(*numbers[i, :, patch]):
                (top, bottom), (left, right) = rectangles(half, place, (40, 60)).tolist()
                if not away[i, (top + bottom) // 2, (left + right) // 2]:
                    where[top:bottom, left:right] = True
                    break
        assert torch.equal(masks[i], where)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NoisePatches()(raw_images(1, 19, 40), torch.arange(1), 0, seed=0), "19 x 40 pixels are too small"),
        (lambda: NoisePatches()(raw_images(1, 1, 1), torch.arange(1), 0, seed=0), "too small"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()
