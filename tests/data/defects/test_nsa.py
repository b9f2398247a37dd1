"""NSA against a loop: patches drawn, resized, blended one by one by a dense solve; labels against scipy's medians."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from scipy.special import gammaincinv, ndtri

from data.augment.random_numbers import uniform
from data.defects.medians import disk_median
from data.defects.nsa import NSADefect
from data.defects.poisson import laplacian, mixed_divergence
from runtime.errors import UserError
from tests.data.defects.test_cutpaste import raw_images
from tests.data.defects.test_poisson import dense


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) -> (height, width), bilinear between the centers of pixels, borders repeated."""
    result = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            places = []
            for at, size, old in ((y, height, image.shape[0]), (x, width, image.shape[1])):
                position = min(max((at + 0.5) * old / size - 0.5, 0), old - 1)
                low = math.floor(position)
                places.append((low, min(low + 1, old - 1), position - low))
            (t, b, fy), (left, r, fx) = places
            top = image[t, left] * (1 - fx) + image[t, r] * fx
            result[y, x] = top * (1 - fy) + (image[b, left] * (1 - fx) + image[b, r] * fx) * fy
    return result


def between(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@pytest.mark.parametrize("gradients", ["source", "mixed"])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 47)])
def test_equals_one_patch_after_the_other(gradients, height, width):
    images, sources = raw_images(14, height, width), raw_images(14, height, width).flip(3)
    ids = torch.arange(14)
    defect = NSADefect(gradients=gradients, patches=2)
    ours, masks = defect(images, ids, 1, seed=4, sources=sources)
    numbers = uniform((4, 1, 0, ids, 4), 16).unflatten(1, (2, 8)).tolist()
    blended = 0
    for image, source, mine, mask, draws in zip(images.numpy(), sources.numpy(), ours.numpy(), masks.numpy(), numbers):
        made, where = image.copy(), np.zeros((height, width), bool)
        for number, u in enumerate(draws):
            low, high = [round(0.03 * s) for s in (height, width)], [round(0.4 * s) for s in (height, width)]
            spans = []
            for k, side in enumerate((height, width)):
                half = int(between((0.03 + 0.05 * gammaincinv(2, u[k])) * side, low[k], high[k]))
                center = low[k] + math.floor(u[2 + k] * (side - 2 * low[k]))
                spans.append((max(center - half, 0), min(center + half, side)))
            (top, bottom), (left, right) = spans
            h, w = bottom - top, right - left
            new_h = between(between(1 + 0.5 * ndtri(u[4]), 0.5, 2) * h, low[0], high[0])
            new_w = between(int(new_h / h * w), low[1], high[1])
            new_h = between(int(new_w / w * h), low[0], high[0])
            if (number and u[7] >= 0.5) or max(new_h - 2, 0) * max(new_w - 2, 0) < 50:
                continue
            y = new_h // 2 + 1 + math.floor(u[5] * (height - 2 * (new_h // 2) - 2)) - new_h // 2
            x = new_w // 2 + 1 + math.floor(u[6] * (width - 2 * (new_w // 2) - 2)) - new_w // 2
            box = (slice(y, y + new_h), slice(x, x + new_w))
            for channel in range(3):
                patch = resized(source[channel, top:bottom, left:right].astype(float), new_h, new_w)
                target = made[channel][box].astype(float)
                both = [torch.from_numpy(part)[None, None] for part in (patch, target)]
                flow = mixed_divergence(*both) if gradients == "mixed" else laplacian(both[0])
                made[channel][box] = dense(target, flow[0, 0].numpy()).round().clip(0, 255).astype(np.uint8)
            where[y + 1 : y + new_h - 1, x + 1 : x + new_w - 1] = True
            blended += 1
        assert np.array_equal(mask, where)
        assert np.abs(mine.astype(int) - made).max() <= 1 and (mine != made).mean() < 0.001
    assert blended >= 4


