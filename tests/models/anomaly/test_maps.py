"""Anomaly maps against scipy's blur and bilinear interpolation written out."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.anomaly.cdo import CDO
from models.anomaly.maps import blank, grid_valid, image_score, peak, render, smooth, smooth_inside, upsample
from models.anomaly.padim import PaDiM
from models.anomaly.patchcore import PatchCore
from models.anomaly.rd4ad import RD4AD
from models.anomaly.subspace import Subspace
from models.backbones.resnet import ResNet18
from tests.images import batches


@pytest.mark.parametrize("shape", [(64, 48), (33, 16), (17, 5), (2, 3), (1, 1), (1, 40)])
@pytest.mark.parametrize("sigma", [4.0, 1.3])
def test_smooth_equals_scipy_also_where_the_map_is_smaller_than_the_kernel(shape, sigma):
    maps = torch.rand(3, *shape)
    expected = np.stack([gaussian_filter(each, sigma) for each in maps.double().numpy()])
    assert np.abs(smooth(maps.double(), sigma).numpy() - expected).max() < 1e-12
    blurred = smooth(maps, sigma)
    assert blurred.dtype == torch.float32 and np.abs(blurred.numpy() - expected).max() < 1e-6


def test_smooth_defaults_to_sigma_4_and_treats_axes_alike():
    maps = torch.rand(2, 40, 23)
    assert np.abs(smooth(maps)[1].numpy() - gaussian_filter(maps[1].double().numpy(), 4)).max() < 1e-6
    assert torch.allclose(smooth(maps.transpose(1, 2)), smooth(maps).transpose(1, 2), atol=1e-7)


def test_smooth_keeps_its_precision_under_autocast():
    maps = torch.rand(1, 30, 30)
    with torch.autocast("cpu", torch.bfloat16):
        inside = smooth(maps)
    assert torch.equal(inside, smooth(maps))


def interpolate(grid: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Bilinear interpolation of one (h, w) grid, pixel by pixel, the border repeated."""
    out = np.zeros(size)
    for i, j in np.ndindex(*size):
        at, corners = [], []
        for target, n_in, n_out in ((i, grid.shape[0], size[0]), (j, grid.shape[1], size[1])):
            if align_corners:
                x = target * (n_in - 1) / (n_out - 1)
            else:
                x = min(max((target + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
            low = min(int(x), n_in - 1)
            corners.append((low, min(low + 1, n_in - 1)))
            at.append(x - low)
        (top, bottom), (left, right) = corners
        upper = grid[top, left] * (1 - at[1]) + grid[top, right] * at[1]
        lower = grid[bottom, left] * (1 - at[1]) + grid[bottom, right] * at[1]
        out[i, j] = upper * (1 - at[0]) + lower * at[0]
    return out


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(12, 20), (7, 9)])
def test_upsample_is_bilinear(align_corners, size):
    grid = torch.rand(2, 3, 5, dtype=torch.float64)
    expected = np.stack([interpolate(each.numpy(), size, align_corners) for each in grid])
    assert np.abs(upsample(grid, size, align_corners=align_corners).numpy() - expected).max() < 1e-12


def test_one_value_becomes_a_flat_map():
    flat = smooth(upsample(torch.tensor([[[2.5]]]), (9, 9), align_corners=True))
    assert torch.allclose(flat, torch.full((1, 9, 9), 2.5))


def test_render_averages_over_valid_patches_alone():
    """Normalized convolution, every weight of upsampling and blur written out: what padding holds has no influence."""
    grid, valid = torch.rand(2, 5, 6), torch.rand(2, 5, 6) > 0.4
    size, spread = (20, 24), []
    for cell in range(30):  # the weight of every patch in every pixel
        one = np.zeros(30)
        one[cell] = 1
        spread.append(gaussian_filter(interpolate(one.reshape(5, 6), size, align_corners=False), 4))
    weights = np.stack(spread)  # (30, 20, 24)
    for image in range(2):
        w = weights * valid[image].double().numpy().reshape(30, 1, 1)
        expected = (w * grid[image].double().numpy().reshape(30, 1, 1)).sum(0) / w.sum(0)
        np.testing.assert_allclose(render(grid, size, valid)[image].numpy(), expected, atol=1e-5)
    spoilt = torch.where(valid, grid, torch.tensor(1e6))
    assert torch.equal(render(spoilt, size, valid), render(grid, size, valid))
    torch.testing.assert_close(render(grid, size, torch.ones_like(valid)), render(grid, size))


def test_a_patch_is_valid_when_half_of_it_is():
    valid = torch.zeros(3, 10, 30, dtype=torch.bool)
    valid[0, :, :14] = True  # the second column of patches has 4 of its 10
    valid[1, :, :16] = True  # and here 6
    valid[2, 0, 21] = True  # nothing has half
    assert grid_valid(valid, (1, 3)).tolist() == [[[True, False, False]], [[True, True, False]], [[False, False, True]]]
    assert not grid_valid(torch.zeros(1, 4, 4, dtype=torch.bool), (2, 2)).any()


def by_sorting(pixels: list[float], how: str) -> float:
    """The image score of one image's pixels, in float64."""
    ordered = sorted(pixels, reverse=True)
    if how == "top1":
        ordered = ordered[: max(1, len(ordered) // 100)]
    return ordered[0] if how == "max" else sum(ordered) / len(ordered)


@pytest.mark.parametrize("how", ["max", "top1", "mean"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 11), (2, 10, 10), (2, 20, 15), (4, 33, 40)])
@pytest.mark.parametrize("levels", [0, 3])
def test_image_scores_equal_a_sorted_list(how, shape, levels):
    """99, 100 and 300 pixels stand at the edges of 1 %; `levels` values make ties, also where the 1 % ends."""
    maps = torch.randint(levels, shape).double() if levels else torch.randn(shape, dtype=torch.float64) - 4
    expected = [by_sorting(each.flatten().tolist(), how) for each in maps]
    np.testing.assert_allclose(image_score(maps, None, how).numpy(), expected, rtol=1e-12, atol=1e-15)
    valid = torch.rand(shape) > 0.4
    valid[:, 0, 0] = True
    spoilt = maps.where(valid, 1e6)
    expected = [by_sorting(each[inside].tolist(), how) for each, inside in zip(maps, valid)]
    np.testing.assert_allclose(image_score(spoilt, valid, how).numpy(), expected, rtol=1e-12, atol=1e-15)


def test_image_scores_at_the_ends():
    maps = torch.rand(2, 12, 13)
    one = torch.zeros(2, 12, 13, dtype=torch.bool)
    one[0, 3, 5] = True  # one pixel of image, and an image that is padding alone
    for how in ("max", "top1", "mean"):
        assert image_score(maps, one, how).tolist() == [maps[0, 3, 5].item(), 0]
        assert image_score(maps[:0], None, how).shape == (0,)
        assert torch.equal(image_score(maps, torch.ones_like(one), how), image_score(maps, None, how))
    with pytest.raises(ValueError, match="max, top1 or mean"):
        image_score(maps, None, "median")


def test_the_peak_is_the_centre_of_the_largest_pixel_outside_padding():
    maps = torch.zeros(2, 5, 7)
    maps[0, 4, 6], maps[1, 2, 3], maps[1, 0, 1] = 1, 2, 1
    assert peak(maps).tolist() == [[4.5, 6.5], [2.5, 3.5]]
    assert peak(maps, maps < 2).tolist() == [[4.5, 6.5], [0.5, 1.5]]


def test_smoothing_inside_takes_nothing_from_padding():
    maps, valid = torch.rand(1, 20, 30), torch.zeros(1, 20, 30, dtype=torch.bool)
    valid[:, :, :17] = True
    expected = gaussian_filter((maps * valid)[0].double().numpy(), 4) / gaussian_filter(valid[0].double().numpy(), 4)
    found = smooth_inside(maps.masked_fill(~valid, 1e6), valid)
    np.testing.assert_allclose(blank(found, valid)[0, :, :17].numpy(), expected[:, :17], atol=1e-5)
    assert torch.equal(smooth_inside(maps, None), smooth(maps))


@pytest.mark.parametrize(
    ("build", "own"),
    [(PatchCore, "patch"), (PaDiM, "max"), (Subspace, "top1"), (RD4AD, "max"), (CDO, "top1")],
    ids=lambda x: str(x),
)
def test_every_detector_takes_each_image_score_and_defaults_to_its_papers(build, own):
    images, scores = torch.randn(3, 3, 64, 64), {}
    for how in ("max", "top1", "mean", own, None):
        torch.manual_seed(0)
        model = build(ResNet18(), **({} if how is None else {"image_score": how}))
        if model.fits:
            model.fit(batches(images, 3), 3)
        found = model.examine(images + 0.1)
        scores[how] = found.scores
        if how in ("max", "top1", "mean"):
            assert torch.equal(found.scores, image_score(found.maps, None, how))
    assert torch.equal(scores[None], scores[own])
    assert all(scores["max"] > scores["top1"]) and all(scores["top1"] > scores["mean"])
