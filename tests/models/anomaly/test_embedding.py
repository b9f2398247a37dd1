"""The embedding baseline against brute force and scikit-learn, and what all detectors share (detector.py)."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from models.anomaly.embedding import Embedding
from models.resnet import ResNet18
from tests.processes import run_processes
from training.errors import UserError


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return ResNet18(stem="cifar")


def pictures(count: int, seed: int = 0) -> Tensor:
    """Smooth random textures: they differ from each other more than noise would under average pooling."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear") + torch.randn(
        count, 3, 1, 1, generator=generator
    )


def vectors(net: nn.Module, images: Tensor, stages: tuple[int, ...] = (4,)) -> np.ndarray:
    """Embeddings in float64, each picture on its own."""
    with torch.no_grad():
        outputs = [net.eval().forward_stages(image[None]) for image in images]
    return np.stack([np.concatenate([o[s - 1][0].double().mean((1, 2)).numpy() for s in stages]) for o in outputs])


@pytest.mark.parametrize(("k", "stages"), [(1, (4,)), (2, (4,)), (12, (2, 4))])
def test_knn_is_the_mean_distance_to_the_k_nearest(k, stages):
    net, train, test = backbone(), pictures(12), pictures(5, seed=1)
    detector = Embedding(net, k=k, stages=stages)
    detector.fit(train.split(5))
    maps, scores = detector.score(test)
    distances = np.linalg.norm(vectors(net, test, stages)[:, None] - vectors(net, train, stages)[None], axis=2)
    assert maps is None and scores.shape == (5,)
    np.testing.assert_allclose(scores.numpy(), np.sort(distances)[:, :k].mean(1), rtol=1e-5)


def test_embedding_of_a_resnet_is_its_pooled_output():
    net, images = backbone(), pictures(2)
    detector = Embedding(net, k=1)
    detector.fit([images])
    assert torch.allclose(detector.bank, net(images), atol=1e-6)


def test_normalize_compares_directions():
    net, train, test = backbone(), pictures(6), pictures(3, seed=1)
    detector = Embedding(net, k=1, normalize=True)
    detector.fit([train])
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors(net, test), vectors(net, train)))
    nearest = np.sqrt(2 - 2 * (a @ b.T).max(1))
    np.testing.assert_allclose(detector.score(test)[1].numpy(), nearest, rtol=1e-4)


@pytest.mark.parametrize("count", [5, 40])  # both below the 512 dimensions
def test_mahalanobis_equals_scikit_learn(count):
    net, train, test = backbone(), pictures(count), pictures(7, seed=1)
    detector = Embedding(net, distance="mahalanobis")
    detector.fit(train.split(8))
    expected = np.sqrt(LedoitWolf().fit(vectors(net, train)).mahalanobis(vectors(net, test)))
    assert detector.cholesky.dtype == torch.float64
    np.testing.assert_allclose(detector.score(test)[1].numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_scores_do_not_depend_on_the_batch(distance):
    detector, test = Embedding(backbone(), distance=distance), pictures(7, seed=1)
    detector.fit(pictures(9).split(4))
    whole = detector.score(test)[1]
    parts = torch.cat([detector.score(part)[1] for part in test.split(3)])
    assert torch.allclose(whole, parts, rtol=1e-4)


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_fitted_state_loads_into_a_fresh_detector_of_any_size(distance):
    fitted, test = Embedding(backbone(), distance=distance), pictures(3, seed=1)
    fitted.fit([pictures(9)])
    fresh = Embedding(ResNet18(stem="cifar"), distance=distance)  # other random weights: they load too
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh.score(test)[1], fitted.score(test)[1])
    smaller = Embedding(backbone(), distance=distance)
    smaller.fit([pictures(4)])
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh.score(test)[1], smaller.score(test)[1])


def test_a_state_of_the_other_distance_is_refused():
    fitted = Embedding(backbone())
    fitted.fit([pictures(3)])
    with pytest.raises(RuntimeError, match="cholesky"):
        Embedding(backbone(), distance="mahalanobis").load_state_dict(fitted.state_dict())


def test_identical_training_pictures():
    train = pictures(1).expand(4, -1, -1, -1)
    detector = Embedding(backbone())
    detector.fit([train])
    assert detector.score(train[:1])[1] < 1e-5 < detector.score(pictures(1, seed=1))[1]
    with pytest.raises(UserError, match="singular"):
        Embedding(backbone(), distance="mahalanobis").fit([train])


@pytest.mark.filterwarnings("ignore:Only one sample")
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures_are_a_user_error(count):
    with pytest.raises(UserError, match="singular"):
        Embedding(backbone(), distance="mahalanobis").fit([pictures(count)])
    with pytest.raises(UserError, match=f"k=3, but there are {count}"):
        Embedding(backbone(), k=3).fit([pictures(count)])


def test_one_training_picture_suffices_for_one_neighbour():
    detector = Embedding(backbone(), k=1)
    detector.fit([pictures(1)])
    assert detector.score(pictures(1))[1] < 1e-5


@pytest.mark.parametrize("distance", ["knn", "mahalanobis"])
def test_an_unfitted_detector_says_so(distance):
    with pytest.raises(UserError, match="Embedding is not fitted"):
        Embedding(backbone(), distance=distance).score(pictures(1))


def test_bad_options_are_user_errors():
    for options in (
        {"k": 0},
        {"distance": "cosine"},
        {"stages": ()},
        {"stages": (0,)},
        {"stages": (4, 4)},
        {"stages": (5,)},
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            Embedding(backbone(), **options)
    with pytest.raises(UserError, match="fewer training pictures"):
        Embedding(backbone()).fit([])


def test_the_backbone_stays_frozen_and_in_eval_mode():
    net = backbone().train()
    detector = Embedding(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector.train()
    detector.fit([pictures(4)])
    detector.score(pictures(4))
    assert detector.training and not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def shares(images: Tensor, rank: int, world_size: int) -> list[Tensor]:
    """This process's part of each global batch of 4, as data/loading.py deals them; none where nothing is left."""
    parts = [torch.tensor_split(batch, world_size)[rank] for batch in images.split(4)]
    return [part for part in parts if len(part) > 0]


def fit_shares(rank: int, world_size: int) -> dict[int, Tensor]:
    """The banks of 9 and 11 pictures: the last global batch is 1, none of it rank 1's, or 3, split into 2 and 1."""
    with pytest.raises(UserError, match="fewer training pictures"):  # on both ranks
        Embedding(backbone(), k=1).fit(shares(pictures(1), rank, world_size))
    banks = {}
    for count in (9, 11):
        detector = Embedding(backbone(), k=1)
        detector.fit(shares(pictures(count), rank, world_size))
        banks[count] = detector.bank
    return banks


def test_two_processes_hold_the_pictures_of_one_in_its_order():
    for banks in run_processes(fit_shares, 2):
        for count, bank in banks.items():
            one = Embedding(backbone(), k=1)
            one.fit([pictures(count)])
            assert torch.allclose(bank, one.bank, atol=1e-5)
