"""CFlow-AD's maps and scores: relative to the training images, and as in the official code; what `fit` finds."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.normalize import normalize
from models.anomaly.cflow import CFlow, rows_of
from runtime.errors import UserError
from tests.images import batches
from tests.models.anomaly.test_cflow import detector, raw_images
from tests.processes import run_processes


def fitted(model: CFlow | None = None, count: int = 6) -> tuple[CFlow, Tensor]:
    model, images = model or detector(), normalize(raw_images(count))
    model.fit(batches(images, 4), count)
    return model, images


def densities(model: CFlow, images: Tensor) -> list[np.ndarray]:
    """log p / C of every position, one vector at a time, from the official formulas."""
    found = []
    with torch.no_grad():
        for flow, feature in zip(model.flows, model.features(images)):
            vectors, positions = rows_of(feature)
            z, log_det = flow(vectors.flatten(0, 1), positions.repeat(len(images), 1))
            channels = z.shape[1]
            logp = channels * -0.9189385332046727 - 0.5 * torch.sum(z**2, 1) + log_det
            found.append((logp / channels).double().numpy().reshape(len(images), *feature.shape[-2:]))
    return found


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, aligned corners, by numpy's own interpolation along each axis."""
    for axis, n in ((1, size[0]), (2, size[1])):
        old = np.arange(grid.shape[axis])
        new = np.linspace(0, grid.shape[axis] - 1, n)
        grid = np.apply_along_axis(lambda line, old=old, new=new: np.interp(new, old, line), axis, grid)
    return grid


def test_maps_and_scores_are_relative_to_the_likeliest_training_position():
    model, images = fitted()
    limits = [grid.max() for grid in densities(model, images)]
    np.testing.assert_allclose(model.likeliest.numpy(), limits, rtol=1e-5)
    model.likeliest -= 0.3  # as if test positions were likelier than any in training
    others = torch.cat([images[:2], normalize(raw_images(1))])
    grids = densities(model, others)
    likelihoods = [np.exp(np.minimum(grid - (limit - 0.3), 0)) for grid, limit in zip(grids, limits)]
    assert all((likelihood == 1).any() and (likelihood < 1).any() for likelihood in likelihoods)
    expected = 2 - sum(enlarged(likelihood, (64, 64)) for likelihood in likelihoods)
    found = model.examine(others)
    np.testing.assert_allclose(found.maps.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(found.scores.numpy(), expected.max((1, 2)), atol=1e-5)
    flat = [np.unravel_index(each.argmax(), each.shape) for each in found.maps.numpy()]
    np.testing.assert_array_equal(found.peaks.numpy(), np.array(flat) + 0.5)
    assert found.maps.min() >= 0 and found.maps.max() <= 2
    alone = model.examine(others[1:2])
    torch.testing.assert_close(alone.maps, found.maps[1:2], rtol=0, atol=1e-5)  # whatever else is tested


def official(model: CFlow, images: Tensor) -> np.ndarray:
    """The maps of the official train.py for a whole test set."""
    score_map = 0
    for grid in densities(model, images):
        test_prob = np.exp(grid - grid.max())
        upsampled = F.interpolate(torch.tensor(test_prob)[:, None], (64, 64), mode="bilinear", align_corners=True)
        score_map = score_map + upsampled[:, 0].numpy()
    return score_map.max() - score_map


def test_the_official_score_is_there_by_name_and_differs_by_one_constant():
    model, images = fitted(detector(normalize="test"))
    assert model.fitted_on == "test" and model.facts() == {"normalized_on": "test"}
    difference = model.examine(images).maps.double().numpy() - official(model, images)
    np.testing.assert_allclose(difference, difference[0, 0, 0], atol=1e-6)
    assert detector().fitted_on == "train"


def test_from_train_to_test_each_stage_changes_by_one_factor():
    model, images = fitted()
    before, limits = 2 - model.examine(images).maps.double().numpy(), model.likeliest.clone()
    grids = densities(model, images)
    model.likeliest = limits + torch.tensor([0.2, 0.5])  # a test set with likelier positions
    factors = np.exp([-0.2, -0.5])
    parts = [enlarged(np.exp(grid - float(limit)), (64, 64)) for grid, limit in zip(grids, limits)]
    np.testing.assert_allclose(sum(parts), before, atol=1e-5)
    after = 2 - model.examine(images).maps.double().numpy()
    np.testing.assert_allclose(sum(f * part for f, part in zip(factors, parts)), after, atol=1e-5)


def test_padding_has_no_say_in_fit_map_and_score():
    model, images = detector(), normalize(raw_images(4))
    for half in (slice(None, 32), slice(32, None)):  # the likeliest of all is in one of them
        valid = torch.zeros(4, 64, 64, dtype=torch.bool)
        valid[:, half] = True
        model.fit(batches(images, 3, valid=valid), 4)
        tops = [grid[:, : grid.shape[1] // 2] for grid in densities(model, images)]
        bottoms = [grid[:, grid.shape[1] // 2 :] for grid in densities(model, images)]
        expected = [grid.max() for grid in (tops if half.start is None else bottoms)]
        np.testing.assert_allclose(model.likeliest.numpy(), expected, rtol=1e-5)
        found = model.examine(images, valid)
        assert (found.maps[~valid] == 0).all() and (found.maps[valid] >= 0).all()
        torch.testing.assert_close(found.scores, found.maps[:, half].amax((1, 2)))
        assert (half.start is None) == bool((found.peaks[:, 0] < 32).all())


def fit_shares(rank: int, world_size: int, *splits: tuple[int, ...]) -> list[Tensor | str]:  # noqa: ARG001
    """The constants when each process has so many of five images, or the complaint."""
    found = []
    for counts in splits:
        torch.manual_seed(9)
        model, images = detector(), normalize(raw_images(5))
        mine = images.split(counts)[rank]
        try:
            model.fit(batches(mine, 1), 5) if len(mine) else model.fit([], 5)
            found.append(model.likeliest)
        except UserError as error:
            found.append(str(error))
    return found


def test_two_processes_fit_as_one():
    expected, none = fit_shares(0, 1, (5,), (0, 5))
    assert "no training image" in none
    for found, none in run_processes(fit_shares, 2, (2, 3), (5, 0)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert "fewer training images than processes" in none


def test_state_dict_round_trip():
    model, images = fitted()
    fresh = detector()
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(fresh.score(images), model.score(images)):
        assert torch.equal(a, b)


def test_bfloat16_scores_are_near():
    model, images = fitted()
    exact = model.examine(images)
    with torch.autocast("cpu", torch.bfloat16):
        model.fit(batches(images, 3), len(images))
        found = model.examine(images)
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps, exact.maps, rtol=0, atol=0.1)
