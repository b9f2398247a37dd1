"""SPD against a loop in float64, its gradient in closed form, what its values mean, and embeddings that collapsed."""

import pytest
import torch
import torch.nn.functional as F

from losses.spd import spd


def by_loop(anchors, positives, negatives):
    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y)) / (x.square().sum() * y.square().sum()).sqrt()

    pairs = [(cosine(a, n), cosine(a, p)) for a, p, n in zip(anchors, positives, negatives)]
    return sum(n - p for n, p in pairs) / len(pairs), sum(n for n, _ in pairs) / len(pairs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_the_loop(batch):
    z = torch.randn(3, batch, 7, dtype=torch.float64)
    for ours, theirs in zip(spd(*z), by_loop(*z)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradient():
    z = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: spd(*z)[0], z)


def test_gradient_in_closed_form():
    """d cos(x, y) / dx = (y / |y| - cos x / |x|) / |x|: at a right angle to x, and the smaller the longer x is."""
    z = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(spd(*z)[0], z)
    a, p, n = z.detach()

    def slope(x, y):
        lengths = x.norm(dim=1, keepdim=True)
        x, y = x / lengths, y / y.norm(dim=1, keepdim=True)
        return (y - (x * y).sum(1, keepdim=True) * x) / lengths

    expected = torch.stack([slope(a, n) - slope(a, p), -slope(p, a), slope(n, a)]) / len(a)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((gradient * z.detach()).sum(2), torch.zeros(3, 4, dtype=torch.float64))


def test_values():
    x, y = torch.eye(4)[:2]

    def loss(*z):
        return spd(*(row[None] for row in z))[0].item()

    assert loss(x, x, x) == 0  # the defect leaves no trace
    assert loss(x, y, y) == 0  # only the global change does, and it is in both
    assert loss(x, x, y) == -1  # a right angle, and nothing else matters
    assert loss(x, y, x) == 1  # the wrong way round
    assert loss(x, x, -x) == -2  # the least there is
    assert loss(3 * x, 0.1 * x, 7 * (x + y)) == pytest.approx(0.5**0.5 - 1)  # lengths do not count
    assert spd(x[None], x[None], (x + y)[None])[1].item() == pytest.approx(0.5**0.5)
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(spd(*z[:, order])[0], spd(*z)[0])
    assert not torch.allclose(spd(z[0], z[1], z[2, [1, 0, 2, 3, 4, 5]])[0], spd(*z)[0])


@pytest.mark.parametrize("collapsed", [torch.ones(3, 4, 5), torch.zeros(3, 4, 5), torch.full((3, 4, 5), 1e-20)])
def test_collapsed_embeddings_have_a_finite_gradient(collapsed):
    z = collapsed.requires_grad_()
    loss, _ = spd(*z)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    z = (300 * torch.randn(3, 8, 16)).to(dtype)  # their squared lengths overflow float16
    with torch.autocast("cpu", torch.bfloat16):
        loss, similarity = spd(*z)
    assert loss.dtype == similarity.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loop(*z.double())[0].item(), rel=1e-5)
    assert F.cosine_similarity(z[0].double(), z[2].double()).mean().item() == pytest.approx(similarity.item(), rel=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\), \(3, 2\), \(4, 2\)"):
        spd(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"\(3, 2, 1, 1\)"):
        spd(*torch.ones(3, 3, 2, 1, 1))
