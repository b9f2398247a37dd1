"""PaDiM against covariances inverted position by position in float64, and against refits without an image."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from models.anomaly.detector import Batch
from models.anomaly.padim import PaDiM
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.processes import run_processes

FORMS = ["covariance", "low_rank"]


class Pyramid(nn.Module):
    """Four stages of 5, 4, 6 and 3 channels at strides 4, 8, 16 and 32: so few that n > d is cheap."""

    def __init__(self):
        super().__init__()
        self.mixers = nn.ModuleList(nn.Conv2d(3, channels, 1) for channels in (5, 4, 6, 3))

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return [mixer(F.avg_pool2d(x, 4 * 2**i)).tanh() for i, mixer in enumerate(self.mixers[:last])]


def detector(backbone: type = Pyramid, **options) -> PaDiM:
    torch.manual_seed(1)
    return PaDiM(backbone(), **options)


def raw_images(count: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> Tensor:
    return 2 * torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def batches(images: Tensor, size: int = 4, numbers: Tensor | None = None) -> list[Batch]:
    numbers = torch.arange(len(images)) if numbers is None else numbers
    return [Batch(part, None, some) for part, some in zip(images.split(size), numbers.split(size))]


def fitted(images: Tensor, backbone: type = Pyramid, **options) -> PaDiM:
    model = detector(backbone, **options)
    model.fit(batches(images), len(images))
    return model


def embedding_concat(x: Tensor, y: Tensor) -> Tensor:
    """xiahaifeng1995's function of this name, as described: y's values spread over x's blocks by unfold and fold."""
    (b, c1, h1, w1), (_, c2, h2, w2) = x.shape, y.shape
    s = h1 // h2
    x = F.unfold(x, kernel_size=s, dilation=1, stride=s).view(b, c1, -1, h2, w2)
    z = torch.zeros(b, c1 + c2, x.shape[2], h2, w2)
    for i in range(x.shape[2]):
        z[:, :, i] = torch.cat((x[:, :, i], y), 1)
    return F.fold(z.view(b, -1, h2 * w2), kernel_size=s, output_size=(h1, w1), stride=s)


def plain_rows(model: PaDiM, images: Tensor) -> np.ndarray:
    """(B, P, d) float64."""
    with torch.no_grad():
        stages = [model.backbone.eval().forward_stages(images)[stage - 1] for stage in model.stages]
    joined = stages[0]
    for stage in stages[1:]:
        joined = embedding_concat(joined, stage)
    return joined[:, model.drawn].flatten(2).permute(0, 2, 1).double().numpy()


def plain_distances(model: PaDiM, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """(B, P): the reference's loops. train (n, P, d), test (B, P, d)."""
    out, ridge = np.zeros(test.shape[:2]), model.regularization * np.eye(train.shape[2])
    for position in range(train.shape[1]):
        at = train[:, position]
        covariance = np.atleast_2d(np.cov(at, rowvar=False)) + ridge if len(at) > 1 else ridge
        inverse = np.linalg.inv(covariance)
        for image in range(len(test)):
            out[image, position] = mahalanobis(test[image, position], at.mean(0), inverse)
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 3, 12, 40])  # below, and far above, 15 channels
def test_both_forms_are_the_plain_loop(count, form):
    train, test = raw_images(count), raw_images(3, seed=1)
    model = fitted(train, form=form)
    assert model.factor.shape == (96, *[15 if form == "covariance" else count] * 2)
    expected = plain_distances(model, plain_rows(model, train), plain_rows(model, test))
    grid = model.distances(model.embed(model.features(test)))
    np.testing.assert_allclose(grid.flatten(1).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(("options", "d"), [({"channels": 100}, 100), ({"stages": (1, 2)}, 192)])
@pytest.mark.parametrize("form", FORMS)
def test_a_resnet_at_the_reference_s_setting(options, d, form):
    train, test = raw_images(9, size=(64, 64)), raw_images(2, seed=1, size=(64, 64))
    model = fitted(train, ResNet18, form=form, **options)
    expected = plain_distances(model, plain_rows(model, train), plain_rows(model, test))
    grid = model.distances(model.embed(model.features(test)))
    assert model.mean.shape == (16, 16, d)
    np.testing.assert_allclose(grid.flatten(1).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 4, 12])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_few_random_channels_leave_stages_without_any(d, count, form):
    """The finest stage, too, whose resolution stays that of the map; leaving an image out is still a refit."""
    train, test, drawn = raw_images(count), raw_images(2, seed=1), set()
    for seed in (0, 1, 7):
        model = fitted(train, channels=d, form=form, seed=seed)
        drawn |= {int(channel > 4) + int(channel > 8) for channel in model.drawn} if d == 1 else {0, 1, 2}
        expected = plain_distances(model, plain_rows(model, train), plain_rows(model, test))
        grid = model.distances(model.embed(model.features(test)))
        assert grid.shape == (2, 8, 12) and model.mean.shape == (8, 12, d)
        np.testing.assert_allclose(grid.flatten(1).numpy(), expected, rtol=1e-4, atol=1e-5)  # d = 1: may be near 0
        assert model.score(test)[0].shape == (2, 32, 48)
        if count > 2:
            rest = fitted(train[1:], channels=d, form=form, seed=seed).score(train[:1])
            left = model.score(train[:1], leave_out=torch.tensor([0]))
            torch.testing.assert_close(left, rest, rtol=2e-4, atol=1e-6)
    assert drawn == {0, 1, 2}  # each stage was the only one once


