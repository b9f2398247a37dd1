"""CutPaste, scar and smooth blend against loops over pixels with the same random numbers, and what they draw."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from data.augment.random_numbers import uniform
from data.defects.blend import JITTER_DRAWS, blend, draw_extents, jittered, moved
from data.defects.cutpaste import CutPasteDefect, Scar, SmoothBlend
from runtime.errors import UserError

SHAPES = [(64, 64), (40, 71), (33, 32)]


def raw_images(count: int, height: int, width: int) -> torch.Tensor:
    """Noise over a ramp: no two pixels' neighborhoods are alike."""
    ramp = torch.linspace(0, 150, width).expand(count, 3, height, width)
    return (ramp + torch.randint(0, 100, (count, 3, height, width))).to(torch.uint8)


def jitter_one(patch: torch.Tensor, strength: float, numbers: list[float]) -> torch.Tensor:
    """torchvision's ops of one float patch (3, h, w) that was cut out."""
    ops = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for op in np.argsort(numbers[4:], kind="stable"):
        patch = ops[op](patch, float(op != 3) + strength * (2 * numbers[op] - 1))
    return patch


def whole(number: float, low: int, high: int) -> int:
    return low + math.floor(number * (high - low + 1))


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_cutpaste_is_cut_and_paste(height, width, jitter):
    images, ids = raw_images(20, height, width), torch.arange(50, 70)
    ours, masks = CutPasteDefect(jitter=jitter)(images, ids, 4, seed=9, view=2)
    numbers = uniform((9, 4, 2, ids, 1), 6 + JITTER_DRAWS).tolist()
    for image, mine, mask, u in zip(images, ours, masks, numbers):
        pixels, ratio = (0.02 + 0.13 * u[0]) * height * width, 0.3 * (3.3 / 0.3) ** u[1]
        h, w = min(max(1, round(math.sqrt(pixels / ratio))), height), min(round(math.sqrt(pixels * ratio)), width)
        (top, to_top), (left, to_left) = (
            [whole(u[i], 0, room) for i in places] for places, room in (((2, 4), height - h), ((3, 5), width - w))
        )
        patch = image[:, top : top + h, left : left + w].float() / 255
        patch = jitter_one(patch, jitter, u[6:]) if jitter else patch
        expected, where = image.clone(), torch.zeros(height, width, dtype=torch.bool)
        expected[:, to_top : to_top + h, to_left : to_left + w] = (patch * 255).round().to(torch.uint8)
        where[to_top : to_top + h, to_left : to_left + w] = True
        assert torch.equal(mask, where)
        difference = (mine.int() - expected.int()).abs()
        assert difference.max() <= (1 if jitter else 0) and (difference > 0).float().mean() < 0.001  # ties


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_scar_is_a_turned_patch(height, width):
    images, ids = raw_images(15, height, width), torch.arange(15)
    ours, masks = Scar(jitter=0.0)(images, ids, 1, seed=0)
    for image, mine, mask, u in zip(images, ours, masks, uniform((0, 1, 0, ids, 2), 7).tolist()):
        h, w, turn = whole(u[0], 10, 25), whole(u[1], 2, 16), math.radians(-45 + 90 * u[2])
        top, left = whole(u[3], 0, height - h), whole(u[4], 0, width - w)
        cos, sin = math.cos(turn), math.sin(turn)
        spread = (h * cos + w * abs(sin), w * cos + h * abs(sin))
        cy, cx = spread[0] / 2 + u[5] * (height - spread[0]), spread[1] / 2 + u[6] * (width - spread[1])
        wrong = 0
        for y in range(height):
            for x in range(width):
                v = (y + 0.5 - cy) * cos - (x + 0.5 - cx) * sin + h / 2
                z = (y + 0.5 - cy) * sin + (x + 0.5 - cx) * cos + w / 2
                inside = 0 <= v < h and 0 <= z < w
                value = image[:, top + math.floor(v), left + math.floor(z)] if inside else image[:, y, x]
                near_edge = min(abs(v - round(v)), abs(z - round(z))) < 1e-4
                wrong += not near_edge and (not torch.equal(value, mine[:, y, x]) or inside != bool(mask[y, x]))
        assert wrong == 0
        area = h * w
        assert abs(int(mask.sum()) - area) <= 2 * (h + w)  # all of it lies in the image


def test_smooth_blend_is_cutpaste_under_an_opacity():
    images, ids = raw_images(20, 50, 60), torch.arange(20)
    ours, masks = SmoothBlend(softness=0.125)(images, ids, 0, seed=3)
    numbers = uniform((3, 0, 0, ids, 3), 6 + JITTER_DRAWS)
    extents = draw_extents(numbers[:, :2], (50, 60), (0.005, 0.05), (0.3, 3.3))
    begin, end = (((50 - extents[:, :1] + 1, 60 - extents[:, 1:] + 1)) for _ in range(2))
    begin = (numbers[:, 2:4] * torch.cat(begin, 1)).floor()
    end = (numbers[:, 4:6] * torch.cat(end, 1)).floor()
    patches, inside = moved(images, begin, extents, end + extents / 2)
    opaque = blend(images, jittered(patches, inside, 0.1, numbers[:, 6:]), inside)
    assert torch.equal(masks, inside)
    gap, full = (ours.float() - images).abs(), (opaque.float() - images).abs()
    assert (gap <= full + 1).all()
    normal = torch.distributions.Normal(0.0, 1.0).cdf
    for i, ((top, left), (h, w)) in enumerate(zip(end.int().tolist(), extents.int().tolist())):
        s = 0.125 * min(h, w)
        for y in range(top, top + h):
            for x in range(left, left + w):
                at = torch.tensor([y - top, top + h - y - 1, x - left, left + w - x - 1]) + 0.5
                alpha = normal(at / s - 2).prod()
                value = images[i, :, y, x] * (1 - alpha) + opaque[i, :, y, x] * alpha
                assert (value - ours[i, :, y, x]).abs().max() <= 1.01


@pytest.mark.parametrize("shape", SHAPES)
def test_extents_fill_their_ranges(shape):
    numbers = uniform((0, torch.arange(4000)), 2)
    extents = draw_extents(numbers, shape, (0.02, 0.15), (0.3, 3.3))
    share, ratio = extents.prod(1) / (shape[0] * shape[1]), extents[:, 1] / extents[:, 0]
    assert extents.min() >= 1 and (extents <= torch.tensor(shape)).all()
    assert 0.012 < share.min() < 0.025 and 0.14 < share.max() < 0.18
    assert 0.2 < ratio.min() < 0.35 and 2.9 < ratio.max() < 5
    assert 0.4 < (ratio > 1).float().mean() < 0.6


def test_scars_draw_every_size():
    images, ids = torch.zeros(3000, 3, 32, 32, dtype=torch.uint8), torch.arange(3000)
    _, masks = Scar(rotation=0.0, jitter=0.0)(images, ids, 0, seed=0)
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    # where a scar lies is real: a length of 10 covers 10 centers of pixels, but at its ends rounding may take one
    assert set(range(10, 26)) <= set(heights.tolist()) <= set(range(9, 27))
    assert set(range(2, 17)) <= set(widths.tolist()) <= set(range(1, 18))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CutPasteDefect()(raw_images(1, 7, 7), torch.arange(1), 0, seed=0), "7 x 7 pixels are too small"),
        (lambda: SmoothBlend()(raw_images(1, 1, 1), torch.arange(1), 0, seed=0), "1 x 1 pixels are too small"),
        (lambda: Scar()(raw_images(1, 64, 29), torch.arange(1), 0, seed=0), "needs 30 pixels"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()
