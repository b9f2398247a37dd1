"""CDO's loss and its gradient against a plain float64 loop, the ends of its range, and two processes against one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.cdo import LEAST, collaborative_discrepancy, discrepancy
from tests.processes import run_processes


def maps(batch: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, c, h, w, dtype=dtype) for c, h, w in ((4, 6, 8), (5, 3, 4), (7, 2, 1))]


def by_loop(
    expert: list[Tensor], apprentice: list[Tensor], abnormal: Tensor, gamma: float, unit_levels: bool = False
) -> Tensor:
    """Position by position, the weights as plain numbers; `abnormal` has the first level's resolution."""
    batch, (height, width), loss = len(abnormal), expert[0].shape[-2:], 0
    for e, a in zip(expert, apprentice):
        if unit_levels:  # the official v2: its forward pass, before the loss
            e, a = (x / x.square().sum(1, keepdim=True).sqrt() for x in (e, a))
        e, a = (F.interpolate(x, (height, width), mode="bilinear", align_corners=True) for x in (e, a))
        groups = {False: [], True: []}
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    u, v = e[b, :, y, x], a[b, :, y, x]
                    d = ((u / (u**2).sum().sqrt() - v / (v**2).sum().sqrt()) ** 2).sum()
                    groups[bool(abnormal[b, y, x])].append(d)
        top, bottom = 0, 0
        for is_abnormal, values in groups.items():
            held = [max(float(d.detach()), LEAST) for d in values]
            for d, h in zip(values, held):
                mean = sum(held) / len(held)
                weight = (mean / h) ** gamma if is_abnormal else (h / mean) ** gamma
                top = top - weight * d if is_abnormal else top + weight * d
                bottom = bottom + weight
        loss = loss + batch * top / bottom
    return loss


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.0])
@pytest.mark.parametrize("unit_levels", [False, True])
def test_loss_and_gradient_equal_the_loop(share, batch, gamma, unit_levels):
    """None, some and all positions abnormal; the weights of the loop are numbers, so ours must carry no gradient."""
    expert, apprentice = maps(batch), [x.requires_grad_() for x in maps(batch)]
    abnormal = torch.rand(batch, 6, 8) < share
    ours, means = collaborative_discrepancy(expert, apprentice, abnormal, gamma, unit_levels=unit_levels)
    loop = by_loop(expert, apprentice, abnormal, gamma, unit_levels)
    torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)
    assert (means["normal"] > 0) == (not abnormal.all()) and (means["abnormal"] > 0) == bool(abnormal.any())
    for a, b in zip(torch.autograd.grad(ours, apprentice), torch.autograd.grad(loop, apprentice)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_float32_is_near_float64_also_inside_autocast():
    expert, apprentice, abnormal = maps(), maps(), torch.rand(3, 6, 8) < 0.3
    exact, _ = collaborative_discrepancy(expert, apprentice, abnormal)
    single = [[x.float() for x in side] for side in (expert, apprentice)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = collaborative_discrepancy(*single, abnormal)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_equal_features_cost_nothing_and_their_gradient_is_finite():
    expert = maps(dtype=torch.float32)
    apprentice = [x.clone().requires_grad_() for x in expert]
    for share in (0.0, 0.3, 1.0):
        loss, _ = collaborative_discrepancy(expert, apprentice, torch.rand(3, 6, 8) < share)
        assert loss == 0
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss, apprentice))


def test_one_equal_abnormal_position_does_not_explode():
    expert, apprentice = maps(dtype=torch.float32)[:1], maps(dtype=torch.float32)[:1]
    apprentice[0][0, :, 2, 3] = 2 * expert[0][0, :, 2, 3]
    abnormal = torch.zeros(3, 6, 8, dtype=torch.bool)
    abnormal[0, 2, 2:5] = True
    for gamma in (2.0, 5.0):
        apprentice[0].requires_grad_()
        loss, _ = collaborative_discrepancy(expert, apprentice, abnormal, gamma)
        assert loss.isfinite() and torch.autograd.grad(loss, apprentice)[0].isfinite().all()


def test_a_finer_mask_is_asked_at_the_nearest_pixel():
    expert, apprentice = maps(), maps()
    fine = torch.rand(3, 24, 32) < 0.3
    loss, _ = collaborative_discrepancy(expert, apprentice, fine)
    coarse, _ = collaborative_discrepancy(expert, apprentice, fine[:, ::4, ::4])
    assert torch.equal(loss, coarse)


def test_discrepancy_is_twice_one_minus_cosine_and_ignores_lengths():
    expert, apprentice = maps()[:1], maps()[:1]
    expected = 2 - 2 * F.cosine_similarity(expert[0], apprentice[0])
    torch.testing.assert_close(discrepancy(expert, [3 * apprentice[0]])[0], expected)
    torch.testing.assert_close(discrepancy(expert, [-expert[0]])[0], torch.full_like(expected, 4))


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(3, 7, 2, 1\)"):
        discrepancy(maps(), maps()[:2])


def example() -> tuple[Tensor, list[Tensor], Tensor, nn.Module]:
    torch.manual_seed(5)
    images, network = torch.randn(4, 3, 6, 8, dtype=torch.float64), nn.Conv2d(3, 4, 1).double()
    abnormal = torch.rand(4, 6, 8) < 0.3
    abnormal[2:] = False  # the second process has none
    return images, [torch.randn(4, 4, 6, 8, dtype=torch.float64)], abnormal, network


def on_a_shard(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    images, (expert,), abnormal, network = example()
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    model = nn.parallel.DistributedDataParallel(network)
    loss, _ = collaborative_discrepancy([expert[mine]], [model(images[mine])], abnormal[mine])
    loss.backward()
    return loss.detach(), network.weight.grad


def test_two_processes_have_the_loss_and_the_gradient_of_one():
    images, expert, abnormal, network = example()
    loss, _ = collaborative_discrepancy(expert, [network(images)], abnormal)
    loss.backward()
    results = run_processes(on_a_shard, 2)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, loss.detach(), rtol=1e-12, atol=1e-12)
    for _, gradient in results:
        torch.testing.assert_close(gradient, network.weight.grad, rtol=1e-11, atol=1e-12)
