"""The embedding baseline against brute force and scikit-learn, and what all detectors share (detector.py)."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from models.anomaly.detector import Batch
from models.anomaly.embedding import Embedding
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.processes import run_processes

MAHALANOBIS = {"distance": "mahalanobis"}


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return ResNet18(stem="cifar")


def raw_images(count: int, seed: int = 0) -> Tensor:
    """Smooth random textures: they differ from each other more than noise would under average pooling."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear") + torch.randn(
        count, 3, 1, 1, generator=generator
    )


def batches(images: Tensor, size: int = 5, numbers: Tensor | None = None, valid: Tensor | None = None) -> list[Batch]:
    numbers = torch.arange(len(images)) if numbers is None else numbers
    regions = [None] * len(images) if valid is None else valid.split(size)
    return [Batch(*parts) for parts in zip(images.split(size), regions, numbers.split(size))]


def fitted(images: Tensor, net: nn.Module | None = None, **options) -> Embedding:
    detector = Embedding(net or backbone(), **options)
    detector.fit(batches(images), len(images))
    return detector


def vectors(net: nn.Module, images: Tensor, stages: tuple[int, ...] = (4,)) -> np.ndarray:
    """Embeddings in float64, each image on its own."""
    with torch.no_grad():
        outputs = [net.eval().forward_stages(image[None]) for image in images]
    return np.stack([np.concatenate([o[s - 1][0].double().mean((1, 2)).numpy() for s in stages]) for o in outputs])


@pytest.mark.parametrize(("k", "stages"), [(1, (4,)), (2, (4,)), (12, (2, 4))])
def test_knn_is_the_mean_distance_to_the_k_nearest(k, stages):
    net, train, test = backbone(), raw_images(12), raw_images(5, seed=1)
    detector = Embedding(net, k=k, stages=stages)
    numbers = torch.randperm(12) * 2 + 1
    detector.fit(batches(train, numbers=numbers), 12)
    found = detector.examine(test)
    distances = np.linalg.norm(vectors(net, test, stages)[:, None] - vectors(net, train, stages)[None], axis=2)
    assert found.maps is None and found.scores.shape == (5,)
    np.testing.assert_allclose(found.scores.numpy(), np.sort(distances)[:, :k].mean(1), rtol=1e-5)
    assert found.nearest_image.tolist() == numbers[distances.argmin(1)].tolist()


def test_embedding_of_a_resnet_is_its_pooled_output():
    net, images = backbone(), raw_images(2)
    for source in ("stages", "output"):
        assert torch.allclose(fitted(images, net, k=1, source=source).bank, net(images), atol=1e-6)


class Tokens(nn.Module):
    """As a transformer: its output is one token of 8 numbers, or all of them."""

    def __init__(self, tokens: slice | int):
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, 8, 4, stride=4), tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).mT[:, self.tokens]  # (B, 8) or (B, T, 8)


@pytest.mark.parametrize("options", [{}, MAHALANOBIS, {"normalize": True, "combine": "sum"}])
def test_a_class_token_is_compared_as_it_is(options):
    net, train, test = Tokens(0), raw_images(12), raw_images(4, seed=1)
    detector = fitted(train, net, source="output", k=1, **options)
    a, b = (net(x).detach().double().numpy() for x in (test, train))
    if "normalize" in options:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = np.linalg.norm(a[:, None] - b, axis=2).min(1)
    if "distance" in options:
        expected = np.sqrt(LedoitWolf().fit(b).mahalanobis(a))
    np.testing.assert_allclose(detector.score(test)[1], expected, rtol=1e-4)
    with pytest.raises(UserError, match=r"\(5, 16, 8\), not \(B, D\)"):
        fitted(train, Tokens(slice(None)), source="output")
    with pytest.raises(UserError, match="source=output pools padding"):
        detector.score(test, torch.zeros(4, 16, 16, dtype=torch.bool))


def test_normalize_compares_directions():
    net, train, test = backbone(), raw_images(6), raw_images(3, seed=1)
    detector = fitted(train, net, k=1, normalize=True)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors(net, test), vectors(net, train)))
    nearest = np.sqrt(2 - 2 * (a @ b.T).max(1))
    np.testing.assert_allclose(detector.score(test)[1].numpy(), nearest, rtol=1e-4)


