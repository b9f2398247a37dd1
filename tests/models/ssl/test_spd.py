"""SPD beside every pretraining method: the sum, batch norm, several processes, what of a method it leaves as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses.spd import spd
from models.ssl import SSL_METHODS
from models.ssl.spd import SPD
from runtime.errors import UserError
from tests.models.ssl.test_methods import CASES, build, views
from tests.processes import run_processes

CONTRASTIVE = [
    name for name in SSL_METHODS if SSL_METHODS[name].projects
]  # what `online` gives of a view is a projection


def raw_images(name, count=8):
    """The method's views, then anchors, positives and negatives: two slight changes, and a strong one in a corner."""
    torch.manual_seed(5)
    anchor = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    positive = anchor + 0.1 * torch.randn_like(anchor)
    negative = positive.clone()
    negative[..., :3, :3] += torch.randn(count, 3, 3, 3, dtype=torch.float64)
    return [*views(name), anchor, positive, negative]


def step(model, images):
    loss, stats = model(images, torch.zeros(len(images[0])))
    loss.backward()
    return loss.detach(), stats, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_loss_is_the_methods_and_the_weighted_term(name):
    alone, _, without = step(build(name), views(name))
    method = build(name)
    loss, stats, grads = step(SPD(method, 0.3), raw_images(name))
    with torch.no_grad():
        a, p, n = (F.normalize(build(name).online(x)) for x in raw_images(name)[-3:])
        away, near = (a * n).sum(1).mean(), (a * p).sum(1).mean()
    torch.testing.assert_close(loss, alone + 0.3 * (away - near), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats["spd"], away - near, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats["defect_cosine"], away, rtol=1e-12, atol=1e-12)
    assert all(not value.requires_grad and (value.ndim == 0) == (key != "embeddings") for key, value in stats.items())

    other = build(name)
    spd(*other.online(torch.cat(raw_images(name)[-3:])).chunk(3))[0].backward()
    term = {f"method.{n}": p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert grads.keys() == {f"method.{n}" for n in without}  # an EMA target takes no part
    for key, grad in grads.items():
        both = without[key.removeprefix("method.")] + 0.3 * term.get(key, 0)  # projections have no predictor
        torch.testing.assert_close(grad, both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_weight_0_is_the_method_alone_bit_for_bit(name):
    loss, _, grads = step(build(name), views(name))
    with_term, _, others = step(SPD(build(name), 0.0), raw_images(name))
    assert torch.equal(with_term, loss)
    assert others.keys() == {f"method.{n}" for n in grads}
    assert all(torch.equal(others[f"method.{n}"], grad) for n, grad in grads.items())


def gradients(rank, world_size, name):
    method = build(name)
    model = SPD(method, 0.5)
    model = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    loss, stats, _ = step(model, [view[mine] for view in raw_images(name)])
    return loss, stats["spd"], {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def every_method(rank, world_size):
    return {name: gradients(rank, world_size, name) for name in CONTRASTIVE}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request):
    return run_processes(every_method, request.param)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_processes_on_different_shards_have_the_gradients_of_one(name, processes):
    loss, term, expected = gradients(0, 1, name)
    results = [result[name] for result in processes]
    for i, value in enumerate((loss, term)):
        torch.testing.assert_close(sum(r[i] for r in results) / len(results), value, rtol=0, atol=1e-10)
    assert results[0][1] != results[1][1]
    for *_, grads in results:
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10)


class Normed(nn.Module):
    """A backbone with batch norm that remembers the batches it saw."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.batches = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), []

    def forward(self, x):
        self.batches.append(x)
        return self.bn1(self.conv1(x)).relu().mean(dim=(2, 3))


def normed(name):
    torch.manual_seed(2)
    return SSL_METHODS[name](Normed(), **CASES[name]).double()


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_batch_norm_sees_the_methods_views_alone_and_the_three_together(name):
    method, alone = normed(name), normed(name)
    expected, _ = alone(views(name), torch.zeros(8))
    loss, stats = SPD(method, 0.5)(raw_images(name), torch.zeros(8))
    torch.testing.assert_close(loss - 0.5 * stats["spd"], expected, rtol=1e-12, atol=1e-12)
    *before, three = method.online.backbone.batches
    assert [b.shape for b in before] == [b.shape for b in alone.online.backbone.batches]
    assert torch.equal(three, torch.cat(raw_images(name)[-3:]))
    runs = len(before)
    assert (
        method.online.backbone.bn1.num_batches_tracked == alone.online.backbone.bn1.num_batches_tracked + 1 == runs + 1
    )
    if method.target is not None:
        assert len(method.target.backbone.batches) == len(alone.target.backbone.batches)


@pytest.mark.parametrize("name", ["simclr", "dino", "supcon"])
def test_the_term_alone_learns_to_spot_the_difference(name):
    method, three = build(name), torch.cat(raw_images(name)[-3:])
    for linear in method.online.modules():
        if isinstance(linear, nn.Linear):  # DINO's start is so small that the first steps' biases are all there is
            nn.init.orthogonal_(linear.weight)
    optimizer = torch.optim.Adam(method.online.parameters(), lr=0.01)
    terms = []
    for _ in range(60):
        term, _ = spd(*method.online(three).chunk(3))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        terms.append(term.item())
    assert abs(terms[0]) < 0.05 and terms[-1] < -1


def test_a_few_images_are_overfit_and_their_defects_too():
    def after(weight):
        method, images = build("simclr").float(), [view.float() for view in raw_images("simclr")]
        optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
        for _ in range(60):
            loss, stats = SPD(method, weight)(images, torch.zeros(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return stats["spd"].item()

    assert after(1.0) < after(0.0) - 0.1


def test_a_method_is_not_changed():
    method = build("simclr")
    names = list(method.state_dict())
    model = SPD(method, 0.1)
    assert list(method.state_dict()) == names and len(model.state_dict()) == len(names)
    assert [id(p) for p in model.parameters()] == [id(p) for p in method.parameters()]


@pytest.mark.parametrize("name", ["revd", "patch_position"])
def test_a_method_without_projections_is_refused(name):
    with pytest.raises(UserError, match=r"(RevD|PatchPosition) makes none: remove spd"):
        SPD(build(name), 0.1)


def test_the_number_of_views_is_that_of_the_method_and_three():
    with pytest.raises(UserError, match="Triplet takes 3 views, and augment makes 2"):
        SPD(build("triplet"), 0.1)([torch.zeros(2, 3, 8, 8).double()] * 5, torch.zeros(2))
