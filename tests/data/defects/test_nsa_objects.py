"""NSA's patches that keep to the object, against the authors' rule as a loop over places; what its mask leaves out."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from scipy.special import gammaincinv, ndtri
from torch import Tensor

from data.augment.random_numbers import uniform
from data.defects.nsa import NSADefect
from tests.data.defects.test_nsa import between, resized

GRAY, TOLERANCE = 20, 30


def disks(count: int, height: int, width: int) -> Tensor:
    """Bright noisy disks of several sizes and places on dark noise: uint8 (count, 3, height, width)."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    made = []
    for _ in range(count):
        middle, radius = rng.uniform(0.3, 0.7, 2) * (height, width), rng.uniform(0.3, 0.5) * min(height, width)
        inside = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < radius**2
        made.append(np.where(inside, rng.normal(140, 25, (3, height, width)), rng.normal(25, 8, (3, height, width))))
    return torch.from_numpy(np.stack(made).clip(0, 255).astype(np.uint8))


def object_of(image: np.ndarray) -> np.ndarray:
    """(3, H, W) -> bool (H, W)."""
    away = np.abs(image.astype(float).mean(0) - GRAY) > TOLERANCE
    return median_filter(away.astype(np.uint8), 7, mode="nearest") > 0


@pytest.mark.parametrize(("height", "width", "least"), [(40, 40, 0.7), (45, 61, 0.25)])
def test_boxes_and_masks_are_the_authors(height, width, least):
    count, size = 24, (height, width)
    images, ids = disks(count, height, width), torch.arange(count)
    images[-1] = 20  # nothing but background
    sources = disks(count + 5, height, width)[5:]
    sources[-2] = 20
    defect = NSADefect(patches=2, background=(GRAY, TOLERANCE), min_object=least, widths=(0.05, 0.3), resize=(0.7, 1.3))
    made, masks = defect(images, ids, 1, seed=4, sources=sources)
    numbers = uniform((4, 1, 0, ids, 4), 16).unflatten(1, (2, 8))
    places = uniform((4, 1, 0, ids, 4, 1), 2 * 199 * 4).unflatten(1, (2, 199, 4))
    objects = torch.stack([defect.objects(sources), defect.objects(images)])
    boxes, placed = defect.boxes(numbers, places, size, objects)
    low, high = [round(0.03 * height), round(0.05 * width)], [round(0.4 * height), round(0.3 * width)]
    turned_down = 0
    for i in range(count):
        source, target = object_of(sources[i].numpy()), object_of(images[i].numpy())
        assert np.array_equal(source, objects[0, i]) and np.array_equal(target, objects[1, i])
        where, changeable = np.zeros(size, bool), np.zeros(size, bool)
        for patch, (u, tries) in enumerate(zip(numbers[i].tolist(), places[i].tolist())):
            half = [int(between((0.03 + 0.05 * gammaincinv(2, u[k])) * size[k], low[k], high[k])) for k in (0, 1)]
            box = None
            for place in tries:
                center = [low[k] + math.floor(place[k] * (size[k] - 2 * low[k])) for k in (0, 1)]
                (top, bottom), (left, right) = (
                    (max(c - h, 0), min(c + h, side)) for c, h, side in zip(center, half, size)
                )
                if source[top:bottom, left:right].mean() > least:
                    box = top, bottom, left, right
                    break
                turned_down += 1
            if box is None or (patch and u[7] >= 0.5):
                assert not placed[i, patch]
                continue
            h, w = bottom - top, right - left
            new_h = between(between(1 + 0.5 * ndtri(u[4]), 0.7, 1.3) * h, low[0], high[0])
            new_w = between(int(new_h / h * w), low[1], high[1])
            new_h = between(int(new_w / w * h), low[0], high[0])
            small = resized(source[top:bottom, left:right].astype(float), new_h, new_w) >= 0.5
            there = None
            for place in tries:
                y, x = (
                    new // 2 + 1 + math.floor(place[2 + k] * (size[k] - 2 * (new // 2) - 2)) - new // 2
                    for k, new in enumerate((new_h, new_w))
                )
                below = target[y : y + new_h, x : x + new_w]
                if small.mean() > least and (small & below).sum() / small.sum() > 0.25:
                    there = y, x
                    break
                turned_down += 1
            if there is None or max(new_h - 2, 0) * max(new_w - 2, 0) < 50:
                assert not placed[i, patch]
                continue
            assert placed[i, patch]
            assert boxes[i, patch].tolist() == [[top, left], [h, w], [new_h, new_w], [y, x]]
            where[y + 1 : y + new_h - 1, x + 1 : x + new_w - 1] = (small | below)[1:-1, 1:-1]
            changeable[y + 1 : y + new_h - 1, x + 1 : x + new_w - 1] = True
        assert np.array_equal(masks[i], where)
        assert not ((made[i] != images[i]).any(0).numpy() & ~changeable).any()
    assert turned_down > 50 and placed.sum() > 9 and not placed[-2:].any()


def test_background_that_changes_has_no_label():
    images, ids = disks(8, 64, 64), torch.arange(8)
    options = {"gradients": "source", "bounds": (0.3, 0.4), "steepness": 1.0, "middle": 2.0}  # of an object and around
    defect = NSADefect(background=(GRAY, TOLERANCE), **options)
    made, masks = defect(images, ids, 0, seed=1, sources=images.roll(1, 0))
    labels = defect.labels(images, made, masks)
    near = torch.nn.functional.max_pool2d(masks[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    assert ((made != images).any(1) & ~near).any()  # noise of one background for that of another
    assert labels.max() > 0.9 and not labels[~near].any()


def test_it_does_not_depend_on_the_batch():
    images, ids = disks(9, 48, 40), torch.arange(9)
    defect = NSADefect(background=(GRAY, TOLERANCE), min_object=0.5)
    whole = defect(images, ids, 2, seed=1)
    for batch in (1, 4):
        parts = [defect(i, s, 2, seed=1) for i, s in zip(images.split(batch), ids.split(batch))]
        for one, other in zip(whole, zip(*parts)):
            assert torch.equal(one, torch.cat(other))
    assert defect(images[:0], ids[:0], 2, seed=1)[1].shape == (0, 48, 40)