@pytest.mark.parametrize("count", [5, 40])  # both below the 512 dimensions
def test_mahalanobis_equals_scikit_learn(count):
    net, train, test = backbone(), raw_images(count), raw_images(7, seed=1)
    detector = fitted(train, net, **MAHALANOBIS)
    expected = np.sqrt(LedoitWolf().fit(vectors(net, train)).mahalanobis(vectors(net, test)))
    assert detector.cholesky.dtype == torch.float64
    np.testing.assert_allclose(detector.score(test)[1].numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("options", [{"k": 2}, {"k": 2, "distance": "knn_squared"}, MAHALANOBIS])
def test_sum_adds_the_distances_of_the_stages(options, normalize):
    net, train, test = backbone(), raw_images(9), raw_images(4, seed=1)
    options = options | {"normalize": normalize}
    each = [fitted(train, net, stages=(stage,), **options).score(test)[1] for stage in (1, 3, 4)]
    both = fitted(train, net, stages=(1, 3, 4), combine="sum", **options)
    torch.testing.assert_close(both.score(test)[1], sum(each), rtol=1e-4, atol=0)
    number = torch.tensor([3, 8])
    each = [
        fitted(train, net, stages=(stage,), **options).score(train[number], leave_out=number)[1] for stage in (1, 3, 4)
    ]
    torch.testing.assert_close(both.score(train[number], leave_out=number)[1], sum(each), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("k", "stages"), [(1, (4,)), (2, (4,)), (5, (2, 4))])
def test_knn_squared_is_the_sum_of_the_squared_distances(k, stages):
    """PANDA's knn_score: what faiss.IndexFlatL2 returns, summed. With k=1 it ranks as `knn`, with more perhaps not."""
    net, train, test = backbone(), raw_images(12), raw_images(5, seed=1)
    detector = fitted(train, net, k=k, stages=stages, distance="knn_squared")
    far = np.linalg.norm(vectors(net, test, stages)[:, None] - vectors(net, train, stages)[None], axis=2)
    found, plain = detector.examine(test), fitted(train, net, k=k, stages=stages).examine(test)
    np.testing.assert_allclose(found.scores.numpy(), (np.sort(far)[:, :k] ** 2).sum(1), rtol=1e-5)
    assert torch.equal(found.nearest_image, plain.nearest_image)
    if k == 1:
        torch.testing.assert_close(found.scores.sqrt(), plain.scores)
    refit = fitted(train[1:], net, k=k, stages=stages, distance="knn_squared").score(train[:1])[1]
    left = detector.score(train[:1], leave_out=torch.tensor([0]))[1]
    torch.testing.assert_close(left, refit, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{"k": 1}, MAHALANOBIS])
def test_padding_does_not_count(options):
    """Stages 1 and 2 have strides 1 and 2, so that a region of even size is one of whole patches."""
    net, images, valid = backbone(), raw_images(6), torch.zeros(6, 16, 16, dtype=torch.bool)
    valid[:, 2:10, 4:] = True
    detector = Embedding(net, stages=(1, 2), **options)
    detector.fit(batches(images, valid=valid), 6)
    stages = [stage.double() for stage in detector.features(images)]
    x = torch.cat([stages[0][:, :, 2:10, 4:].mean((2, 3)), stages[1][:, :, 1:5, 2:].mean((2, 3))], 1).numpy()
    if "k" in options:
        np.testing.assert_allclose(detector.bank, x, rtol=1e-5, atol=1e-7)
    else:
        np.testing.assert_allclose(detector.mean, x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            detector.score(images, valid)[1], np.sqrt(LedoitWolf().fit(x).mahalanobis(x)), rtol=1e-3
        )


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_scores_do_not_depend_on_the_batch(distance):
    detector, test = fitted(raw_images(9), distance=distance), raw_images(7, seed=1)
    whole = detector.score(test)[1]
    parts = torch.cat([detector.score(part)[1] for part in test.split(3)])
    assert torch.allclose(whole, parts, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"distance": "knn_squared"}, MAHALANOBIS, {**MAHALANOBIS, "combine": "sum", "stages": (1, 2)}]
)
def test_fitted_state_loads_into_a_fresh_detector_of_any_size(options):
    test, number = raw_images(3, seed=1), torch.tensor([0, 1, 2])
    fresh = Embedding(ResNet18(stem="cifar"), **options)  # other random weights: they load too
    for count in (9, 4):
        state = fitted(raw_images(count), **options)
        fresh.load_state_dict(state.state_dict())
        assert torch.equal(fresh.score(test)[1], state.score(test)[1])
        assert torch.equal(fresh.score(test, leave_out=number)[1], state.score(test, leave_out=number)[1])


