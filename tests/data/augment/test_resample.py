"""Crop boxes against torchvision's by distribution, resampling and blur by pixel."""

import math

import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from data.augment import resample
from data.augment.random_numbers import uniform

RATIO = (3 / 4, 4 / 3)


def boxes(count: int, size: tuple[int, int], scale=(0.08, 1.0), ratio=RATIO) -> torch.Tensor:
    numbers = uniform((0, torch.arange(count)), resample.CROP_DRAWS)
    return torch.cat(resample.draw_boxes(numbers, torch.tensor(size).expand(count, 2), scale, ratio=ratio), dim=1)


def torchvision_boxes(count: int, size: tuple[int, int], scale=(0.08, 1.0), ratio=RATIO) -> torch.Tensor:
    crop, image = RandomResizedCrop(8, scale, ratio), torch.empty(3, *size)
    draws = [crop.make_params([image]) for _ in range(count)]
    return torch.tensor([[draw[k] for k in ("top", "left", "height", "width")] for draw in draws], dtype=torch.float64)


def byte_difference(image: torch.Tensor, byte: torch.Tensor) -> float:
    """Largest difference to a uint8 image, which torchvision rounds after each of its two passes."""
    return ((image * 255).round() - byte).abs().max().item()


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (200, 90), (64, 1000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 1.0)])
def test_boxes_are_distributed_as_torchvisions(size, scale):
    ours, theirs = boxes(4000, size, scale), torchvision_boxes(2500, size, scale)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor(size)).all()
    for measure in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: b[:, 3] / b[:, 2],  # aspect
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 0] / (size[0] - b[:, 2] + 1),  # place within what the height leaves
    ):
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 7), (1, 1), (10, 12)])
def test_fallback_is_torchvisions(size):
    scale, ratio = (1.0, 1.0), (1.0, 1.0) if size == (10, 12) else RATIO  # the whole area: no try fits
    assert torch.equal(boxes(3, size, scale, ratio), torchvision_boxes(3, size, scale, ratio))


def test_box_of_forced_numbers():
    numbers = torch.zeros(2, resample.CROP_DRAWS)
    numbers[:, :10] = 0.5
    numbers[:, 10:20] = 0.5  # aspect 1
    numbers[0, :3] = 1 - 2**-24  # about the whole area and the largest aspect: the first three tries do not fit
    numbers[0, 10:13] = 1 - 2**-24
    numbers[:, 20:] = 1 - 2**-24
    top_left, box = resample.draw_boxes(numbers, torch.tensor([[100, 100], [40, 60]]), (0.2, 1.0), ratio=RATIO)
    sides = [round(math.sqrt(0.6 * 10000)), round(math.sqrt(0.6 * 2400))]
    assert box.tolist() == [[sides[0]] * 2, [sides[1]] * 2]
    assert top_left.tolist() == [[100 - sides[0]] * 2, [40 - sides[1], 60 - sides[1]]]


def shares(ratio: str, count: int, size: tuple[int, int], scale: tuple[float, float]) -> torch.Tensor:
    numbers = uniform((1, torch.arange(count)), resample.CROP_DRAWS)
    return torch.cat(resample.draw_shares(numbers, torch.tensor(size).expand(count, 2), scale, ratio=ratio), dim=1)


@pytest.mark.parametrize("size", [(400, 300), (150, 5000)])
def test_strips_have_the_full_height_and_a_uniform_share_of_the_width(size):
    top, left, height, width = shares("full_height", 4000, size, (0.1, 0.4)).T
    assert (top == 0).all() and (height == size[0]).all() and (left >= 0).all() and (left + width <= size[1]).all()
    assert torch.equal(width, width.round()) and torch.equal(left, left.floor())
    smooth = torch.rand(4000, dtype=torch.float64) - 0.5  # whole pixels become continuous
    assert stats.kstest((width + smooth) / size[1], stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest((left + smooth + 0.5) / (size[1] - width + 1), "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(left / (size[1] - width + 1), width).statistic) < 0.06


@pytest.mark.parametrize("size", [(400, 300), (150, 5000)])
def test_boxes_like_the_image_keep_its_proportions_and_a_uniform_share_of_the_area(size):
    boxes = shares("own", 4000, size, (0.3, 1.0))
    (top, left), (height, width) = boxes[:, :2].T, boxes[:, 2:].T
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()
    assert (height / size[0] - width / size[1]).abs().max() <= 0.5 / size[0] + 0.5 / size[1] + 1e-9
    smooth = torch.rand(4000, dtype=torch.float64) - 0.5
    side = (max(size) == torch.tensor(size)).double().argmax()
    share = ((boxes[:, 2 + side] + smooth) / size[side]) ** 2
    assert stats.kstest(share, stats.uniform(0.3, 0.7).cdf).pvalue > 1e-3
    for begin, extent, whole in ((top, height, size[0]), (left, width, size[1])):
        assert stats.kstest((begin + smooth + 0.5) / (whole - extent + 1), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("ratio", resample.SHARES)
def test_shares_of_tiny_images_and_of_the_whole(ratio):
    assert torch.equal(shares(ratio, 9, (1, 1), (0.01, 0.2)), torch.tensor([[0.0, 0, 1, 1]]).double().expand(9, 4))
    assert torch.equal(shares(ratio, 9, (7, 4), (1.0, 1.0)), torch.tensor([[0.0, 0, 7, 4]]).double().expand(9, 4))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2, 2), (7, 7), (32, 32), (50, 50), (50, 3), (5, 40)])
