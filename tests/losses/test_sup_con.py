"""SupCon against a loop over anchors in float64, NT-Xent, closed forms, and two processes against one."""

import math

import pytest
import torch
from torch import nn

from losses.nt_xent import nt_xent
from losses.sup_con import sup_con
from tests.processes import run_processes

LABELS = torch.tensor([2, 0, 2, 1, 2, 0])  # a class of three, one of two, one alone


def by_loop(z, labels, temperature, base, form):
    rows = [(view / view.norm(), label) for picture, label in zip(z, labels) for view in picture]
    total = 0.0
    for i, (anchor, own) in enumerate(rows):
        others = [(torch.exp(anchor @ other / temperature), label) for j, (other, label) in enumerate(rows) if j != i]
        whole = sum(term for term, _ in others)
        shares = [term / whole for term, label in others if label == own]
        if shares and form == "out":
            total = total - sum(share.log() for share in shares) / len(shares)
        elif shares:
            total = total - (sum(shares) / len(shares)).log()
    return temperature / base * total / len(rows)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_equals_the_loop_with_its_gradient(form, views, temperature):
    z = torch.randn(6, views, 5, dtype=torch.float64, requires_grad=True)
    loss = sup_con(z, LABELS, temperature, base_temperature=0.1, form=form)
    expected = by_loop(z, LABELS, temperature, 0.1, form)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["out", "in"])
def test_gradient(form):
    z = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sup_con(z, LABELS[:4], 0.2, form=form), z)


@pytest.mark.parametrize("form", ["out", "in"])
def test_with_a_class_for_each_picture_it_is_nt_xent(form):
    z = torch.randn(5, 2, 7, dtype=torch.float64)
    expected = 0.3 / 0.07 * nt_xent(z[:, 0], z[:, 1], 0.3)
    torch.testing.assert_close(sup_con(z, torch.arange(5), 0.3, form=form), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["out", "in"])
def test_equal_embeddings_cost_the_logarithm_of_the_number_of_others(form):
    loss = sup_con(torch.ones(6, 2, 4), LABELS, 0.5, base_temperature=0.5, form=form)
    assert loss.item() == pytest.approx(math.log(2 * 6 - 1), abs=1e-6)


def test_the_outer_form_is_never_below_the_inner_one_and_a_lone_anchor_costs_nothing():
    z = torch.randn(6, 2, 7)  # Jensen's inequality, the paper's section 3.2.2
    assert sup_con(z, LABELS, 0.1) > sup_con(z, LABELS, 0.1, form="in")
    for form in ("out", "in"):
        assert sup_con(torch.randn(3, 1, 7), torch.arange(3), 0.1, form=form) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_at_a_low_temperature(dtype):
    z = torch.randn(6, 2, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sup_con(z, LABELS, 0.04)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loop(z.double(), LABELS, 0.04, 0.07, "out").item(), rel=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3,\)"):
        sup_con(torch.ones(3, 2), torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) and \(6,\)"):
        sup_con(torch.ones(3, 2, 4), torch.zeros(6), 0.5)


def on_a_shard(rank, world_size, form):
    torch.manual_seed(3)
    images, network = torch.randn(8, 2, 6, dtype=torch.float64), nn.Linear(6, 5).double()
    labels = torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])  # positives lie on both processes
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
    loss = sup_con(model(images[mine]), labels[mine], 0.2, form=form)
    loss.backward()
    return loss.detach(), network.weight.grad


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(form, world_size):
    loss, gradient = on_a_shard(0, 1, form)
    results = run_processes(on_a_shard, world_size, form)
    torch.testing.assert_close(sum(r[0] for r in results) / world_size, loss, rtol=0, atol=1e-12)
    for _, grad in results:
        torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
