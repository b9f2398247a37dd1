"""RandAugment: each operation against Pillow's, as in TorchSSL's randaugment.py, and torchvision's; the draws."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import stats
from torchvision.transforms.v2 import functional as V

from data.augment import strong
from data.augment.random_numbers import KINDS, uniform
from data.augment.recipes import RECIPES
from data.augment.strong import OPERATIONS, RANGES, apply, cut_out, rand_augment
from data.augment.views import Augment, View
from data.normalize import Normalization
from runtime.errors import UserError

AFFINE = Image.Transform.AFFINE
OFFICIAL = {  # randaugment.py, line by line
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "identity": lambda image, _: image,
    "posterize": lambda image, v: ImageOps.posterize(image, max(1, int(v))),
    "rotate": lambda image, v: image.rotate(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": lambda image, v: image.transform(image.size, AFFINE, (1, v, 0, 0, 1, 0)),
    "shear_y": lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, v, 1, 0)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "translate_x": lambda image, v: image.transform(image.size, AFFINE, (1, 0, v * image.size[0], 0, 1, 0)),
    "translate_y": lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, 0, 1, v * image.size[1])),
}
TORCHVISION = {  # of tensors, which has its own arithmetic; of images that are moved it takes other nearest pixels
    "autocontrast": lambda image, _: V.autocontrast(image),
    "brightness": V.adjust_brightness,
    "color": V.adjust_saturation,
    "contrast": V.adjust_contrast,
    "equalize": lambda image, _: V.equalize(image),
    "identity": lambda image, _: image,
    "posterize": lambda image, v: V.posterize(image, int(v)),
    "sharpness": V.adjust_sharpness,
    "solarize": V.solarize,
}


def images(height: int, width: int) -> torch.Tensor:
    """Random ones, dark, bright, low in contrast, of one level, of two, a ramp, gray: uint8 (B, 3, height, width)."""
    rng = np.random.default_rng(height + width)
    shape = (3, height, width)
    ramp = np.broadcast_to(np.linspace(0, 255, width), shape)
    every = [rng.integers(0, 256, shape) for _ in range(6)] + [rng.integers(low, high, shape) for low, high in ENDS]
    every += [np.zeros(shape), np.full(shape, 255), np.full(shape, 77), rng.integers(0, 2, shape) * 255, ramp]
    every += [np.broadcast_to(rng.integers(0, 256, shape[1:]), shape), rng.integers(0, 2, shape) + 254]
    return torch.from_numpy(np.stack(every).astype(np.uint8))


ENDS = ((0, 20), (230, 256), (100, 103))
SIZES = [(32, 32), (23, 40), (17, 5), (2, 3), (1, 1), (64, 64)]


def strengths_of(name: str, count: int) -> torch.Tensor:
    low, high = RANGES[name]
    ends = [low, high - 1e-9, (low + high) / 2]
    return torch.tensor([*ends, *np.random.default_rng(1).uniform(low, high, count - 3)], dtype=torch.float64)


def to_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def ours_of(name: str, batch: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    return apply(batch.float(), torch.full((len(batch),), OPERATIONS.index(name)), strengths)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RANGES)
def test_an_operation_is_the_official_one(name, size):
    """To the level, but for the floating-point rounding of a table's entry."""
    batch = images(*size)
    strengths = strengths_of(name, len(batch))
    ours = ours_of(name, batch, strengths)
    assert torch.equal(ours, ours.round()) and ours.min() >= 0 and ours.max() <= 255
    for image, result, strength in zip(batch, ours, strengths.tolist()):
        official = V.pil_to_tensor(OFFICIAL[name](to_image(image), strength))
        assert torch.equal(result.byte(), official), (strength, (result - official).abs().max())


@pytest.mark.parametrize("size", [(32, 32), (23, 40)])
@pytest.mark.parametrize("name", TORCHVISION)
def test_an_operation_is_torchvision_s_within_a_level(name, size):
    batch = images(*size)
    strengths = strengths_of(name, len(batch)).clamp(max=255)  # torchvision takes no threshold above
    for image, result, strength in zip(batch, ours_of(name, batch, strengths), strengths.tolist()):
        difference = (result - TORCHVISION[name](image, strength).float()).abs()
        assert difference.max() <= 1, (strength, difference.max())


def test_the_list_is_the_official_one():
    assert len(RANGES) == 14 and set(OFFICIAL) == set(RANGES)
    families = torch.cat([strong.TABLES, strong.BLENDS, strong.MAPS]).sort().values.tolist()
    assert families == [number for number in range(14) if OPERATIONS[number] != "identity"]


