"""Deletion, insertion and the pointing game against plain loops, ties and constant maps included."""

import math
from itertools import pairwise

import pytest
import torch

from evaluation.inspect.faithfulness import (
    STEPS,
    area,
    center_map,
    faithfulness,
    localization,
    random_map,
    removal_rank,
    without,
)


def filled(image: list, keep: list, width: float = 1 / 16) -> list:
    """One channel, pixel by pixel: the weighted mean of what is left."""
    height, across = len(image), len(image[0])
    out = [row[:] for row in image]
    for y in range(height):
        for x in range(across):
            if not keep[y][x]:
                total = weight = 0.0
                for v in range(height):
                    for u in range(across):
                        if keep[v][u]:
                            away = ((y - v) / (width * height)) ** 2 + ((x - u) / (width * across)) ** 2
                            w = math.exp(-away / 2)
                            total, weight = total + w * image[v][u], weight + w
                out[y][x] = total / weight
    return out


def test_holes_are_filled_from_what_is_left():
    image, keep = torch.rand(2, 7, 5, dtype=torch.float64), torch.rand(7, 5) < 0.4
    expected = torch.tensor([filled(channel, keep.tolist()) for channel in image.tolist()], dtype=torch.float64)
    torch.testing.assert_close(without(image, keep), expected)
    assert torch.equal(without(image, torch.ones(7, 5, dtype=torch.bool)), image)
    none = without(image, torch.zeros(7, 5, dtype=torch.bool))
    torch.testing.assert_close(none, image.mean((1, 2), keepdim=True).expand(-1, 7, 5))
    texture = torch.rand(2, 7, 5, dtype=torch.float64)
    own = torch.tensor([filled(channel, keep.tolist()) for channel in texture.tolist()], dtype=torch.float64)
    torch.testing.assert_close(without(image, keep, texture), torch.where(keep, image, expected + texture - own))


def test_the_middle_of_a_large_hole_is_in_reach():
    image, keep = torch.rand(3, 96, 64), torch.zeros(96, 64, dtype=torch.bool)
    keep[0, 0] = True
    torch.testing.assert_close(without(image, keep), image[:, :1, :1].expand(-1, 96, 64))


def test_equally_salient_pixels_go_in_random_order():
    rank = removal_rank(torch.tensor([[0.5, 2.0], [1.0, -1.0]]), 0)
    assert rank.tolist() == [[2, 0], [1, 3]]
    flat = removal_rank(torch.zeros(10, 10), 0).flatten()
    assert sorted(flat.tolist()) == list(range(100))
    assert abs(torch.corrcoef(torch.stack([flat.float(), torch.arange(100.0)]))[0, 1]) < 0.3
    assert not torch.equal(flat, removal_rank(torch.zeros(10, 10), 1).flatten())
    assert removal_rank(torch.ones(1, 1), 0).tolist() == [[0]]


def brightness(images: torch.Tensor) -> torch.Tensor:
    """What a network that looks at one square says."""
    return images[:, :, 2:6, 3:7].mean((1, 2, 3))


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A dark image with a bright square, and a map that is largest there, without ties."""
    image, saliency = 0.1 * torch.rand(3, 12, 10, dtype=torch.float64), torch.rand(12, 10, dtype=torch.float64)
    image[:, 2:6, 3:7] += 1
    saliency[2:6, 3:7] += 1
    return image, saliency


def test_curves_are_those_of_a_plain_loop():
    image, saliency = scene()
    found = faithfulness(image, saliency, brightness, batch_size=7)
    order = sorted(range(120), key=lambda i: saliency.flatten()[i].item(), reverse=True)
    for curve, gone in ((found.deletion_curve, order), (found.insertion_curve, order[::-1])):
        expected = []
        for step in range(STEPS + 1):
            keep = torch.ones(120, dtype=torch.bool)
            keep[gone[: 12 * step]] = False
            expected.append(float(brightness(without(image, keep.view(12, 10))[None])))
        assert curve == pytest.approx(expected, abs=1e-12)
        assert area(curve) == pytest.approx(sum((a + b) / 20 for a, b in pairwise(expected)))
    assert found.deletion == area(found.deletion_curve) and found.insertion == area(found.insertion_curve)
    assert found.faithfulness > 0.5
    assert found == faithfulness(image, saliency, brightness, batch_size=64)


def test_the_opposite_map_has_the_opposite_number_and_ignorance_none():
    image, saliency = scene()
    right, wrong = (faithfulness(image, each, brightness) for each in (saliency, -saliency))
    assert wrong.faithfulness == pytest.approx(-right.faithfulness) and wrong.deletion == right.insertion
    chance = [faithfulness(image, random_map((4, 4), (12, 10), seed), brightness).faithfulness for seed in range(40)]
    assert abs(sum(chance) / 40) < 0.1 and max(chance) < right.faithfulness
    constant = [faithfulness(image, torch.zeros(12, 10), brightness, seed=seed).faithfulness for seed in range(40)]
    assert abs(sum(constant) / 40) < 0.1


def test_baselines():
    center = center_map((5, 9))
    assert center.shape == (5, 9) and center[2, 4] == center.max() == 1 and center[0, 0] == center.min()
    torch.testing.assert_close(center, center.flip(0, 1))
    assert random_map((2, 3), (8, 9), 0).shape == (8, 9)
    assert torch.equal(random_map((2, 3), (8, 9), 0), random_map((2, 3), (8, 9), 0))
    assert not torch.equal(random_map((2, 3), (8, 9), 0), random_map((2, 3), (8, 9), 1))


def test_how_a_map_agrees_with_a_mask():
    heat, mask = torch.tensor([[1.0, 3.0], [5.0, 2.0]]), torch.tensor([[False, True], [False, True]])
    assert localization(heat, mask) == pytest.approx((3 / 7, 0.0))  # above the minimum: 2 and 1 of 0 + 2 + 4 + 1
    assert localization(heat, ~mask) == pytest.approx((4 / 7, 1.0))
    assert localization(torch.tensor([[4.0, 4.0], [0.0, 0.0]]), mask) == pytest.approx((0.5, 0.5))
    assert localization(torch.full((2, 2), 7.0), torch.tensor([[True, False], [False, False]])) == (0.25, 0.25)
    assert localization(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)) == (1.0, 1.0)
