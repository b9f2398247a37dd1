"""CutPaste's densities against scikit-learn, its maps against Grad-CAM image by image, and what it loads."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn

from data.normalize import normalize
from models.anomaly.cutpaste import CutPaste
from models.anomaly.maps import pool
from runtime.errors import UserError
from tests.images import batches
from tests.models.anomaly.test_cutpaste import Tiny, detector, raw_images, step_of
from tests.processes import run_processes


def fitted(images: Tensor, **options) -> CutPaste:
    """With batch norms that have seen two batches, fitted on batches of 5."""
    model = detector(**options).train()
    for epoch in range(2):
        model(*step_of(model, images, epoch=epoch))
    model.fit(batches(normalize(images), 5), len(images))
    return model


def embeddings(model: CutPaste, images: Tensor) -> np.ndarray:
    """In float64, each image by itself, of length 1."""
    with torch.no_grad():
        stages = [model.eval().backbone.forward_stages(image[None])[3][0] for image in normalize(images)]
    vectors = np.stack([stage.double().mean((1, 2)).numpy() for stage in stages])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_scores_are_scikit_learns(density):
    train, test = raw_images(24), raw_images(7, seed=1)
    model = fitted(train, density=density)
    normal, x = embeddings(model, train), embeddings(model, test)
    if density == "gaussian":
        fit = LedoitWolf().fit(normal)
        assert 0 < fit.shrinkage_ < 1
        expected = np.sqrt(fit.mahalanobis(x))
    else:
        expected = -KernelDensity(kernel="gaussian", bandwidth=1).fit(normal).score_samples(x)
    found = model.train().examine(normalize(test))
    assert model.training
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=2e-4)
    assert len(set(found.scores.tolist())) == 7


def heat_by_hand(model: CutPaste, image: Tensor, train: np.ndarray) -> np.ndarray:
    """One image's map: Grad-CAM of the squared distance or of minus the log density, by autograd of everything."""
    stage = model.eval().backbone.forward_stages(image[None].requires_grad_())[3].double()
    stage.retain_grad()
    x = stage.mean((2, 3))[0]
    x = x / x.square().sum().sqrt()
    normal = torch.from_numpy(train)
    if model.density == "gaussian":
        fit = LedoitWolf().fit(train)
        delta = x - torch.from_numpy(fit.location_)
        target = delta @ torch.linalg.inv(torch.from_numpy(fit.covariance_)) @ delta
    else:
        target = -((x - normal).square().sum(1) / -2).exp().mean().log()
    target.backward()
    heat = sum(g.mean() * a for g, a in zip(stage.grad[0], stage.detach()[0])).clamp(min=0)
    large = nn.functional.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
    return gaussian_filter(large.numpy(), 4)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_maps_are_grad_cam_of_the_score_image_by_image(density):
    train, test = raw_images(24), normalize(raw_images(5, seed=1))
    model = fitted(train, density=density)
    normal = embeddings(model, train)
    model.zero_grad()
    found = model.examine(test)
    assert all(p.grad is None for p in model.parameters())
    for i, image in enumerate(test):
        expected = heat_by_hand(model, image, normal)
        np.testing.assert_allclose(found.maps[i].numpy(), expected, rtol=2e-3, atol=2e-3 * expected.max())
        assert found.maps[i].max() > 0
        y, x = (int(v) for v in found.peaks[i])
        assert found.maps[i, y, x] == found.maps[i].max()
        alone = model.examine(test[i : i + 1])
        torch.testing.assert_close(alone.maps[0], found.maps[i], rtol=1e-3, atol=1e-3 * float(expected.max()))
    with torch.inference_mode():  # as predict.py calls it
        again = model.examine(test.clone())
    assert torch.equal(again.maps, found.maps) and torch.equal(again.scores, found.scores)
    assert not found.maps.requires_grad and not found.scores.requires_grad
    nothing = model.examine(test[:0])
    assert nothing.scores.shape == (0,) and nothing.maps.shape == (0, 64, 48)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_the_slope_is_autograd_s(density):
    model = fitted(raw_images(24), density=density)
    stage = normalize(raw_images(5, seed=1))
    x = pool(*model.networks(stage), None).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.unlikeliness(x).sum(), x)
    torch.testing.assert_close(model.slope(x.detach()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["max", "top1", "mean"])
def test_the_score_may_be_of_the_map(how):
    model = fitted(raw_images(24), image_score=how)
    maps, scores = model.score(normalize(raw_images(3, seed=1)))
    ordered = maps.flatten(1).sort(descending=True).values
    count = {"max": 1, "top1": 64 * 48 // 100, "mean": 64 * 48}[how]
    torch.testing.assert_close(scores, ordered[:, :count].mean(1))


def test_padding_enters_neither_score_nor_map():
    model = fitted(raw_images(24))
    images, valid = normalize(raw_images(2, seed=1)), torch.zeros(2, 64, 48, dtype=torch.bool)
    valid[:, :40] = True  # 2.5 of the 4 rows of patches
    with torch.no_grad():
        stage = model.eval().backbone.forward_stages(images)[3]
        cut = model.unlikeliness(stage[:, :, :3].mean((2, 3))).sqrt()
    with torch.inference_mode():
        found = model.examine(images.clone(), valid.clone())
    torch.testing.assert_close(found.scores, cut.float(), rtol=1e-5, atol=0)
    assert (found.maps[~valid] == 0).all() and (found.maps.amax((1, 2)) > 0).all()
    whole = model.examine(images, torch.ones_like(valid))
    torch.testing.assert_close(whole.scores, model.examine(images).scores)


def fitted_in_parts(rank: int, world_size: int) -> list[Tensor]:
    images = raw_images(9)
    model = detector()
    mine = torch.arange(9)[rank::world_size]
    parts = [batch._replace(indices=mine[batch.indices]) for batch in batches(normalize(images[mine]), 2)]
    model.fit(parts, 9)
    return [model.mean, model.cholesky]


def test_processes_fit_the_images_of_all():
    expected = fitted_in_parts(0, 1)
    for state in run_processes(fitted_in_parts, 2):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_a_fitted_one_loads_from_its_run(density):
    model, images = fitted(raw_images(12), density=density), normalize(raw_images(2, seed=1))
    fresh = CutPaste(Tiny(), density=density)
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(fresh.score(images), model.score(images)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_what_was_trained_serves_either_density_and_what_was_fitted_is_forgotten(density):
    model, images = fitted(raw_images(12), density="gaussian"), normalize(raw_images(2, seed=1))
    other = CutPaste(Tiny(), density=density)
    other.load_trained(model.state_dict(), "last.pt")
    assert torch.equal(other.eval().networks(images)[0], model.eval().networks(images)[0])
    with pytest.raises(UserError, match="CutPaste is not fitted"):
        other.score(images)