def test_maps_and_scores():
    train, test = raw_images(8), raw_images(3, seed=1)
    test[1, :, 8:16, 20:32] += 5
    model = fitted(train)
    grid = model.distances(model.embed(model.features(test)))
    found = model.examine(test)
    expected = F.interpolate(grid[:, None], (32, 48), mode="bilinear", align_corners=False)[:, 0].double().numpy()
    expected = np.stack([gaussian_filter(each, 4) for each in expected])
    np.testing.assert_allclose(found.maps.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.scores.numpy(), expected.max((1, 2)), rtol=1e-5)
    for image, (y, x) in enumerate(found.peaks.int()):
        assert found.maps[image, y, x] == found.scores[image]
    assert found.maps.dtype == torch.float32 and found.nearest_image is None


def test_channels_are_those_of_the_reference():
    model = fitted(raw_images(3, size=(64, 64)), ResNet18, channels=100)
    random.seed(1024)
    assert model.drawn.tolist() == sorted(random.sample(range(448), 100))
    state = random.getstate()
    model.draw(448)
    assert random.getstate() == state  # the global generator is left alone


@pytest.mark.parametrize(("count", "channels", "low_rank"), [(9, None, True), (10, None, False), (8, 6, False)])
def test_auto_takes_the_form_that_stores_less(count, channels, low_rank):
    assert (fitted(raw_images(count), channels=channels).deviations.shape[1] > 0) == low_rank


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_leaving_an_image_out_is_a_refit_without_it(count, form):
    numbers = torch.arange(count).flip(0) * 3 + 5
    train, model = raw_images(count), detector(form=form)
    model.fit(batches(train, numbers=numbers), count)
    chosen = [0, count // 2, count - 1]
    found = model.examine(train[chosen], leave_out=numbers[chosen])
    for row, out in enumerate(chosen):
        rest = [i for i in range(count) if i != out]
        expected = fitted(train[rest], form=form).examine(train[[out]])
        torch.testing.assert_close(found.maps[[row]], expected.maps, rtol=2e-4, atol=0)
        torch.testing.assert_close(found.scores[[row]], expected.scores, rtol=2e-4, atol=0)


def test_images_that_were_not_fitted_are_not_left_out():
    model, test = fitted(raw_images(4)), raw_images(3, seed=1)
    assert torch.equal(model.examine(test, leave_out=torch.tensor([-1, 4, 99])).maps, model.examine(test).maps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 5])
def test_one_or_identical_images_have_the_regularization_for_covariance(count, form):
    train, test = raw_images(1).expand(count, -1, -1, -1), raw_images(2, seed=1)
    model = fitted(train, form=form)
    away = plain_rows(model, test) - plain_rows(model, train[:1])
    grid = model.distances(model.embed(model.features(test)))
    np.testing.assert_allclose(grid.flatten(1), np.linalg.norm(away, axis=2) / 0.1, rtol=1e-5)
    assert model.examine(train[:1]).scores < 1e-4  # other batch sizes round differently
    if count == 1:
        with pytest.raises(UserError, match="one training image"):
            model.examine(train, leave_out=torch.zeros(1, dtype=torch.int64))
    else:
        assert model.examine(train[:1], leave_out=torch.tensor([3])).scores < 1e-6


