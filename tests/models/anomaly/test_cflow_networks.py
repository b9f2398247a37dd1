"""CFlow-AD's flows: FrEIA's arithmetic and parameters, Jacobians, inverses, densities that integrate to one."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from losses.flow_likelihood import flow_likelihood, log_density
from models.anomaly.cflow_networks import ConditionalFlow, CouplingBlock, encode_positions, random_rotation


def stirred(channels: int, encoding: int = 4, blocks: int = 1) -> ConditionalFlow:
    """A flow in float64 whose parameters are far from where they start, and whose rotations are exact."""
    torch.manual_seed(channels)
    flow = ConditionalFlow(channels, encoding, blocks).double()
    with torch.no_grad():
        for block in flow.module_list:
            for parameter in (block.global_scale, block.global_offset, *block.subnet.parameters()):
                parameter.add_(torch.randn_like(parameter))
            block.subnet[2].weight.mul_(3)  # into the bend of tanh
            q, r = torch.linalg.qr(block.w_perm)
            block.w_perm.copy_(q * r.diagonal().sign())
    return flow


def by_hand(block: CouplingBlock, x: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, float]:
    """One vector through FrEIA's AllInOneBlock (clamping 1.9, SOFTPLUS, soft permutation), as its formulas read."""
    state = {name: value.numpy() for name, value in block.state_dict().items()}
    first = len(x) - len(x) // 2
    hidden = state["subnet.0.weight"] @ np.concatenate([x[:first], position]) + state["subnet.0.bias"]
    a = 0.1 * (state["subnet.2.weight"] @ np.maximum(hidden, 0) + state["subnet.2.bias"])
    s, t = 1.9 * np.tanh(a[: len(x) // 2]), a[len(x) // 2 :]
    scale = 0.1 / 0.5 * np.log1p(np.exp(0.5 * state["global_scale"][0]))
    y = np.concatenate([x[:first], x[first:] * np.exp(s) + t]) * scale + state["global_offset"][0]
    return state["w_perm"] @ y, s.sum() + np.log(scale).sum()


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_a_block_is_freias(channels):
    block = stirred(channels).module_list[0]
    x, positions = torch.randn(5, channels, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        y, log_det = block(x, positions)
    for i in range(5):
        expected, determinant = by_hand(block, x[i].numpy(), positions[i].numpy())
        np.testing.assert_allclose(y[i].numpy(), expected, rtol=1e-12)
        assert log_det[i].item() == pytest.approx(determinant, rel=1e-12)


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_the_log_determinant_is_the_jacobians(channels):
    flow, positions = stirred(channels, blocks=3), torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(4, channels, dtype=torch.float64)
    _, log_det = flow(x, positions)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, p=positions[i : i + 1]: flow(v[None], p)[0][0], x[i])
        assert log_det[i].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-10)


def inverted(flow: ConditionalFlow, z: Tensor, positions: Tensor) -> Tensor:
    for block in reversed(flow.module_list):
        scale = 0.2 * torch.log1p(torch.exp(block.global_scale / 2))
        x1, u2 = ((z @ block.w_perm - block.global_offset) / scale).split(block.splits, dim=1)
        s, t = (block.subnet(torch.cat([x1, positions], 1)) / 10).chunk(2, dim=1)
        z = torch.cat([x1, (u2 - t) * torch.exp(-1.9 * torch.tanh(s))], 1)
    return z


@pytest.mark.parametrize("channels", [2, 5, 32])
def test_a_flow_loses_nothing(channels):
    flow, positions = stirred(channels, blocks=4), torch.randn(6, 4, dtype=torch.float64)
    x = torch.randn(6, channels, dtype=torch.float64)
    torch.testing.assert_close(inverted(flow, flow(x, positions)[0], positions), x, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_density_integrates_to_one():
    torch.manual_seed(0)
    flow = ConditionalFlow(2, 4, 2).double()
    for parameter in flow.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    axis = torch.linspace(-15, 15, 601, dtype=torch.float64)  # 0.05 apart
    grid = torch.cartesian_prod(axis, axis)
    density = (2 * log_density(*flow(grid, torch.randn(1, 4, dtype=torch.float64).expand(len(grid), -1)))).exp()
    assert density.sum().item() * 0.05**2 == pytest.approx(1, abs=1e-3)


def test_a_new_block_scales_by_one_and_moves_nothing_but_by_its_subnet():
    block = CouplingBlock(6, 4)
    for parameter in block.subnet.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(3, 6)
    y, log_det = block(x, torch.randn(3, 4))
    torch.testing.assert_close(y, x @ block.w_perm.T)
    torch.testing.assert_close(log_det, torch.zeros(3), atol=1e-5, rtol=0)


# Trainable parameters of 8 AllInOneBlocks with a 128-number condition and subnet_fc of the official model.py: with
# in = C / 2 + 128, 2 in (in + 1) + C (2 in + 1) of the two linear layers and 2 C of scale and offset, eight times
# (FrEIA 0.2's networks of these settings were found to take these weights and to give the same z, log |det|, gradients)
OFFICIAL = [(512, 8 * (295_680 + 393_728 + 1024)), (1024, 8 * (820_480 + 1_311_744 + 2048))]
OFFICIAL += [(2048, 8 * (2_656_512 + 4_720_640 + 4096))]


@pytest.mark.parametrize(("channels", "count"), OFFICIAL)
def test_parameters_are_those_of_the_official_decoders(channels, count):
    with torch.device("meta"):  # the sizes without the memory
        flow = ConditionalFlow(channels, 128, 8)
    assert sum(p.numel() for p in flow.parameters() if p.requires_grad) == count
    inner, shapes = channels // 2 + 128, {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    block = {
        "global_scale": (1, channels),
        "global_offset": (1, channels),
        "w_perm": (channels, channels),
        "subnet.0.weight": (2 * inner, inner),
        "subnet.0.bias": (2 * inner,),
        "subnet.2.weight": (channels, 2 * inner),
        "subnet.2.bias": (channels,),
    }
    assert shapes == {f"module_list.{i}.{name}": shape for i in range(8) for name, shape in block.items()}


@pytest.mark.parametrize("n", [2, 3, 7, 200])
def test_rotations_are_rotations(n):
    for _ in range(4):
        q = random_rotation(n).double()
        torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64), atol=2e-6, rtol=0)
        assert torch.linalg.det(q).item() == pytest.approx(1, abs=1e-4)


