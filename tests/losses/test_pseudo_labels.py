"""The rules of pseudo-labels against plain loops over the papers' equations, published thresholds, two
processes against one, and their state."""

import math

import pytest
import torch
from torch import nn

from losses.consistency import consistency
from losses.pseudo_labels import PSEUDO_LABELS
from tests.processes import assert_processes_equal_one, run_processes

CLASSES, IMAGES, STEPS = 3, 12, 6


def build(name: str, **options) -> nn.Module:
    return PSEUDO_LABELS[name](CLASSES, IMAGES, **options)


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of 6 of 12 images for each step, some sure and some not, ever surer of class 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(STEPS):
        logits = torch.randn(6, CLASSES, generator=generator) * 3 + torch.tensor([step / 2, 0.0, -1.0])
        rows.append((logits, torch.randperm(IMAGES, generator=generator)[:6]))
    return rows


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    exps = [math.exp((x - max(row)) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def one_hot(c: int) -> list[float]:
    return [float(i == c) for i in range(CLASSES)]


class Oracle:
    """One image at a time, in Python's floats."""

    def __init__(self, name: str):
        self.name, self.last = name, [-1] * IMAGES
        self.top, self.shares, self.histogram = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
        self.rho_0, self.steps = 0.9, 0

    def __call__(self, logits: list[list[float]], numbers: list[int]):
        return getattr(self, self.name)(logits, numbers)

    def fixmatch(self, logits, _):
        p = [softmax(row) for row in logits]
        return [one_hot(q.index(max(q))) for q in p], [float(max(q) >= 0.95) for q in p]

    def flexmatch(self, logits, numbers):
        p = [softmax(row) for row in logits]
        counts = [self.last.count(c) for c in range(CLASSES)]
        most = max(*counts, self.last.count(-1))
        thresholds = [0.95 * (n / most) / (2 - n / most) for n in counts]
        targets, keep = [], []
        for q in p:
            c = q.index(max(q))
            targets.append(one_hot(c))
            keep.append(float(max(q) >= thresholds[c]))
        for q, number in zip(p, numbers):
            if max(q) >= 0.95:
                self.last[number] = q.index(max(q))
        return targets, keep

    def freematch(self, logits, _):
        p = [softmax(row) for row in logits]
        n, m = len(p), 0.9
        self.top = m * self.top + (1 - m) * sum(map(max, p)) / n
        self.shares = [m * s + (1 - m) * sum(q[c] for q in p) / n for c, s in enumerate(self.shares)]
        found = [q.index(max(q)) for q in p]
        self.histogram = [m * h + (1 - m) * found.count(c) / n for c, h in enumerate(self.histogram)]
        limits = [self.top * s / max(self.shares) for s in self.shares]
        return [one_hot(c) for c in found], [float(max(q) >= limits[c]) for q, c in zip(p, found)]

    def dash(self, logits, _):
        rho = max(1.0001 * 1.27 ** -(self.steps // 2) * self.rho_0, 0.6)
        self.steps += 1
        targets, keep = [], []
        for row in logits:
            p = softmax(row)
            target = one_hot(p.index(max(p))) if rho <= 0.6 else softmax(row, 0.5)
            targets.append(target)
            keep.append(float(-sum(t * math.log(q) for t, q in zip(target, p)) <= rho))
        return targets, keep


OPTIONS = {"freematch": {"momentum": 0.9}, "dash": {"least": 0.6, "every": 2}}


def started(name: str) -> nn.Module:
    rule = build(name, **OPTIONS.get(name, {}))
    if name == "dash":
        rule.first.fill_(0.9)
    return rule


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch", "freematch", "dash"])
def test_a_rule_is_the_papers(name):
    rule, oracle, kept = started(name), Oracle(name), []
    for logits, numbers in batches():
        targets, keep = rule(logits, numbers)
        expected, wanted = oracle(logits.double().tolist(), numbers.tolist())
        torch.testing.assert_close(targets, torch.tensor(expected))
        assert keep.tolist() == wanted
        kept += wanted
    assert 0 < sum(kept) < len(kept)  # both occur
    if name == "freematch":
        torch.testing.assert_close(rule.histogram, torch.tensor(oracle.histogram))
    if name == "dash":
        assert oracle.steps == STEPS and float(rule.threshold()) == pytest.approx(0.6)


def test_published_thresholds_of_flexmatch():
    """beta 0, 1/4, 1/2, 3/4 and 1 of 0.95, where the most frequent of all has 4 images."""
    rule = PSEUDO_LABELS["flexmatch"](5, 11)
    assert rule.thresholds().tolist() == [0] * 5  # nothing was ever sure: all count
    rule.last.copy_(torch.tensor([-1] + [1] + [2] * 2 + [3] * 3 + [4] * 4))
    assert [round(t, 3) for t in rule.thresholds().tolist()] == [0, 0.136, 0.317, 0.57, 0.95]
    rule.last[:7] = -1  # 7 that were never sure count as the largest: beta is 4 / 7
    assert rule.thresholds().tolist() == pytest.approx([0, 0, 0, 0, 0.95 * 0.4])


def test_ends_of_dash():
    rule = build("dash", every=1)
    logits = torch.randn(40, CLASSES)
    labels = torch.arange(40) % CLASSES
    rule.begin(0, lambda which: (logits, labels) if which == "labelled" else pytest.fail(which))
    loss = float(nn.functional.cross_entropy(logits, labels))
    assert float(rule.threshold()) == pytest.approx(1.0001 * loss)
    rule.begin(1, pytest.fail)  # only once
    for _ in range(3):
        rule(logits[:4], torch.arange(4))
    assert float(rule.threshold()) == pytest.approx(1.0001 * loss * 1.27**-3)
    rule.first.zero_()  # a labelled set that is learned already
    assert float(rule.threshold()) == pytest.approx(0.05)
    _, keep = rule(torch.tensor([[3.2, 0.0, 0.0], [4.2, 0.0, 0.0]]), torch.arange(2))  # p = 0.925 and 0.971
    assert keep.tolist() == [0, 1]


def test_rounds_keep_their_pseudo_labels():
    rule = build("self_training", threshold=0.8, round_epochs=3)
    seen = [torch.tensor([[5.0, 0, 0], [1, 0, 0], [0, 0, 5]] * 4), torch.zeros(IMAGES, CLASSES)]
    asked = []

    def look(which):
        asked.append(which)
        return seen[len(asked) - 1], torch.zeros(IMAGES)

    numbers = torch.tensor([2, 1, 0, 5])
    assert rule(torch.randn(4, CLASSES), numbers)[1].tolist() == [0] * 4  # before the first round
    for epoch in range(3):
        rule.begin(epoch, look)
        targets, keep = rule(torch.randn(4, CLASSES), numbers)
        assert keep.tolist() == [1, 0, 1, 1] and targets[keep > 0].argmax(1).tolist() == [2, 0, 2]
    rule.begin(3, look)
    assert rule(torch.randn(4, CLASSES), numbers)[1].tolist() == [0] * 4 and asked == ["unlabelled"] * 2


def test_a_tie_takes_the_first_class_and_a_threshold_is_reached_by_itself():
    targets, keep = build("fixmatch", threshold=0.5)(torch.tensor([[9.0, 9.0, -99.0]]), torch.tensor([0]))
    assert targets.tolist() == [[1, 0, 0]] and keep.tolist() == [1]


def in_parts(rank: int, world_size: int, name: str):
    rule, results = started(name), []
    for logits, numbers in batches():
        part = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
        results.append(rule(logits[part], numbers[part]))
    return results, rule.state_dict()


@pytest.mark.parametrize("name", ["flexmatch", "freematch", "dash"])
def test_two_processes_have_one_state(name):
    whole, state = in_parts(0, 1, name)
    (first, one), (second, two) = run_processes(in_parts, 2, name)
    for key, value in state.items():
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], value)
    for (targets, keep), *halves in zip(whole, first, second):
        torch.testing.assert_close(torch.cat([half[0] for half in halves]), targets)
        assert torch.equal(torch.cat([half[1] for half in halves]), keep)


@pytest.mark.parametrize("name", PSEUDO_LABELS)
def test_taken_up_again_from_its_state(name):
    rule, again = started(name), build(name, **OPTIONS.get(name, {}))
    for logits, numbers in batches()[:3]:
        rule(logits, numbers)
    again.load_state_dict(rule.state_dict())
    for logits, numbers in batches()[3:]:
        for a, b in zip(rule(logits, numbers), again(logits, numbers)):
            assert torch.equal(a, b)


def penalty_by_hand(strong, keep, shares, histogram):
    """Equation 12 of FreeMatch for the views kept, one after the other."""
    p = [softmax(row) for row, k in zip(strong, keep) if k]
    found = [q.index(max(q)) for q in p]
    r = []
    for c in range(CLASSES):
        h = found.count(c) / len(p)
        r.append(sum(q[c] for q in p) / len(p) / h if h else 0.0)
    q = [s / h if h else 0.0 for s, h in zip(shares, histogram)]
    return sum(a / sum(q) * math.log(b / sum(r) + 1e-12) for a, b in zip(q, r))


@pytest.mark.parametrize("keep", [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]])
def test_fairness_is_the_papers(keep):
    rule = build("freematch", fairness=0.3)
    strong = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(3)).double()
    rule.double().shares.copy_(torch.tensor([0.5, 0.2, 0.3]))
    rule.histogram.copy_(torch.tensor([0.7, 0.0, 0.3]))
    ours = rule.penalty(strong, torch.tensor(keep).double())
    assert float(ours) == pytest.approx(0.3 * penalty_by_hand(strong.tolist(), keep, [0.5, 0.2, 0.3], [0.7, 0, 0.3]))