def test_without_sources_an_image_is_its_own():
    images, ids = raw_images(3, 40, 40), torch.arange(3)
    for mine, other in zip(NSADefect()(images, ids, 0, seed=0), NSADefect()(images, ids, 0, seed=0, sources=images)):
        assert torch.equal(mine, other)


def test_boxes_lie_in_the_images_and_fill_their_ranges():
    numbers = uniform((0, torch.arange(3000)), 24).unflatten(1, (3, 8))
    boxes, placed = NSADefect().boxes(numbers, numbers[:, :, None, [2, 3, 5, 6]], (100, 200))
    begin, before, after, place = boxes.unbind(2)
    sides = torch.tensor([100, 200])
    assert (begin >= 0).all() and (before >= 1).all() and (begin + before <= sides).all()
    assert (place >= 1).all() and (place + after <= sides - 1).all()
    assert after.amin((0, 1)).tolist() == [3, 6] and after.amax((0, 1)).tolist() == [40, 80]
    assert before.amax(0).amax(0)[0] > 60
    often = placed.double().mean(0)
    assert often[0] > 0.95 and 0.4 < often[1] < 0.55 and 0.4 < often[2] < 0.55


@pytest.mark.parametrize("options", [{"bounds": (0.001, 0.4), "offset": 0.0, "scale": 1e-6}, {"bounds": (0.45, 0.45)}])
def test_extreme_sizes(options):
    defect = NSADefect(**options, gradients="source", resize=(0.1, 9.0))
    images, ids = raw_images(20, 24, 31), torch.arange(20)
    made, masks = defect(images, ids, 0, seed=0)
    assert not ((made != images).any(1) & ~masks).any()
    numbers = uniform((0, ids), 24).unflatten(1, (3, 8))
    boxes, _ = defect.boxes(numbers, numbers[:, :, None, [2, 3, 5, 6]], (24, 31))
    assert boxes[:, :, 1:3].min() >= 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (23, 31)])
def test_median_of_a_disk(shape):
    values = torch.randint(0, 40, (2, *shape)).float()
    at = np.arange(-5, 6)
    disk = at[:, None] ** 2 + at**2 <= 25
    for one, where in zip(values, torch.rand(2, *shape) < 0.7):
        ours = disk_median(one, where)
        assert np.array_equal(median_filter(one.numpy(), footprint=disk, mode="nearest")[where.numpy()], ours[where])


def test_labels():
    images, ids = raw_images(6, 64, 64), torch.arange(6)
    defect = NSADefect(steepness=0.5, middle=4.0)
    made, masks = defect(images, ids, 0, seed=0)
    labels = defect.labels(images, made, masks)
    assert labels.shape == (6, 64, 64) and labels.dtype == torch.float32 and (labels >= 0).all() and (labels < 1).all()
    at = np.arange(-5, 6)
    disk = at[:, None] ** 2 + at**2 <= 25
    for before, after, mask, ours in zip(images.numpy(), made.numpy(), masks.numpy(), labels.numpy()):
        change = np.abs(before.astype(float) - after).mean(0) * mask
        changed = median_filter((change > 1).astype(np.uint8), 5, mode="nearest").astype(bool)
        soft = median_filter(change * changed, footprint=disk, mode="nearest")
        np.testing.assert_allclose(ours, changed / (1 + np.exp(-0.5 * (soft - 4))), atol=1e-5)
    assert not defect.labels(images, images, masks).any()
    assert defect.labels(images[:0], images[:0], masks[:0]).shape == (0, 64, 64)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NSADefect()(raw_images(1, 20, 20), torch.arange(1), 0, seed=0), "20 x 20 pixels are too small"),
        (lambda: NSADefect()(raw_images(1, 1, 1), torch.arange(1), 0, seed=0), "no patch changes 50 pixels"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_sources_must_be_like_the_images():
    with pytest.raises(ValueError, match="sources must be like"):
        NSADefect()(raw_images(2, 40, 40), torch.arange(2), 0, seed=0, sources=raw_images(1, 40, 40))
