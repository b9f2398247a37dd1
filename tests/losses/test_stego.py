"""STEGO's loss against loops over positions in float64, closed forms, and its three kinds of pairs."""

import math

import pytest
import torch

from losses.stego import StegoConfig, correspondence_loss, other_images, sample, stego


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def by_loop(f, s, g, t, shift, pointwise, zero_clamp):
    """f, g features and s, t codes, (B, C, h, w) and (B, C, i, j)."""
    places = [(b, y, x) for b in range(len(f)) for y in range(f.shape[2]) for x in range(f.shape[3])]
    others = [(i, j) for i in range(g.shape[2]) for j in range(g.shape[3])]
    alike = {(p, q): float(cosine(f[p[0], :, p[1], p[2]], g[p[0], :, q[0], q[1]])) for p in places for q in others}
    before = sum(alike.values()) / len(alike)
    shift = before if shift is None else shift
    if pointwise:
        for p in places:
            own = sum(alike[p, q] for q in others) / len(others)
            for q in others:
                alike[p, q] -= own
        after = sum(alike.values()) / len(alike)
        alike = {pair: value - after + before for pair, value in alike.items()}
    total = 0.0
    for (p, q), value in alike.items():
        code = cosine(s[p[0], :, p[1], p[2]], t[p[0], :, q[0], q[1]])
        if zero_clamp and code < 0:
            continue
        total = total - code * (value - shift)
    return total / len(alike)


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("zero_clamp", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.46, None])
def test_equals_the_loop_with_its_gradient(pointwise, zero_clamp, shift):
    f, g = torch.randn(2, 5, 3, 2, dtype=torch.float64), torch.randn(2, 5, 2, 3, dtype=torch.float64)
    s = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    found = correspondence_loss(f, s, g, t, shift=shift, pointwise=pointwise, zero_clamp=zero_clamp)
    expected = by_loop(f, s, g, t, shift, pointwise, zero_clamp)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found.loss, (s, t)), torch.autograd.grad(expected, (s, t))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_equal_features_and_codes_without_a_shift():
    f = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    unit = (f / f.norm(dim=1, keepdim=True)).flatten(2)
    products = unit.transpose(1, 2) @ unit  # (B, P, P)
    found = correspondence_loss(f, f, f, f, shift=0.0, pointwise=False)
    torch.testing.assert_close(found.loss, -(products.clamp(min=0) * products).mean(), rtol=1e-12, atol=0)


def test_pointwise_centering_leaves_the_mean_and_no_gradient_reaches_features():
    f = torch.rand(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    codes = torch.ones(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)  # of cosine 1 everywhere
    plain, centered = (
        correspondence_loss(f, codes, f, codes, shift=0.1, pointwise=pointwise) for pointwise in (False, True)
    )
    torch.testing.assert_close(centered.loss, plain.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.loss, 0.1 - plain.feature_cosine, rtol=1e-12, atol=0)
    centered.loss.backward()
    assert f.grad is None and codes.grad is not None


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_no_image_is_its_own_negative(count):
    for _ in range(30):
        others = other_images(count)
        assert others.shape == (count,) and ((others >= 0) & (others < count)).all()
        assert count == 1 or (others != torch.arange(count)).all()


def test_samples_are_interpolated_between_the_middles_of_patches():
    maps = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    points = 2 * torch.rand(1, 4, 4, 2, dtype=torch.float64) - 1
    points[0, 0, :2] = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])  # x before y: corners of the first row
    found = sample(maps, points)
    for i in range(4):
        for j in range(4):
            x, y = (
                (points[0, j, i] + 1) / 2 * torch.tensor([4.0, 2.0])
            ).tolist()  # transposed, as in the official code
            left, top = min(math.floor(x), 3), min(math.floor(y), 1)
            dx, dy = x - left, y - top
            corner = maps[0, :, top : top + 2, left : left + 2]
            weights = torch.tensor([[(1 - dy) * (1 - dx), (1 - dy) * dx], [dy * (1 - dx), dy * dx]]).double()
            torch.testing.assert_close(found[0, :, i, j], (corner * weights).sum((1, 2)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0, :, 0, 0], maps[0, :, 0, 0])
    torch.testing.assert_close(found[0, :, 1, 0], maps[0, :, 0, 4])


def test_the_batch_is_the_weighted_sum_of_three_kinds_of_pairs():
    config = StegoConfig(samples=3, negatives=2, intra_weight=0.5, inter_weight=0.3, negative_weight=0.7)
    f, c, nf, nc = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(4))
    torch.manual_seed(7)
    loss, stats = stego(f, c, nf, nc, config)
    torch.manual_seed(7)  # the same draws
    ours, theirs = (2 * torch.rand(2, 3, 3, 3, 2).double() - 1).unbind(0)
    pairs = {"intra": [(f, c, ours)], "inter": [(nf, nc, theirs)], "negative": []}
    for _ in range(2):
        others = other_images(3)
        pairs["negative"].append((f[others], c[others], theirs))
    expected = 0.0
    for kind, weight, shift in (("intra", 0.5, 0.18), ("inter", 0.3, 0.12), ("negative", 0.7, 0.46)):
        values = [
            by_loop(sample(f, ours), sample(c, ours), sample(g, at), sample(d, at), shift, True, True)
            for g, d, at in pairs[kind]
        ]
        mean = sum(values) / len(values)
        torch.testing.assert_close(stats[f"{kind}_loss"], mean, rtol=1e-6, atol=1e-7)
        expected = expected + weight * mean
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    assert len(stats) == 9


def test_the_defaults_are_the_official_ones():
    config = StegoConfig()
    assert (config.negative_weight, config.inter_weight, config.intra_weight) == (0.63, 0.25, 0.67)
    assert (config.negative_shift, config.inter_shift, config.intra_shift) == (0.46, 0.12, 0.18)
    assert (config.samples, config.negatives) == (11, 5) and config.pointwise and config.zero_clamp