def test_a_state_of_the_other_distance_is_refused():
    with pytest.raises(RuntimeError, match="cholesky"):
        Embedding(backbone(), **MAHALANOBIS).load_state_dict(fitted(raw_images(3)).state_dict())


def test_identical_training_images():
    train = raw_images(1).expand(4, -1, -1, -1)
    detector = fitted(train)
    assert detector.score(train[:1])[1] < 1e-4 < detector.score(raw_images(1, seed=1))[1]
    with pytest.raises(UserError, match="singular"):
        fitted(train, **MAHALANOBIS)


@pytest.mark.filterwarnings("ignore:Only one sample")
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_are_a_user_error(count):
    with pytest.raises(UserError, match="singular"):
        fitted(raw_images(count), **MAHALANOBIS)
    with pytest.raises(UserError, match=f"k=3, but there are {count}"):
        fitted(raw_images(count), k=3)


def test_one_training_image_suffices_for_one_neighbor():
    assert fitted(raw_images(1), k=1).score(raw_images(1))[1] < 1e-5


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_features_that_are_not_finite_are_a_user_error(distance):
    spoilt, detector = raw_images(6), fitted(raw_images(6), distance=distance)
    spoilt[5, 1, 2, 3] = float("nan")
    with pytest.raises(UserError, match="training images: row 5 of 6 holds NaN"):
        fitted(spoilt, distance=distance)
    with pytest.raises(UserError, match="row 1 of 2 holds NaN"):
        detector.score(spoilt[4:])


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_an_unfitted_detector_says_so(distance):
    with pytest.raises(UserError, match="Embedding is not fitted"):
        Embedding(backbone(), distance=distance).score(raw_images(1))


def test_bad_options_are_user_errors():
    bad = [{"distance": "cosine"}, {"combine": "mean"}, {"source": "input"}]
    for options in (*bad, *({"stages": stages} for stages in ((), (0,), (4, 4), (5,)))):
        with pytest.raises(UserError, match=next(iter(options))):
            Embedding(backbone(), **options)
    with pytest.raises(UserError, match="there is no training image"):
        Embedding(backbone()).fit([], 0)


def test_the_backbone_stays_frozen_and_in_eval_mode():
    net = backbone().train()
    detector = Embedding(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector.train()
    detector.fit(batches(raw_images(4)), 4)
    detector.score(raw_images(4))
    assert detector.training and not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def shares(count: int, rank: int, world_size: int) -> list[Batch]:
    """This process's part of each global batch of 4, as data/loading.py deals them; none where nothing is left."""
    parts = [torch.tensor_split(torch.arange(count)[i : i + 4], world_size)[rank] for i in range(0, count, 4)]
    return [Batch(raw_images(count)[part], None, part) for part in parts if len(part) > 0]


def fit_shares(rank: int, world_size: int) -> dict[int, list[Tensor]]:
    """The states of 9 and 11 images: the last global batch is 1, none of it rank 1's, or 3, split into 2 and 1."""
    with pytest.raises(UserError, match="fewer training images"):  # on both ranks
        Embedding(backbone(), k=1).fit(shares(1, rank, world_size), 1)
    states = {}
    for count in (9, 11):
        detectors = Embedding(backbone(), k=1), Embedding(backbone(), **MAHALANOBIS)
        for detector in detectors:
            detector.fit(shares(count, rank, world_size), count)
        states[count] = [detectors[0].bank, detectors[0].numbers, detectors[1].score(raw_images(3, seed=1))[1]]
    return states


@pytest.mark.slow
def test_two_processes_hold_the_images_of_one_in_its_order():
    for states in run_processes(fit_shares, 2):
        for count, (bank, numbers, scores) in states.items():
            assert torch.allclose(bank, fitted(raw_images(count), k=1).bank, atol=1e-5)
            assert numbers.tolist() == list(range(count))
            alone = fitted(raw_images(count), **MAHALANOBIS).score(raw_images(3, seed=1))[1]
            torch.testing.assert_close(scores, alone, rtol=1e-3, atol=0)