def test_rotations_are_uniform():
    """In the plane the angle is uniform; in space the angle a of turning has density (1 - cos a) / pi on [0, pi]."""
    torch.manual_seed(0)
    plane = torch.stack([random_rotation(2) for _ in range(2000)])
    assert kstest(torch.atan2(plane[:, 1, 0], plane[:, 0, 0]).numpy(), "uniform", (-math.pi, 2 * math.pi)).pvalue > 0.01
    space = torch.stack([random_rotation(3) for _ in range(2000)])
    angles = ((space.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()
    assert kstest(angles.numpy(), lambda a: (a - np.sin(a)) / np.pi).pvalue > 0.01
    for entry in space.flatten(1).T:  # of a uniform rotation of space every entry is uniform on [-1, 1]
        assert kstest(entry.numpy(), "uniform", (-1, 2)).pvalue > 1e-3


def test_places_are_the_official_ones():
    height, width, positions = 3, 5, 16
    found = encode_positions((height, width), positions, torch.device("cpu"))
    assert found.shape == (height, width, positions)
    for y in range(height):
        for x in range(width):
            for k in range(positions // 4):
                frequency = 10000 ** (-2 * k / (positions / 2))
                wanted = [
                    math.sin(x * frequency),
                    math.cos(x * frequency),
                    math.sin(y * frequency),
                    math.cos(y * frequency),
                ]
                half = positions // 2
                got = found[y, x, [2 * k, 2 * k + 1, half + 2 * k, half + 2 * k + 1]]
                np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)


def test_a_flow_learns_a_distribution_at_each_place_and_no_better_than_there_is_to_learn():
    torch.manual_seed(0)
    flow = ConditionalFlow(4, 4, 4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        positions = torch.randn(n, 4)
        return positions.flip(1) + 0.5 * torch.randn(n, 4) * torch.tensor([1.0, 2.0, 0.5, 1.0]), positions

    for _ in range(200):
        loss = flow_likelihood(log_density(*flow(*sample(256))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, positions = sample(10_000)
        learned = log_density(*flow(x, positions)).mean().item()
        elsewhere = log_density(*flow(x, positions.flip(1))).mean().item()
    best = -0.5 * math.log(2 * math.pi * math.e) - math.log(0.5)  # minus the entropy of a channel, on average
    assert best - 0.1 < learned < best + 0.02
    assert elsewhere < learned - 2


def test_bfloat16_touches_the_subnets_alone():
    flow = stirred(32, encoding=8, blocks=8).float()
    x, positions = torch.randn(200, 32), torch.randn(200, 8)
    with torch.no_grad():
        exact = log_density(*flow(x, positions))
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = flow(x, positions)
        found = log_density(z, log_det)
    assert z.dtype == log_det.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert (found - exact).abs().median() < 0.02 * exact.std()