def cutout_by_pillow(image: Image.Image, v: float, x0: float, y0: float) -> Image.Image:
    """randaugment.py's Cutout with its two draws given."""
    if v <= 0:
        return image
    w, h = image.size
    v = v * w
    x0, y0 = int(max(0, x0 * w - v / 2.0)), int(max(0, y0 * h - v / 2.0))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x0, y0, min(w, x0 + v), min(h, y0 + v)), (125, 123, 114))
    return image


@pytest.mark.parametrize("size", [(32, 32), (23, 40), (1, 1)])
def test_cutout_is_the_official_one(size):
    batch = images(*size).repeat(4, 1, 1, 1)
    numbers = uniform((0, torch.arange(len(batch))), 3)
    numbers[0, 0], numbers[1, 1:], numbers[2, 1:], numbers[3] = 0, 0, 1 - 2**-24, torch.tensor([1, 0.0, 0.0])
    ours = cut_out(batch.float(), numbers[:, 0] / 2, numbers[:, 1:])
    for image, result, (side, x, y) in zip(batch, ours, numbers.tolist()):
        assert torch.equal(result.byte(), V.pil_to_tensor(cutout_by_pillow(to_image(image), side / 2, x, y)))


def test_operations_follow_each_other_with_the_strengths_drawn():
    """The whole chain by Pillow, from the numbers of the hash."""
    batch, ids = images(24, 24), torch.arange(16)
    key = (3, 5, 1, ids, *KINDS["rand_augment"])
    ours = rand_augment(batch.float() / 255, key, operations=3, cutout=0.5) * 255
    for image, result, draws in zip(batch, ours, uniform(key, 9).tolist()):
        expected = to_image(image)
        for choice, strength in zip(draws[:3], draws[3:6]):
            name = list(OFFICIAL)[int(14 * choice)]
            low, high = RANGES[name]
            expected = OFFICIAL[name](expected, low + (high - low) * strength)
        expected = cutout_by_pillow(expected, 0.5 * draws[6], *draws[7:])
        torch.testing.assert_close(result, V.pil_to_tensor(expected).float(), atol=1e-3, rtol=0)


def test_all_operations_are_equally_frequent_and_independent():
    draws = (uniform((0, 0, 1, torch.arange(7000), *KINDS["rand_augment"]), 9)[:, :3] * 14).long()  # (7000, 3)
    for place in draws.T:
        assert stats.chisquare(place.bincount(minlength=14)).pvalue > 1e-3
    pairs = (draws[:, 0] * 14 + draws[:, 1]).bincount(minlength=196)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_an_image_does_not_depend_on_its_batch():
    batch, ids = images(33, 20).float() / 255, torch.randperm(1000)[:16]
    kind = KINDS["rand_augment"]
    whole = rand_augment(batch, (1, 2, 1, ids, *kind), operations=3, cutout=0.5)
    order = torch.randperm(16)
    again = rand_augment(batch[order], (1, 2, 1, ids[order], *kind), operations=3, cutout=0.5)
    assert torch.equal(whole[order], again)
    alone = [
        rand_augment(batch[i : i + 1], (1, 2, 1, ids[i : i + 1], *kind), operations=3, cutout=0.5) for i in range(16)
    ]
    assert torch.equal(whole, torch.cat(alone))
    assert not torch.equal(whole, rand_augment(batch, (1, 3, 1, ids, *kind), operations=3, cutout=0.5))


def test_nothing_at_all_is_rounding():
    batch = torch.rand(4, 3, 9, 9)
    same = rand_augment(batch, (0, 0, 0, torch.arange(4)), operations=0, cutout=0.0)
    torch.testing.assert_close(same, (batch * 255).round() / 255)


def test_the_recipe_is_a_crop_with_operations():
    """The crop is that of `crop`, and every view's numbers are its own."""
    batch, ids = images(40, 30), torch.arange(16)
    unit = {"normalization": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
    (plain,) = Augment(RECIPES["crop"](size=24), 4, **unit)(batch, ids, 2)
    (view,) = Augment(RECIPES["randaugment"](size=24, cutout=0.4), 4, **unit)(batch, ids, 2)
    key = (4, 2, 0, ids, *KINDS["rand_augment"])
    assert torch.equal(view, rand_augment(plain, key, operations=3, cutout=0.4))
    first, second = Augment(RECIPES["randaugment"](size=24, scale=(1, 1), flip_p=0.0) * 2, 4)(batch, ids, 2)
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match=r"probabilities and cutout must lie in \[0, 1\]"):
        View(8, cutout=1.5)