def test_resized_crops_equal_torchvision(interpolation, size):
    images = torch.randint(0, 256, (6, 3, 40, 33), dtype=torch.uint8)
    images[1] = (images[1] > 127) * 255
    crops = torch.tensor(
        [(0, 40, 0, 33), (3, 38, 2, 32), (10, 12, 30, 33), (0, 1, 0, 33), (5, 25, 7, 27), (39, 40, 32, 33)]
    )
    options = {"interpolation": InterpolationMode(interpolation), "antialias": True}
    edges = torch.stack([crops, crops[:, [0, 1, 3, 2]]])  # as they are, and mirrored
    plain, mirrored = resample.resized_crops(images.float() / 255, edges, size, interpolation=interpolation)
    torch.testing.assert_close(mirrored.flip(3), plain, atol=1e-5, rtol=0)
    for image, (top, bottom, left, right), result in zip(images, crops.tolist(), plain):
        # torchvision clamps between the axes in uint8 only: do the same in float, one axis at a time.
        narrow = F.resized_crop(
            image.float() / 255, top, left, bottom - top, right - left, [bottom - top, size[1]], **options
        )
        exact = F.resize(narrow.clamp(0, 1), size, **options).clamp(0, 1)
        torch.testing.assert_close(result, exact, atol=1e-5, rtol=0)
        byte = F.resized_crop(image, top, left, bottom - top, right - left, size, **options)
        assert byte_difference(result, byte) <= 1


def test_same_size_is_the_identity_and_a_flip_the_mirror():
    images = torch.rand(2, 3, 24, 24)
    edges = torch.tensor([[0, 24, 0, 24], [0, 24, 24, 0]]).unsqueeze(1).expand(2, 2, 4)
    for interpolation in resample.KERNELS:
        same, mirror = resample.resized_crops(images, edges, (24, 24), interpolation=interpolation)
        assert torch.equal(same, images) and torch.equal(mirror, images.flip(3))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fractional_edges_against_a_plain_loop(interpolation):
    def kernel(x: float) -> float:
        x = abs(x)
        if interpolation == "bilinear":
            return max(0.0, 1 - x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    for begin, end, size in [
        (2.3, 9.8, 5),
        (0.0, 12.0, 12),
        (4.1, 4.4, 3),
        (9.8, 2.3, 5),
        (0.2, 11.7, 2),
        (3.0, 7.5, 9),
    ]:
        step = (end - begin) / size
        matrix = resample.resampling_matrix(torch.tensor([[begin, end]]), 12, size, interpolation=interpolation)[0]
        for i in range(size):
            weights = []
            for j in range(12):
                touches = j + 1 > min(begin, end) and j < max(begin, end)
                offset = (j + 0.5 - begin - (i + 0.5) * step) / max(1, abs(step))
                weights.append(kernel(offset) if touches else 0.0)
            expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            torch.testing.assert_close(matrix[i].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("kernel", "size"), [(1, 5), (3, 32), (3, 2), (23, 40), (17, 9), (9, 5)])
def test_blur_equals_torchvision(kernel, size):
    images = torch.randint(0, 256, (5, 3, size, size + 3), dtype=torch.uint8)
    sigmas = torch.tensor([0.1, 0.3, 0.8, 1.5, 2.0], dtype=torch.float64)
    ours = resample.gaussian_blur(images.float() / 255, sigmas, kernel=kernel)
    for image, sigma, result in zip(images, sigmas.tolist(), ours):
        exact = F.gaussian_blur(image.float() / 255, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(result, exact, atol=2e-6, rtol=0)
        assert byte_difference(result, F.gaussian_blur(image, [kernel, kernel], [sigma, sigma])) <= 1


def test_blur_needs_room_to_reflect():
    with pytest.raises(ValueError, match="needs more than 4 pixels, got 4"):
        resample.gaussian_blur(torch.rand(1, 3, 4, 9), torch.ones(1), kernel=9)
