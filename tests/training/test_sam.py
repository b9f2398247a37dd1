"""SAM and ASAM: quadratics by hand, loops, exact return, BatchNorm left alone, two processes against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from runtime.distributed import unsynchronized
from tests.processes import run_processes
from training import sam


def quadratic(w):
    """1/2 |w|^2, whose gradient is w."""
    return w.square().sum() / 2


def test_quadratic_by_hand():
    """w = (3, 4): g = w, |g| = 5, eps = 0.5 (3, 4) / 5 = (0.3, 0.4); the second gradient is w + eps."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    quadratic(w).backward()
    with sam.climbed([w], 0.5):
        assert w.grad is None
        torch.testing.assert_close(w.data, torch.tensor([3.3, 4.4], dtype=torch.float64), rtol=1e-11, atol=0)
        quadratic(w).backward()
    assert torch.equal(w.data, torch.tensor([3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(w.grad, torch.tensor([3.3, 4.4], dtype=torch.float64), rtol=1e-11, atol=0)


def test_adaptive_quadratic_by_hand():
    """w = (1, 2): g = w, | |w| g | = |(1, 4)| = sqrt(17), eps = rho (1, 8) / sqrt(17)."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    quadratic(w).backward()
    with sam.climbed([w], math.sqrt(17), adaptive=True):
        torch.testing.assert_close(w.data, torch.tensor([2.0, 10.0], dtype=torch.float64), rtol=1e-11, atol=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()


def loss_of(model, images):
    return model(images).square().mean()


@pytest.mark.parametrize("adaptive", [False, True])
def test_several_tensors_against_a_loop(adaptive):
    """One norm over all; a weight of 0, a gradient of 0, and a parameter without gradient, which stays."""
    model, images = network(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model[0].weight.data[0] = 0
    loss_of(model, images).backward()
    model[4].bias.grad.zero_()
    start = [p.detach().flatten().tolist() for p in model.parameters()]
    grads = [p.grad.flatten().tolist() for p in model.parameters()]
    total = sum((g * (abs(w) if adaptive else 1)) ** 2 for ws, gs in zip(start, grads) for w, g in zip(ws, gs))
    scale = 0.7 / (math.sqrt(total) + 1e-12)
    expected = [[w + scale * g * (w * w if adaptive else 1) for w, g in zip(*both)] for both in zip(start, grads)]
    with sam.climbed((p for p in [*model.parameters(), idle]), 0.7, adaptive=adaptive):
        for p, values in zip(model.parameters(), expected):
            torch.testing.assert_close(p.detach().flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-12,
                                       atol=1e-15)  # fmt: skip
            assert p.grad is None
        assert torch.equal(idle.data, torch.ones(3, dtype=torch.float64))
    for p, values in zip(model.parameters(), start):
        assert p.grad is None and p.detach().flatten().tolist() == values


def test_rho_0_is_the_plain_gradient():
    model, images = network(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    loss_of(model, images).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    with sam.climbed(model.parameters(), 0.0):
        loss_of(model, images).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))


@pytest.mark.parametrize("adaptive", [False, True])
def test_climb_does_not_depend_on_the_scale_of_the_gradients(adaptive):
    """So fp16's scaled gradients will do as they are."""
    places = []
    for scale in (1.0, 65536.0):
        model, images = network().float(), torch.ones(4, 2, 6, 6).cumsum(0)
        (scale * loss_of(model, images)).backward()
        with sam.climbed(model.parameters(), 0.05, adaptive=adaptive):
            places.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*places):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflow_stays_out_of_the_weights(bad):
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    w.grad, v.grad = torch.tensor([bad, 3.0]), torch.tensor([0.0, 4.0])
    with sam.climbed([w, v], 0.5):
        torch.testing.assert_close(torch.stack([w, v]).detach(), torch.tensor([[1.0, 1.3], [1.0, 1.4]]))
    w.grad = torch.full((2,), 3e38)  # finite, but not its norm
    with sam.climbed([w], 0.5):
        assert torch.equal(w.data, torch.ones(2))


def test_weights_are_back_bit_for_bit_after_an_exception():
    model, images = network().float(), torch.randn(4, 2, 6, 6)
    loss_of(model, images).backward()
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in between"), sam.climbed(model.parameters(), 10.0), \
            sam.frozen_statistics(model):  # fmt: skip
        assert not torch.equal(model[0].weight, start[0]) and not model[1].track_running_stats
        raise RuntimeError("in between")
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start))
    assert model[1].track_running_stats


def test_no_gradients():
    with pytest.raises(ValueError, match="no parameter has a gradient"), sam.climbed(network().parameters(), 0.1):
        pass
    assert sam.SAMConfig() == sam.SAMConfig(rho=0.05, adaptive=False)


