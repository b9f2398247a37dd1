"""VICReg against loops in float64, the official and solo-learn's formulas, closed forms, and processes against one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses.vicreg import vicreg
from tests.processes import run_processes


def by_loop(z, form="official"):
    """The three terms of float64 (B, V, D): image by image and dimension by dimension."""
    batch, views, width = z.shape
    pairs = [(v, w) for v in range(views) for w in range(v + 1, views)]
    squares = [(z[b, v, i] - z[b, w, i]) ** 2 for v, w in pairs for b in range(batch) for i in range(width)]
    hinges, covariances = [], []
    for v in range(views):
        means = [sum(z[b, v, i] for b in range(batch)) / batch for i in range(width)]
        for i in range(width):
            for j in range(width):
                products = [(z[b, v, i] - means[i]) * (z[b, v, j] - means[j]) for b in range(batch)]
                cov = sum(products) / (batch - 1)
                if i == j:
                    hinges.append((1 - (cov + 1e-4).sqrt()).clamp(min=0))
                else:
                    covariances.append(cov**2 / width)
    terms = {"invariance": sum(squares) / len(squares), "variance": sum(hinges) / len(hinges)}
    terms["variance"] = terms["variance"] * (2 if form == "solo" else 1)
    terms["covariance"] = 2 / views * sum(covariances, 0 * z.sum())
    return terms


def off_diagonal(x):
    return x.flatten()[:-1].view(len(x) - 1, len(x) + 1)[:, 1:].flatten()


def official(x, y):
    """Loss and terms as in forward of facebookresearch/vicreg main_vicreg.py, in one process."""
    invariance = F.mse_loss(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    std_x, std_y = (x.var(dim=0) + 0.0001).sqrt(), (y.var(dim=0) + 0.0001).sqrt()
    variance = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    cov_x, cov_y = x.T @ x / (len(x) - 1), y.T @ y / (len(y) - 1)
    covariance = sum(off_diagonal(cov).pow(2).sum().div(x.shape[1]) for cov in (cov_x, cov_y))
    terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return 25.0 * invariance + 25.0 * variance + 1.0 * covariance, terms


@pytest.mark.parametrize("form", ["official", "solo"])
@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("batch, width", [(2, 3), (5, 1), (5, 4)])
def test_equals_the_loop_with_its_gradient(form, views, batch, width):
    scale = torch.linspace(0.3, 2, width, dtype=torch.float64)  # dimensions on both sides of the hinge
    z = (scale * torch.randn(batch, views, width, dtype=torch.float64)).requires_grad_()
    loss, terms = vicreg(z, invariance=3, variance=5, covariance=7, form=form)
    expected_terms = by_loop(z, form)
    expected = sum(c * term for c, term in zip((3, 5, 7), expected_terms.values()))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, term in expected_terms.items():
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], term.detach(), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_equals_the_official_code_with_its_gradient():
    z = torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)
    (loss, terms), (expected, expected_terms) = vicreg(z), official(z[:, 0], z[:, 1])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert terms.keys() == expected_terms.keys()
    for name, term in expected_terms.items():
        torch.testing.assert_close(terms[name], term.detach(), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_solo_learn_counts_the_variance_twice():
    z = torch.randn(9, 2, 6, dtype=torch.float64)
    (loss, terms), (solo, solo_terms) = vicreg(z, variance=50), vicreg(z, form="solo")
    torch.testing.assert_close(solo, loss, rtol=1e-12, atol=0)
    one, other = ((view.var(dim=0) + 1e-4).sqrt() for view in z.unbind(1))  # solo/losses/vicreg.py variance_loss
    std_loss = torch.mean(F.relu(1 - one)) + torch.mean(F.relu(1 - other))
    torch.testing.assert_close(solo_terms["variance"], std_loss, rtol=1e-12, atol=0)
    assert solo_terms["covariance"] == terms["covariance"]


@pytest.mark.parametrize("form", ["official", "solo"])
def test_gradient(form):
    z = (0.5 * torch.randn(5, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vicreg(z, form=form)[0], z)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("views", [2, 4])
def test_a_constant_embedding_costs_the_variance_alone(value, views):
    z = torch.full((6, views, 5), value, requires_grad=True)
    loss, terms = vicreg(z)
    assert loss.item() == pytest.approx(25 * (1 - 1e-4**0.5), rel=1e-6)  # 24.75
    assert terms["invariance"] == terms["covariance"] == 0
    loss.backward()
    assert torch.equal(z.grad, torch.zeros_like(z))  # nothing tells the images apart: finite, and no way out
    assert vicreg(z, form="solo")[0].item() == pytest.approx(49.5, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
def test_uncorrelated_dimensions_cost_nothing_however_long(scale):
    rows = torch.ones(1, 1)
    while len(rows) < 64:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    z = scale * (1 + torch.rand(63)) * rows[:, 1:]  # columns of a Hadamard matrix, each of its own length
    loss, terms = vicreg(z[:, None].expand(-1, 2, -1))
    assert terms["invariance"] == terms["variance"] == 0
    assert (
        0 <= loss.item() == terms["covariance"].item() < 1e-9 * scale**4
    )  # variances, up to (2 scale)^2, leave nothing


def test_a_pair_of_dimensions_that_are_one_costs_its_squared_variance():
    x = torch.tensor([3.0, -1.0, -2.0])  # variance 7
    z = torch.stack([x, x], 1)[:, None].expand(-1, 3, -1)  # (3, 3, 2)
    _, terms = vicreg(z)
    assert terms["covariance"].item() == pytest.approx(2 * (7**2 + 7**2) / 2)  # twice the mean over views of sum / D
    assert terms["invariance"] == terms["variance"] == 0


def test_invariances():
    z = torch.randn(7, 2, 4, dtype=torch.float64)
    value = vicreg(z)[0]
    shifted = z + 10 * torch.randn(4, dtype=torch.float64)  # the same for both views
    for same in (z.flip(1), z[torch.randperm(7)], z[..., torch.randperm(4)], z * torch.tensor([1, -1, -1, 1]), shifted):
        torch.testing.assert_close(vicreg(same)[0], value, rtol=1e-12, atol=0)
    assert not torch.isclose(vicreg(2 * z)[0], value)
    assert not torch.isclose(vicreg(torch.stack([z[:, 0], z[:, 1].flip(0)], 1))[0], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    z = (3 * torch.randn(32, 2, 6)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = vicreg(z)
    assert loss.dtype == torch.float32
    expected = by_loop(z.double())
    assert loss.item() == pytest.approx(sum(c * t.item() for c, t in zip((25, 25, 1), expected.values())), rel=1e-5)
    assert terms["covariance"].item() == pytest.approx(expected["covariance"].item(), rel=1e-5)


def test_wrong_shapes_and_one_image():
    with pytest.raises(ValueError, match=r"two views or more, not \(3, 2\)"):
        vicreg(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"two views or more, not \(3, 1, 4\)"):
        vicreg(torch.ones(3, 1, 4))
    with pytest.raises(ValueError, match="two images or more"):
        vicreg(torch.ones(1, 2, 4))


def on_a_shard(rank, world_size, few):
    """{(images, views): (loss, terms, gradient)}; with as few images as processes each has a single one."""
    torch.manual_seed(3)
    data, network = torch.randn(8, 3, 6, dtype=torch.float64), nn.Linear(6, 5).double()
    results = {}
    for images, views in ((8, 2), (8, 3), (few, 2)):
        mine = slice(rank * images // world_size, (rank + 1) * images // world_size)
        model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
        loss, terms = vicreg(model(data[mine, :views]))
        network.zero_grad()
        loss.backward()
        results[images, views] = loss.detach(), terms, network.weight.grad.clone()
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    alone = on_a_shard(0, 1, world_size)
    ranks = run_processes(on_a_shard, world_size, world_size)
    for case, (loss, terms, gradient) in alone.items():
        torch.testing.assert_close(sum(r[case][0] for r in ranks) / world_size, loss, rtol=0, atol=1e-12)
        for _, rank_terms, grad in (r[case] for r in ranks):
            torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
            for name in ("variance", "covariance"):  # of all images; the invariance is that of the process's own
                torch.testing.assert_close(rank_terms[name], terms[name], rtol=0, atol=1e-12)
