"""The embedding baseline without a training image: a refit to the others, and where none can be left out."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from models.anomaly.embedding import Embedding
from runtime.errors import UserError
from tests.models.anomaly.test_embedding import MAHALANOBIS, backbone, batches, fitted, raw_images, vectors


@pytest.mark.parametrize("k", [1, 3, 7])
def test_knn_without_an_image_is_a_refit_without_it(k):
    net, train = backbone(), raw_images(8)
    train[6] = train[2]  # a copy of the left-out image is found
    detector, numbers = Embedding(net, k=k), torch.randperm(8) + 30
    content = {int(number): 2 if i == 6 else i for i, number in enumerate(numbers)}
    detector.fit(batches(train, 3, numbers), 8)
    found = detector.examine(train, leave_out=numbers)
    for i in range(8):
        rest = torch.arange(8) != i
        alone = Embedding(net, k=k)
        alone.fit(batches(train[rest], numbers=numbers[rest]), 7)
        expected = alone.examine(train[i][None])
        torch.testing.assert_close(found.scores[[i]], expected.scores, rtol=1e-4, atol=1e-4)  # the copy: not quite 0
        assert content[int(found.nearest_image[i])] == content[int(expected.nearest_image)]
    with pytest.raises(UserError, match="k=8: without one training image there are 7 left"):
        fitted(train, net, k=8).score(train[:1], leave_out=torch.tensor([0]))


@pytest.mark.parametrize("count", [4, 5, 20, 60])
@pytest.mark.parametrize("stages", [(1,), (4,)])
def test_mahalanobis_without_an_image_is_a_refit_without_it(count, stages):
    """The shrinkage anew, in 64 and 512 dimensions; with four images it moves the threshold by tens of per cent."""
    net, train, number = backbone(), raw_images(count), torch.arange(count)
    x = vectors(net, train, stages)
    detector = fitted(train, net, stages=stages, **MAHALANOBIS)
    refit = [LedoitWolf().fit(np.delete(x, i, 0)).mahalanobis(x[i][None])[0] ** 0.5 for i in range(count)]
    np.testing.assert_allclose(detector.score(train, leave_out=number)[1].numpy(), refit, rtol=2e-3)
    assert detector.can_leave_out(count)
    others = raw_images(2, seed=1)
    assert torch.equal(detector.score(others, leave_out=torch.tensor([-1, count]))[1], detector.score(others)[1])


class Flat(nn.Module):
    """The first pixel: copies of an image have the same features, whatever batch they are in."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


def test_of_how_many_images_one_can_be_left_out():
    """Two others have a shrinkage of 0 and so no covariance; k neighbors need k others; copies do not differ."""
    assert [fitted(raw_images(n), **MAHALANOBIS).can_leave_out(n) for n in (3, 4)] == [False, True]
    odd = raw_images(1).repeat(5, 1, 1, 1)
    odd[4] = raw_images(1, seed=3)
    detector = fitted(odd[:, :, :1, :1].expand(-1, -1, 16, 16), Flat(), source="output", **MAHALANOBIS)
    assert not detector.can_leave_out(5) and detector.left_out.isfinite().tolist() == [True] * 4 + [False]
    for distance in ("knn", "knn_squared"):
        detector = Embedding(backbone(), k=3, distance=distance)
        assert [detector.can_leave_out(n) for n in (2, 3, 4)] == [False, False, True]