def test_forms_agree_on_large_features():
    """The regularization is far below the variance, as it is in networks of large features."""
    train, test = 30 * torch.randn(20, 1, 64), 30 * torch.randn(5, 1, 64)
    models = [detector(form=form) for form in FORMS]
    for model in models:
        model.features = lambda images: [images.permute(0, 2, 1)[..., None]]
        model.fit(batches(train), 20)
    for images, rtol in ((test, 1e-4), (train, 1e-3)):  # |delta|^2 - delta^T X^T a would cancel for those fitted
        a, b = (model.distances(model.embed(model.features(images))) for model in models)
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)


def test_fitted_state_loads_into_a_fresh_detector():
    test = raw_images(2, seed=1)
    for options, count in (({"channels": 7}, 5), ({}, 30), ({"form": "low_rank"}, 6)):
        model, fresh = fitted(raw_images(count), **options), PaDiM(Pyramid(), **options)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.score(test)[0], model.score(test)[0])
        number = torch.tensor([1, 2])
        assert torch.equal(fresh.score(test, leave_out=number)[0], model.score(test, leave_out=number)[0])


def test_a_memory_limit_changes_nothing():
    free, bound = (fitted(raw_images(9), memory_limit=limit).state_dict() for limit in (None, 0.0))
    assert all(torch.equal(value, bound[name]) for name, value in free.items())


def test_scores_do_not_depend_on_the_batch():
    model, test = fitted(raw_images(9)), raw_images(5, seed=1)
    parts = [model.examine(image[None]) for image in test]
    torch.testing.assert_close(model.examine(test).maps, torch.cat([part.maps for part in parts]), rtol=1e-5, atol=0)


def test_user_errors():
    with pytest.raises(UserError, match="form"):
        detector(form="full")
    with pytest.raises(UserError, match=r"channels=16, but stages .* have 15"):
        fitted(raw_images(2), channels=16)
    with pytest.raises(UserError, match="no training image"):
        detector().fit([], 0)
    with pytest.raises(UserError, match="not fitted"):
        detector().score(raw_images(1))
    model, spoilt = fitted(raw_images(4)), raw_images(4)
    with pytest.raises(UserError, match="fitted on 8 x 12 positions, and these images have 12 x 8"):
        model.score(raw_images(1, size=(48, 32)))
    spoilt[2, 0, 5, 7] = float("nan")
    with pytest.raises(UserError, match="training images: row 2 of 4 holds NaN"):
        fitted(spoilt)
    with pytest.raises(UserError, match="images: row 0 of 2 holds NaN"):
        model.score(spoilt[2:])
    valid = torch.ones(4, 32, 48, dtype=torch.bool)
    assert torch.equal(model.score(raw_images(4), valid)[0], model.score(raw_images(4))[0])
    valid[3, :, :2] = False
    with pytest.raises(UserError, match="padding"):
        model.score(raw_images(4), valid)
    with pytest.raises(UserError, match="padding"):
        detector().fit([Batch(raw_images(4), valid, torch.arange(4))], 4)


def fit_shares(rank: int, _: int) -> list[dict[str, Tensor]]:
    """Both forms on 9 images: process 0 has 6 of them, in three batches, process 1 has 3."""
    mine = torch.tensor([[8, 0, 5, 2, 3, 1], [7, 4, 6]][rank])
    states = []
    for form in FORMS:
        model = detector(form=form)
        model.fit(batches(raw_images(9)[mine], 2, mine), 9)
        states.append({name: value for name, value in model.state_dict().items() if "backbone" not in name})
        with pytest.raises(UserError, match="fewer training images than processes"):  # on both
            detector(form=form).fit(batches(raw_images(1)) if rank else [], 1)
    return states


def test_two_processes_hold_the_state_of_one():
    alone = [fitted(raw_images(9), form=form).state_dict() for form in FORMS]
    for states in run_processes(fit_shares, 2):
        for state, expected in zip(states, alone):
            for name, value in state.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
