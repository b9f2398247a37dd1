"""Each color op against torchvision's functional, image by image: in float closely, in uint8 within 1/255."""

from itertools import permutations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from data.augment import color

TORCHVISION = {
    color.BRIGHTNESS: F.adjust_brightness,
    color.CONTRAST: F.adjust_contrast,
    color.SATURATION: F.adjust_saturation,
    color.HUE: F.adjust_hue,
}


@pytest.fixture
def bytes_() -> torch.Tensor:
    """Noise, black, white, one gray, gray noise, two equal channels, only 0 and 255, and dark images."""
    images = torch.randint(0, 256, (9, 3, 21, 18), dtype=torch.uint8)
    images[1], images[2], images[3] = 0, 255, 77
    images[4] = images[4, :1]
    images[5, 1] = images[5, 0]
    images[6] = (images[6] > 127) * 255
    images[7] //= 50
    return images


@pytest.mark.parametrize("op", [color.BRIGHTNESS, color.CONTRAST, color.SATURATION])
def test_blends(bytes_, op):
    images = bytes_.float() / 255
    factors = torch.tensor([0.0, 0.2, 0.5, 1.0, 1.3, 1.8, 1.2, 0.7, 1.6], dtype=torch.float64)
    weights = color.blend_weights(torch.full((9,), op), factors)
    ours = color.blend_(images.clone(), weights)
    for image, byte, factor, result in zip(images, bytes_, factors.tolist(), ours):
        torch.testing.assert_close(result, TORCHVISION[op](image, factor), atol=2e-6, rtol=0)
        # torchvision cuts its bytes off twice: the gray image's, then the result's.
        cut = 1 + abs(1 - factor) * (op != color.BRIGHTNESS)
        assert (result * 255 - TORCHVISION[op](byte, factor)).abs().max() <= cut + 1e-3


def test_blends_of_different_ops_in_one_batch(bytes_):
    images = bytes_[:3].float() / 255
    images[1] = images[0]
    images[2] = images[0]
    weights = color.blend_weights(
        torch.tensor([color.SATURATION, color.BRIGHTNESS, color.CONTRAST]), torch.full((3,), 0.4)
    )
    for op, result in zip((color.SATURATION, color.BRIGHTNESS, color.CONTRAST), color.blend_(images.clone(), weights)):
        torch.testing.assert_close(result, TORCHVISION[op](images[0], 0.4), atol=2e-6, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.01, 1 / 6, 0.37, 0.5])
def test_hue(bytes_, turn):
    images = bytes_.float() / 255
    ours = color.adjust_hue_(images.clone(), torch.full((9,), turn, dtype=torch.float64))
    assert ours.min() >= -1e-6 and ours.max() <= 1 + 1e-6
    for image, byte, result in zip(images, bytes_, ours):
        torch.testing.assert_close(result, F.adjust_hue(image, turn), atol=1e-5, rtol=0)
        assert (result * 255 - F.adjust_hue(byte, turn)).abs().max() <= 1


def test_hue_of_the_six_pure_colors_and_all_near_grays():
    pure = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1.0]]).T.reshape(1, 3, 2, 3)
    near = 100 + torch.cartesian_prod(*[torch.arange(3)] * 3).T.reshape(1, 3, 3, 9)
    for images in (pure, near / 255):
        for turn in (-0.4, 1 / 3, 0.5):
            ours = color.adjust_hue_(images.clone(), torch.tensor([turn]))[0]
            torch.testing.assert_close(ours, F.adjust_hue(images[0], turn), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        color.adjust_hue_(pure.clone(), torch.tensor([1 / 3]))[0, :, 0, 0], torch.tensor([0, 1.0, 0])
    )


def test_jitter_in_all_24_orders():
    orders = torch.tensor(list(permutations(range(4))))[torch.randperm(24)]
    images = torch.rand(24, 3, 13, 11)
    factors = torch.rand(24, 4, dtype=torch.float64) * 1.6 + 0.2
    factors[:, color.HUE] = torch.rand(24) - 0.5
    before = images.clone()
    ours = color.jitter(images, torch.ones(24) > 0, factors, orders)
    assert torch.equal(images, before)
    for image, factor, order, result in zip(images, factors.tolist(), orders.tolist(), ours):
        for op in order:
            image = TORCHVISION[op](image, factor[op])
        torch.testing.assert_close(result, image, atol=1e-4, rtol=0)  # far within 1/255


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_jitter_of_one_image(order):
    image = torch.rand(1, 3, 8, 8)
    factors = torch.tensor([[1.3, 0.6, 1.7, -0.1]], dtype=torch.float64)
    expected = image[0]
    for op in order:
        expected = TORCHVISION[op](expected, factors[0, op].item())
    torch.testing.assert_close(
        color.jitter(image, torch.ones(1) > 0, factors, torch.tensor([order]))[0], expected, atol=1e-4, rtol=0
    )


def test_jitter_leaves_the_others_alone():
    images, orders = torch.rand(7, 3, 8, 8), torch.rand(7, 4).argsort(1)
    factors, chosen = torch.tensor([[1.3, 0.6, 1.7, -0.1]]).expand(7, 4), torch.arange(7) % 3 == 1
    ours = color.jitter(images, chosen, factors, orders)
    assert torch.equal(ours[~chosen], images[~chosen])
    assert torch.equal(ours[chosen], color.jitter(images[chosen], chosen[chosen], factors[chosen], orders[chosen]))
    assert torch.equal(color.jitter(images, chosen & False, factors, orders), images)


def test_neutral_jitter_changes_nothing():
    images = torch.rand(5, 3, 9, 9)
    orders = torch.rand(5, 4).argsort(1)
    neutral = torch.tensor([1.0, 1, 1, 0]).expand(5, 4)
    torch.testing.assert_close(color.jitter(images, torch.ones(5) > 0, neutral, orders), images, atol=1e-5, rtol=0)


def test_to_gray(bytes_):
    ours = color.to_gray(bytes_.float() / 255)
    for image, result in zip(bytes_, ours):
        torch.testing.assert_close(result, F.rgb_to_grayscale(image.float() / 255, 3), atol=1e-6, rtol=0)
        assert (result * 255 - F.rgb_to_grayscale(image, 3)).abs().max() <= 1


def test_solarize_of_all_bytes_is_exact():
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    ours = color.solarize(images.float() / 255)
    assert torch.equal((ours * 255).round().byte(), F.solarize(images, 128))
    torch.testing.assert_close(ours, F.solarize(images.float() / 255, 128 / 255))