def test_nothing_kept_is_no_penalty_and_no_gradient():
    rule, strong = build("freematch"), torch.randn(4, CLASSES, requires_grad=True)
    loss = rule.penalty(strong, torch.zeros(4)) + consistency(strong, torch.eye(3)[[0, 1, 2, 0]], torch.zeros(4))
    loss.backward()
    assert loss.item() == 0 and torch.equal(strong.grad, torch.zeros(4, CLASSES))


def test_consistency_is_the_mean_over_all():
    strong, keep = torch.randn(5, CLASSES), torch.tensor([1.0, 0, 0, 1, 0])
    targets = torch.rand(5, CLASSES)
    expected = 0.0
    for row, target, k in zip(strong.double().tolist(), targets.tolist(), keep.tolist()):
        expected -= k * sum(t * math.log(p) for t, p in zip(target, softmax(row))) / 5
    assert float(consistency(strong, targets, keep)) == pytest.approx(expected)


def gradient_of_a_part(rank: int, world_size: int):
    """Of penalty and consistency together; DDP's mean over processes is taken by the caller."""
    generator = torch.Generator().manual_seed(1)
    inputs, weights = torch.randn(8, 4, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
    weights.requires_grad_()
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    keep = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0]).double()[part]
    rule = build("freematch", fairness=1.0).double()
    rule.shares.copy_(torch.tensor([0.5, 0.2, 0.3]))
    strong = inputs[part] @ weights
    loss = rule.penalty(strong, keep) + consistency(strong, torch.eye(3).double()[torch.arange(8) % 3][part], keep)
    loss.backward()
    gradient = weights.grad
    if world_size > 1:
        torch.distributed.all_reduce(gradient)
    return [(loss.detach(), gradient / world_size)]


def test_processes_have_the_gradient_of_one():
    assert_processes_equal_one(gradient_of_a_part, 2)
