"""Noise patches: rectangles against a loop, the noise's values, how many there are, mistakes."""

import math

import pytest
import torch

from data.noise_patches import NoisePatches
from data.random_numbers import uniform
from tests.data.test_cutpaste import pictures
from training.errors import UserError


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 130), (20, 47)])
def test_rectangles_and_noise(height, width):
    images, ids = pictures(30, height, width), torch.arange(30)
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


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NoisePatches(most=0), "most must be at least 1"),
        (lambda: NoisePatches()(pictures(1, 19, 40), torch.arange(1), 0, seed=0), "19 x 40 pixels are too small"),
        (lambda: NoisePatches()(pictures(1, 1, 1), torch.arange(1), 0, seed=0), "too small"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()
