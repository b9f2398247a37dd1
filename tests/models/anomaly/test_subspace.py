"""Subspace against scikit-learn's PCA and numpy's SVD in float64, and against refits without an image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor, nn

from models.anomaly.subspace import Subspace, moments, residuals, rotated, together, without
from models.backbones.vit import ViT
from runtime.errors import UserError
from tests.images import batches
from tests.processes import run_processes


class Pyramid(nn.Module):
    """Four stages of 5, 4, 6 and 3 channels at strides 4, 8, 16 and 32."""

    def __init__(self, channels: tuple[int, ...] = (5, 4, 6, 3)):
        super().__init__()
        self.mixers = nn.ModuleList(nn.Conv2d(3, each, 1) for each in channels)

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return [mixer(F.avg_pool2d(x, 4 * 2**i)).tanh() for i, mixer in enumerate(self.mixers[:last])]


class TwelveWide(ViT):
    width, heads = 12, 2


def detector(channels: tuple[int, ...] = (5, 4, 6, 3), **options) -> Subspace:
    torch.manual_seed(1)
    return Subspace(Pyramid(channels), **{"stages": (1, 2, 3)} | options)


def raw_images(count: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> Tensor:
    return 2 * torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def fitted(images: Tensor, model: Subspace | None = None, size: int = 4, **options) -> Subspace:
    model = model or detector(**options)
    model.fit(batches(images, size), len(images))
    return model


def residuals_of(model: Subspace, images: Tensor) -> Tensor:
    """(B, h, w)"""
    return residuals(model.patches(model.features(images)), model.mean, model.axes)


def rows_of(model: Subspace, images: Tensor) -> np.ndarray:
    """(B, h, w, D) float64, by an interpolation of its own."""
    stages = model.backbone.eval().forward_stages(images, max(model.stages))
    stages = [stages[stage - 1].detach() for stage in model.stages]
    size = stages[0].shape[-2:]
    joined = torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=False) for each in stages], 1)
    return joined.permute(0, 2, 3, 1).double().numpy()


def plain_residuals(train: np.ndarray, test: np.ndarray, variance: float) -> tuple[np.ndarray, int]:
    """By the SVD of the centered matrix of all patches (n, D) -> of test (..., D), and how many components."""
    mean = train.mean(0)
    _, values, axes = np.linalg.svd(train - mean)
    spread = np.zeros(train.shape[1])
    spread[: len(values)] = values**2
    count = next(k for k in range(len(spread) + 1) if spread[:k].sum() >= variance * spread.sum() * (1 - 1e-13))
    kept = axes[:count]
    away = test - mean
    return ((away - away @ kept.T @ kept) ** 2).sum(-1), count


@pytest.mark.parametrize("variance", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_residuals_are_those_of_scikit_learn_and_of_the_svd(count, variance):
    train, test = raw_images(count), raw_images(3, seed=1)
    model = fitted(train, variance=variance)
    known, new = rows_of(model, train).reshape(-1, 15), rows_of(model, test)
    expected, components = plain_residuals(known, new, variance)
    pca = PCA(n_components=variance, svd_solver="full").fit(known)
    back = pca.inverse_transform(pca.transform(new.reshape(-1, 15)))
    np.testing.assert_allclose(((new.reshape(-1, 15) - back) ** 2).sum(1), expected.ravel(), rtol=1e-9)
    facts = {"patches": count * 96, "dimensions": 15, "components": components}
    assert model.facts() == facts and components == pca.n_components_
    maps = F.interpolate(torch.from_numpy(expected)[:, None], (32, 48), mode="bilinear", align_corners=False)[:, 0]
    maps = np.stack([gaussian_filter(each, 4) for each in maps.numpy()])
    found = model.examine(test)
    np.testing.assert_allclose(found.maps.numpy(), maps, rtol=1e-4)
    top = np.sort(maps.reshape(3, -1))[:, -(32 * 48 // 100) :]
    np.testing.assert_allclose(found.scores.numpy(), top.mean(1), rtol=1e-4)
    assert found.maps.dtype == torch.float32 and found.nearest_image is None
    for image, (y, x) in enumerate(found.peaks.int()):
        assert found.maps[image, y, x] == found.maps[image].max()


def test_fewer_patches_than_dimensions():
    """Three patches span two directions; whatever the share, no more is kept, and all else is residual."""
    model = detector((40, 3, 3, 3), stages=(1,), variance=1.0)
    train, test = raw_images(1, size=(4, 12)), raw_images(4, seed=1, size=(4, 12))
    fitted(train, model)
    expected, _ = plain_residuals(rows_of(model, train).reshape(3, 40), rows_of(model, test), 1.0)
    assert model.facts() == {"patches": 3, "dimensions": 40, "components": 2}
    np.testing.assert_allclose(residuals_of(model, test), expected, rtol=1e-4)
    assert model.examine(train).scores < 1e-9


def test_equal_patches_keep_no_component():
    """Also those equal up to the rounding of float32: the residual is the distance from their mean."""
    test = raw_images(2, seed=1)
    flat = torch.full((3, 3, 32, 48), 0.3)
    for noise in (0.0, 1e-8):
        model = fitted(flat + noise * raw_images(3))
        expected = ((rows_of(model, test) - rows_of(model, flat)[0, 0, 0]) ** 2).sum(-1)
        assert model.facts()["components"] == 0
        np.testing.assert_allclose(residuals_of(model, test), expected, rtol=1e-4)
        assert model.examine(flat, leave_out=torch.arange(3)).scores.max() < 1e-9


def test_directions_of_equal_variance_are_kept_up_to_the_share():
    """Of four equal ones three hold 75 %, exactly; a little more takes the fourth."""
    eye = torch.eye(4)
    rows = torch.cat([eye, -eye])[None, :, None]  # (1, 8, 1, 4)
    for share, components in ((0.75, 3), (0.7501, 4), (0.5, 2), (1.0, 4)):
        model = detector(variance=share)
        model.features = lambda images: [images]
        model.patches = lambda features: features[0]
        fitted(rows, model)
        assert model.facts() == {"patches": 8, "dimensions": 4, "components": components}


@pytest.mark.parametrize("rotations", [1, 3])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_leaving_an_image_out_is_a_refit_without_it(count, rotations):
    numbers = torch.arange(count).flip(0) * 3 + 5
    train, model = raw_images(count) + 3, detector(rotations=rotations, variance=0.8)
    train[0] *= 4  # one that is most of the variance
    model.fit([batch._replace(indices=numbers[batch.indices]) for batch in batches(train, 4)], count)
    chosen = [0, count // 2, count - 1]
    found = model.examine(train[chosen], leave_out=numbers[chosen])
    for row, out in enumerate(chosen):
        rest = [i for i in range(count) if i != out]
        expected = fitted(train[rest], rotations=rotations, variance=0.8).examine(train[[out]])
        torch.testing.assert_close(found.maps[[row]], expected.maps, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.scores[[row]], expected.scores, rtol=1e-4, atol=0)
        within = model.examine(train[[out]]).maps
        assert (found.maps[[row]] / within - 1).abs().max() > 0.01
    test = raw_images(3, seed=1)
    assert torch.equal(model.examine(test, leave_out=torch.tensor([-1, 4, 99])).maps, model.examine(test).maps)
    assert model.examine(test[:0], leave_out=numbers[:0]).scores.shape == (0,)


def test_moments_are_those_of_the_stacked_rows_and_can_be_taken_apart():
    """With a mean far above the spread, where sums of squares would cancel."""
    parts = [1e5 + torch.rand(n, 2, 6, dtype=torch.float64) for n in (1, 4, 9)]
    each, rows = [moments(part, None) for part in parts], torch.cat(parts).flatten(0, 1).numpy()
    whole = together(each)
    assert whole.count == 28
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-15)
    np.testing.assert_allclose(whole.scatter, np.cov(rows.T) * 27, atol=1e-8)
    rest = without(whole, each[1])
    for found, expected in zip(rest, together([each[0], each[2]])):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def test_padding_is_not_learned_and_has_no_score():
    train, test = raw_images(4), raw_images(2, seed=1)
    valid = torch.ones(4, 32, 48, dtype=torch.bool)
    valid[:, :, 24:] = False
    spoilt = train.clone()
    spoilt[..., 24:] = 99
    model, clean = detector(stages=(1,)), detector(stages=(1,))
    model.fit(batches(spoilt, 3, valid=valid), 4)
    fitted(train[..., :24], clean)
    torch.testing.assert_close(model.scatter, clean.scatter, rtol=1e-6, atol=1e-8)
    found, expected = model.examine(spoilt[:2], valid[:2]), clean.examine(train[:2, :, :, :24])
    assert (found.maps[..., 24:] == 0).all() and (found.peaks[:, 1] < 24).all()
    torch.testing.assert_close(found.maps[..., :12], expected.maps[..., :12], rtol=0.2, atol=1e-4)
    others = detector(stages=(1,))
    others.fit(batches(spoilt[1:], 3, valid=valid[1:]), 3)
    left = model.examine(spoilt[:1], valid[:1], torch.tensor([0]))
    torch.testing.assert_close(left.maps, others.examine(spoilt[:1], valid[:1]).maps, rtol=1e-4, atol=1e-9)
    assert model.examine(test).scores.shape == (2,)


def test_rotations():
    """Of a quarter turn they are the images turned; a mask turns with its image, and one of 0 degrees is the image."""
    images = raw_images(2, size=(32, 32))
    for quarter in (1, 2, 3):
        torch.testing.assert_close(rotated(images, quarter / 4), images.rot90(quarter, (2, 3)), rtol=0, atol=1e-4)
    tall = raw_images(1, size=(48, 16))
    torch.testing.assert_close(rotated(tall, 0.5), tall.rot90(2, (2, 3)), rtol=0, atol=1e-4)
    ramp = torch.arange(48.0)[:, None].expand(1, 1, 48, 16)  # a turn of 30 degrees: y is y cos + x sin
    found = rotated(ramp, 1 / 12)[0, 0] - 23.5
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(16) - 7.5, indexing="ij")
    expected = y * np.cos(np.pi / 6) + x * np.sin(np.pi / 6)
    torch.testing.assert_close(found[8:-8], expected[8:-8].float(), rtol=0, atol=1e-3)

    turned = torch.cat([images.rot90(quarter, (2, 3)) for quarter in range(4)])
    model, all_at_once = fitted(images, rotations=4), fitted(turned)
    torch.testing.assert_close(model.scatter, all_at_once.scatter, rtol=1e-4, atol=1e-4)
    assert model.facts() == all_at_once.facts() and len(model.own_counts) == 2 and len(all_at_once.own_counts) == 0
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, 16:] = False
    images[:, :, 16:], masked = 99, detector(rotations=4)
    masked.fit(batches(images, 2, valid=valid), 2)
    assert masked.facts()["patches"] == 2 * 4 * 32
    turned, all_at_once = torch.cat([images.rot90(quarter, (2, 3)) for quarter in range(4)]), detector()
    turned_valid = torch.cat([valid.rot90(quarter, (1, 2)) for quarter in range(4)])
    all_at_once.fit(batches(turned, 2, valid=turned_valid), 8)
    torch.testing.assert_close(masked.scatter, all_at_once.scatter, rtol=1e-3, atol=1e-3)


def test_the_mean_of_a_vision_transformer_s_blocks():
    torch.manual_seed(0)
    net = TwelveWide(patch=8, size=32).eval()
    images = raw_images(5, size=(32, 32))
    model = Subspace(net, stages=(2, 3, 4), combine="mean", variance=0.5)
    fitted(images[:4], model)
    with torch.no_grad():
        rows = torch.stack(net.forward_stages(images)[1:]).mean(0).permute(0, 2, 3, 1).double().numpy()
    expected, components = plain_residuals(rows[:4].reshape(-1, 12), rows[4], 0.5)
    assert model.facts() == {"patches": 64, "dimensions": 12, "components": components}
    np.testing.assert_allclose(residuals_of(model, images[4:])[0], expected, rtol=1e-4)
    with pytest.raises(UserError, match=r"combine=mean: stages \[1, 2, 3\] are 5x8x12, 4x4x6, 6x2x3 here"):
        fitted(raw_images(2), combine="mean")


def test_fitted_state_loads_into_a_fresh_detector():
    test, number = raw_images(2, seed=1), torch.tensor([1, 2])
    for options in ({}, {"rotations": 2}):
        model, fresh = fitted(raw_images(5), **options), detector(**options)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.score(test)[0], model.score(test)[0])
        assert torch.equal(fresh.score(test, leave_out=number)[0], model.score(test, leave_out=number)[0])


def test_user_errors():
    with pytest.raises(UserError, match="combine"):
        detector(combine="sum")
    with pytest.raises(UserError, match="no training image"):
        detector().fit([], 0)
    with pytest.raises(UserError, match="not fitted"):
        detector().score(raw_images(1))
    with pytest.raises(UserError, match="one training image"):
        fitted(raw_images(1)).examine(raw_images(1), leave_out=torch.zeros(1, dtype=torch.int64))
    model, spoilt = fitted(raw_images(4)), raw_images(4)
    spoilt[2, 0, 5, 7] = float("nan")
    with pytest.raises(UserError, match="training images: row 2 of 4 holds NaN"):
        fitted(spoilt)
    with pytest.raises(UserError, match="images: row 0 of 2 holds NaN"):
        model.score(spoilt[2:])


def fit_shares(rank: int, _: int) -> list[dict[str, Tensor]]:
    """9 images: process 0 has 6 of them, in three batches, process 1 has 3."""
    mine = torch.tensor([[8, 0, 5, 2, 3, 1], [7, 4, 6]][rank])
    states = []
    for rotations in (1, 2):
        model = detector(rotations=rotations)
        model.fit([some._replace(indices=mine[some.indices]) for some in batches(raw_images(9)[mine], 2)], 9)
        scores = model.examine(raw_images(9), leave_out=torch.arange(9)).scores
        state = {name: value for name, value in model.state_dict().items() if "backbone" not in name}
        states.append({**state, "axes": state["axes"] @ state["axes"].T, "scores": scores})
        with pytest.raises(UserError, match="fewer training images than processes"):  # on both
            detector(rotations=rotations).fit(batches(raw_images(1), 1) if rank else [], 1)
    return states


def test_two_processes_hold_the_state_of_one():
    found = run_processes(fit_shares, 2)
    for number, rotations in enumerate((1, 2)):
        alone = fitted(raw_images(9), rotations=rotations)
        expected = alone.state_dict() | {"axes": alone.axes @ alone.axes.T}  # eigenvectors have no sign
        expected["scores"] = alone.examine(raw_images(9), leave_out=torch.arange(9)).scores
        for states in found:
            for name, value in states[number].items():
                torch.testing.assert_close(
                    value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
