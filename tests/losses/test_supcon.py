"""SupCon against a loop over anchors in float64, NT-Xent, closed forms, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losses.nt_xent import nt_xent
from losses.supcon import sup_con
from tests.processes import assert_processes_equal_one

LABELS = torch.tensor([2, 0, 2, 1, 2, 0])  # a class of three, one of two, one alone
BANK_LABELS = torch.tensor([0, -1, 2, 7, 0])  # of class 1 none, of class 7 in the bank only
GAMMAS = [0.0, 0.5, 1.0, 2.0]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def memory(rows, features=5):
    """The bank's arguments: none, or five rows of unit length with labels."""
    return {"bank": unit(rows, features), "bank_labels": BANK_LABELS} if rows else {}


def by_loop(z, labels, temperature, base, form, bank=(), bank_labels=(), gamma=0.0):
    anchors = [(view / view.norm(), int(label)) for image, label in zip(z, labels) for view in image]
    rows = anchors + [(row, int(label)) for row, label in zip(bank, bank_labels)]
    total = 0.0
    for i, (anchor, own) in enumerate(anchors):
        others = [(torch.exp(anchor @ other / temperature), label) for j, (other, label) in enumerate(rows) if j != i]
        whole = sum(term for term, _ in others)
        shares, rests = [], []  # p, and 1 - p without cancellation
        for p, (term, label) in enumerate(others):
            if label == own:
                shares.append(term / whole)
                rests.append(sum(other for j, (other, _) in enumerate(others) if j != p) / whole)
        n = len(shares)
        if shares and form == "out":
            total = total - sum(rest**gamma * share.log() for share, rest in zip(shares, rests)) / n
        elif shares:
            total = total - (sum(rests) / n) ** gamma * (sum(shares) / n).log()
    return temperature / base * total / len(anchors)


def assert_equals_the_loop(z, labels, temperature, form, gamma, bank):
    z.requires_grad_()
    loss = sup_con(z, labels, temperature, base_temperature=0.1, form=form, gamma=gamma, **bank)
    expected = by_loop(z, labels, temperature, 0.1, form, gamma=gamma, **bank)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize("gamma, rows", [(0.0, 0), (0.0, 5), (0.5, 5), (1.0, 0), (2.0, 5)])
def test_equals_the_loop_with_its_gradient(form, views, temperature, gamma, rows):
    z = torch.randn(6, views, 5, dtype=torch.float64)
    assert_equals_the_loop(z, LABELS, temperature, form, gamma, memory(rows))


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_ties_and_a_single_image(form, gamma):
    z, bank = torch.randn(1, 2, 5, dtype=torch.float64), memory(5)
    assert_equals_the_loop(z, torch.tensor([2]), 0.2, form, gamma, bank)
    assert_equals_the_loop(z[:, :1].detach(), torch.tensor([0]), 0.2, form, gamma, bank)  # positives only in the bank
    tied = torch.cat([z.detach(), z.detach().flip(1), torch.randn_like(z)])[[0, 1, 2, 0]]
    assert_equals_the_loop(tied, torch.tensor([0, 0, 1, 1]), 0.2, form, gamma, bank)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [0, 5])
def test_gradient(form, gamma, rows):
    z, bank = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True), memory(rows)
    assert torch.autograd.gradcheck(lambda z: sup_con(z, LABELS[:4], 0.2, form=form, gamma=gamma, **bank), z)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("form, views", [("out", 2), ("in", 2), ("out", 3), ("out", 4)])
def test_with_a_class_for_each_image_it_is_nt_xent(form, views, gamma):
    z, bank = torch.randn(5, views, 7, dtype=torch.float64), unit(4, 7)
    strangers = {"bank": bank, "bank_labels": torch.tensor([-1, 5, 6, -1])}
    for rows, mine in ((None, {}), (bank, strangers)):
        loss = sup_con(z, torch.arange(5), 0.3, form=form, gamma=gamma, **mine)
        expected = 0.3 / 0.07 * nt_xent(z, 0.3, bank=rows, gamma=gamma)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [0, 5])
def test_equal_embeddings_cost_the_logarithm_of_the_number_of_others(form, gamma, rows):
    bank = {"bank": torch.full((rows, 4), 0.5), "bank_labels": BANK_LABELS} if rows else {}
    loss = sup_con(torch.ones(6, 2, 4), LABELS, 0.5, base_temperature=0.5, form=form, gamma=gamma, **bank)
    others = 2 * 6 - 1 + rows
    assert loss.item() == pytest.approx((1 - 1 / others) ** gamma * math.log(others), abs=1e-6)