@pytest.mark.parametrize("adaptive", [False, True])
def test_reads_no_value_on_the_host(adaptive):
    """A fake tensor has no values: whatever asks for one raises, as it would wait for a CUDA device."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model(torch.ones(5, 3)).sum().backward()
        with sam.climbed(model.parameters(), 0.1, adaptive=adaptive), sam.frozen_statistics(model):
            model(torch.ones(5, 3)).sum().backward()


class Norms(nn.Module):
    """One of each kind: plain, synchronized, cumulative, without statistics, frozen in eval mode, and no BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.BatchNorm2d(3)
        self.sync = nn.SyncBatchNorm(3)
        self.cumulative = nn.BatchNorm2d(3, momentum=None)
        self.bare = nn.BatchNorm2d(3, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.group = nn.GroupNorm(1, 3)

    def forward(self, x):
        for norm in self.children():
            x = norm(x + norm.weight.view(-1, 1, 1) ** 2)
        return x


def test_a_second_pass_leaves_the_buffers_of_one():
    images, models = torch.randn(4, 3, 5, 5), (Norms(), Norms())
    for model in models:
        model(images).square().mean().backward()
    once, twice = models
    with sam.climbed(twice.parameters(), 0.5), sam.frozen_statistics(twice):
        with sam.frozen_statistics(twice):
            pass  # within one another the outer one holds on
        twice(3 * images + 2).square().mean().backward()
    buffers = dict(once.named_buffers())
    assert len(buffers) == 12 and buffers["plain.num_batches_tracked"] == buffers["cumulative.num_batches_tracked"] == 1
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in twice.named_buffers())
    assert [norm.track_running_stats for norm in list(twice.children())[:5]] == [True, True, True, False, True]
    with torch.no_grad():
        twice(images)
    assert twice.plain.num_batches_tracked == twice.sync.num_batches_tracked == 2  # they move again


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_statistics_normalize_by_the_batch(kind):
    norm, images = kind(3).double(), 7 + 2 * torch.randn(4, 3, 5, 5, dtype=torch.float64)
    mean, variance = images.mean((0, 2, 3), keepdim=True), images.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (images - mean) / (variance + norm.eps).sqrt()
    with sam.frozen_statistics(norm):
        torch.testing.assert_close(norm(images), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(norm.running_mean, torch.zeros(3).double()) and norm.num_batches_tracked == 0
    norm.eval()
    with sam.frozen_statistics(norm):  # eval mode: by the running statistics, as ever
        torch.testing.assert_close(norm(images), images / math.sqrt(1 + norm.eps))


RHO, RATE, STEPS = 0.3, 0.2, 3


def regression(rank):
    """X (5, 3) and y (5,) of one process."""
    numbers = np.random.default_rng(rank)
    return numbers.normal(size=(5, 3)) * (1 + rank), numbers.normal(size=5)


def least_squares(rank, world_size):  # noqa: ARG001
    """{pass 1 synchronized or not: weights after some SAM steps on mean (X w + b - y)^2 / 2}, distributed."""
    return {synchronized: descend(rank, synchronized) for synchronized in (False, True)}


def descend(rank, synchronized):
    linear = nn.Linear(3, 1).double()
    nn.init.constant_(linear.weight, 0.5)
    nn.init.constant_(linear.bias, -0.2)
    model = DistributedDataParallel(linear)
    x, y = (torch.from_numpy(part) for part in regression(rank))

    def gradients():
        ((model(x)[:, 0] - y).square().mean() / 2).backward()

    for _ in range(STEPS):
        with unsynchronized(model, not synchronized):
            gradients()
        with sam.climbed(linear.parameters(), RHO):
            gradients()
        for p in linear.parameters():
            p.data -= RATE * p.grad
            p.grad = None
    return torch.cat([linear.weight[0], linear.bias]).detach()


def gradient(w, part):
    x, y = part
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)  # the last weight is the bias
    return x.T @ (x @ w - y) / len(y)


def test_two_processes():
    """Each climbs by its own gradient (m-sharpness), or all by the mean; the second gradients are averaged."""
    results, parts = run_processes(least_squares, 2), [regression(rank) for rank in range(2)]
    for synchronized in (False, True):
        w = np.array([0.5, 0.5, 0.5, -0.2])
        for _ in range(STEPS):
            g = [gradient(w, part) for part in parts]
            climbs = [np.mean(g, axis=0)] * 2 if synchronized else g
            second = [gradient(w + RHO * d / np.linalg.norm(d), part) for d, part in zip(climbs, parts)]
            w = w - RATE * np.mean(second, axis=0)
        for result in results:
            np.testing.assert_allclose(result[synchronized].numpy(), w, rtol=1e-10)
