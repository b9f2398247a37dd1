"""Products and eigenvectors against torch.autograd.functional.hessian of the whole loss, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation.inspect.hessian import hessian_times, leading
from evaluation.inspect.landscape import filter_norm, learned
from evaluation.inspect.run_loss import ClassifierLoss
from losses.dino import DINOLoss
from losses.supervised import cross_entropy
from models.backbones.vit import Attention
from runtime.errors import UserError


def tiny(reestimates: bool = False) -> ClassifierLoss:
    """A convolution, a batch norm, a linear layer; three batches, the last one smaller; a frozen bias."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    network = nn.Sequential(*layers).double()
    network(torch.randn(9, 3, 4, 4, dtype=torch.float64))
    network[-1].bias.requires_grad_(False)
    images, labels = torch.randn(11, 3, 4, 4, dtype=torch.float64), torch.arange(11) % 3
    batches = [([part], its) for part, its in zip(images.split(4), labels.split(4))]
    loss = ClassifierLoss("tiny", network, batches, [], criterion=cross_entropy, n_classes=3)
    loss.reestimates = reestimates
    return loss


def dense(loss: ClassifierLoss) -> torch.Tensor:
    """The Hessian (n, n) of the mean over all images at once."""
    weights = learned(loss.network)
    images = torch.cat([views[0] for views, _ in loss.batches])
    labels = torch.cat([labels for _, labels in loss.batches])

    def value(flat):
        parts = flat.split([weight.numel() for weight in weights.values()])
        state = {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}
        return nn.functional.cross_entropy(functional_call(loss.network, state, (images,)), labels)

    return torch.autograd.functional.hessian(value, torch.cat([weight.flatten() for weight in weights.values()]))


def test_products_are_the_dense_hessians():
    loss = tiny()
    matrix, times = dense(loss), hessian_times(loss)
    assert len(matrix) == 4 * 27 + 8 + 48
    for seed in range(3):
        vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        shapes = [weight.shape for weight in learned(loss.network).values()]
        parts = [part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes)]
        found = torch.cat([part.flatten() for part in times(parts)])
        torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-12)


def test_products_of_attention_whose_fused_kernels_have_no_second_derivative():
    torch.manual_seed(2)
    network = nn.Sequential(Attention(4, 2), nn.Flatten(), nn.Linear(12, 3)).double()
    images, labels = torch.randn(5, 3, 4, dtype=torch.float64), torch.arange(5) % 3  # (B, T, D)
    loss = ClassifierLoss("tokens", network, [([images], labels)], [], criterion=cross_entropy, n_classes=3)
    with sdpa_kernel(SDPBackend.MATH):
        matrix = dense(loss)
    vector = torch.randn(len(matrix), dtype=torch.float64)
    weights = learned(network).values()
    parts = [part.view(w.shape) for part, w in zip(vector.split([w.numel() for w in weights]), weights)]
    found = torch.cat([part.flatten() for part in hessian_times(loss)(parts)])
    torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reestimates", [False, True])
def test_leading_eigenvectors_are_the_dense_hessians(reestimates):
    loss, other = tiny(reestimates), tiny()
    values, directions = leading(loss, 3, 0)
    if reestimates:
        other.reestimate()
    expected, vectors = torch.linalg.eigh(dense(other))
    assert values == pytest.approx(expected.flip(0)[:3].tolist(), rel=1e-3)
    for direction, vector in zip(directions, vectors.T.flip(0)):
        flat = torch.cat([part.flatten() for part in direction.values()])
        assert float(flat.norm()) == pytest.approx(filter_norm(learned(loss.network)), rel=1e-6)
        assert abs(float(flat @ vector) / float(flat.norm())) > 0.999
    again, _ = leading(tiny(reestimates), 3, 0)
    assert again == values


def test_more_eigenvalues_than_weights():
    loss = tiny()
    with pytest.raises(UserError, match="164 eigenvalues of 164 weights"):
        leading(loss, 164, 0)


def test_a_loss_without_a_second_derivative_says_so():
    loss = tiny()
    dino = DINOLoss(3).double()

    def of(batch):
        logits = loss.network(batch[0][0])[:, None].expand(-1, 2, -1)
        return dino(logits, logits.detach(), 0.1)[0]

    loss.of = of
    assert loss.of(loss.batches[0]).requires_grad
    with pytest.raises(UserError, match="the loss of tiny has no second derivative"):
        leading(loss, 1, 0)


def test_a_loss_without_curvature():
    loss = tiny()
    loss.of = lambda batch: loss.network[-1].weight.sum() * len(batch[1])
    with pytest.raises(UserError, match="no 1 largest eigenvalues of tiny"):
        leading(loss, 1, 0)