def test_the_outer_form_is_never_below_the_inner_one():
    z = torch.randn(6, 2, 7)  # Jensen's inequality, the paper's section 3.2.2
    assert sup_con(z, LABELS, 0.1) > sup_con(z, LABELS, 0.1, form="in")


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_lone_anchor_costs_nothing(form, gamma, batch):
    z = torch.randn(batch, 1, 7, requires_grad=True)
    with torch.autograd.set_detect_anomaly(batch > 1):  # one that is all alone has NaN on the way
        loss = sup_con(z, torch.arange(batch), 0.1, form=form, gamma=gamma)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_classes_told_apart_surely_cost_nothing_and_a_lost_pair_stays_finite(form, gamma):
    axis = torch.tensor([1.0, 0.0])
    sure = torch.stack([axis, axis, -axis, -axis]).view(2, 2, 2).requires_grad_()  # p = 1 - 2 exp(-200)
    lost = torch.stack([axis, -axis, axis, -axis]).view(2, 2, 2).requires_grad_()  # p = exp(-200)
    for z, value in ((sure, 0), (lost, 200)):
        loss = sup_con(z, torch.arange(2), 0.01, base_temperature=0.01, form=form, gamma=gamma)
        assert loss.item() == pytest.approx(value, abs=1e-3)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_invariances(form, gamma):
    z, memories = torch.randn(6, 3, 5, dtype=torch.float64), memory(5)
    bank, bank_labels, order = memories["bank"], BANK_LABELS, torch.randperm(6)

    def value(z, labels, bank, bank_labels):
        return sup_con(z, labels, 0.3, form=form, gamma=gamma, bank=bank, bank_labels=bank_labels)

    expected = value(z, LABELS, bank, bank_labels)
    sizes = 10 * torch.rand(6, 3, 1, dtype=torch.float64) + 0.1
    renamed = torch.tensor([5, 3, 9, 4, 4, 4, 4, 6])  # of the labels 0, 1, 2 and 7
    for same in (
        (z[order], LABELS[order], bank, bank_labels),
        (z.flip(1), LABELS, bank, bank_labels),
        (sizes * z, LABELS, bank, bank_labels),
        (z, LABELS, bank.flip(0), bank_labels.flip(0)),
        (z, renamed[LABELS], bank, torch.where(bank_labels < 0, -1, renamed[bank_labels])),
    ):
        torch.testing.assert_close(value(*same), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(value(z, LABELS.roll(1), bank, bank_labels), expected)
    assert not torch.allclose(value(z, LABELS, bank, bank_labels.roll(1)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("size, gamma", [(1, 0.0), (1, 0.5), (3000, 0.0)])  # float16's squares end at 65504
def test_low_precision_at_a_low_temperature(dtype, form, size, gamma):
    z, bank = (size * torch.randn(6, 2, 16)).to(dtype).requires_grad_(), unit(5, 16).float()
    with torch.autocast("cpu", dtype):
        loss = sup_con(z, LABELS, 0.04, form=form, bank=bank, bank_labels=BANK_LABELS, gamma=gamma)
    exact = z.detach().double().requires_grad_()
    expected = by_loop(exact, LABELS, 0.04, 0.07, form, bank.double(), BANK_LABELS, gamma)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(1024 * value, x)[0] for value, x in ((loss, z), (expected, exact)))
    torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("form", ["out", "in"])
def test_the_bank_has_no_gradient_and_no_value_is_read_on_the_host(form):
    z, bank = torch.randn(6, 2, 3, requires_grad=True), unit(5, 3).requires_grad_()
    loss = sup_con(z, LABELS, 0.3, form=form, bank=bank, bank_labels=BANK_LABELS)
    gradients = torch.autograd.grad(loss, [z, bank], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None
    with FakeTensorMode(), torch.device("cuda"):
        bank = {"bank": torch.randn(5, 4), "bank_labels": torch.arange(5)}
        assert sup_con(torch.randn(2, 3, 4), torch.arange(2), 0.3, form=form, gamma=0.5, **bank).device.type == "cuda"


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3,\)"):
        sup_con(torch.ones(3, 2), torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) and \(6,\)"):
        sup_con(torch.ones(3, 2, 4), torch.zeros(6), 0.5)


VARIANTS = [(2, 0, 0.0), (3, 5, 0.0), (2, 5, 0.5)]  # views, rows of the bank, gamma


def on_a_shard(rank, world_size):
    results = []
    labels = torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])  # positives lie on both processes
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for views, rows, gamma in VARIANTS:
        for form in ("out", "in"):
            torch.manual_seed(3)
            images, network = torch.randn(8, views, 6, dtype=torch.float64), nn.Linear(6, 5).double()
            model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
            loss = sup_con(model(images[mine]), labels[mine], 0.2, form=form, gamma=gamma, **memory(rows))
            loss.backward()
            results.append((loss.detach(), network.weight.grad))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    assert_processes_equal_one(on_a_shard, world_size)
