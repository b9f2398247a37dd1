"""DINO's loss against a loop in float64: pairs, centre, temperatures, closed forms, two processes against one."""

import math

import pytest
import torch

from losses.dino import DINOLoss
from tests.processes import run_processes


def by_loop(student, teacher, center, student_temperature, teacher_temperature):
    views, batch, k = student.shape
    total, pairs = 0.0, 0
    for i in range(2):
        for v in range(views):
            if v == i:
                continue
            pairs += 1
            for b in range(batch):
                t = (teacher[i, b] - center) / teacher_temperature
                q = torch.exp(t - t.max()) / torch.exp(t - t.max()).sum()
                s = student[v, b] / student_temperature
                log_p = s - s.max() - torch.log(torch.exp(s - s.max()).sum())
                total = total - sum(q[j] * log_p[j] for j in range(k)) / batch
    assert pairs == 2 * views - 2
    return total / pairs


@pytest.mark.parametrize("views, batch", [(2, 1), (2, 3), (6, 2)])
def test_equals_the_loop(views, batch):
    student, teacher = torch.randn(views, batch, 5).double(), torch.randn(2, batch, 5).double()
    loss = DINOLoss(5, center_momentum=0.8).double()
    loss.center.copy_(torch.randn(5))
    before = loss.center.clone()
    value, _ = loss(student, teacher, 0.05)
    torch.testing.assert_close(value, by_loop(student, teacher, before[0], 0.1, 0.05), rtol=1e-11, atol=1e-12)
    expected = 0.8 * before + 0.2 * teacher.mean(dim=(0, 1))  # from the raw outputs, after the loss
    torch.testing.assert_close(loss.center, expected, rtol=1e-12, atol=1e-12)


def test_uniform_outputs_cost_ln_k():
    loss, entropy = DINOLoss(4096)(torch.zeros(4, 2, 4096), torch.zeros(2, 2, 4096), 0.04)
    assert loss.item() == pytest.approx(math.log(4096), rel=1e-4)
    assert entropy.item() == pytest.approx(math.log(4096), rel=1e-6)


def test_only_the_student_has_gradients():
    student = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = DINOLoss(4).double().eval()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 0.07)[0], student)
    loss(student, teacher, 0.07)[0].backward()
    assert teacher.grad is None


def test_evaluation_leaves_the_center():
    loss = DINOLoss(4).eval()
    loss(torch.randn(2, 2, 4), torch.randn(2, 2, 4), 0.04)
    assert (loss.center == 0).all()


def test_half_precision_with_large_logits_stays_finite():
    student, teacher = 100 * torch.randn(4, 2, 64).half(), 100 * torch.randn(2, 2, 64).half()
    value, _ = DINOLoss(64)(student, teacher, 0.04)
    assert value.dtype == torch.float32 and value.isfinite()


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(V, B, K\)"):
        DINOLoss(4)(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), 0.04)


def shard(rank, world_size):
    torch.manual_seed(1)
    student, teacher = torch.randn(4, 6, 5).double(), torch.randn(2, 6, 5).double()
    mine = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    student = student[:, mine].clone().requires_grad_()
    loss = DINOLoss(5).double()
    for _ in range(2):  # the second loss uses the reduced centre
        value, _ = loss(student, teacher[:, mine], 0.04)
    value.backward()
    return value.detach(), loss.center, student.grad / world_size


def test_two_processes_equal_one():
    value, center, grad = shard(0, 1)
    results = run_processes(shard, 2)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in results], dim=1), grad, rtol=0, atol=1e-12)
    for _, other, _ in results:
        torch.testing.assert_close(other, center, rtol=0, atol=1e-12)
