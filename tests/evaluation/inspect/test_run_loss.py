"""Statistics estimated anew against torch's own; a loss is the same at every call."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from evaluation.inspect import landscape
from evaluation.inspect.run_loss import ClassifierLoss, PretextLoss
from losses.supervised import cross_entropy
from models.ssl import SSL_METHODS
from models.ssl.byol import BYOL
from models.ssl.simclr import SimCLR
from tests.models.ssl.test_methods import LABELS, build, views
from tests.networks import FourStages


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def classifier() -> ClassifierLoss:
    torch.manual_seed(0)
    network = nn.Sequential(FourStages(), nn.Dropout(0.5), nn.Linear(64, 3))
    network(images(6, 9))
    batches = [([part], labels) for part, labels in zip(images(10).split(4), (torch.arange(10) % 3).split(4))]
    return ClassifierLoss("a", network, batches, [], criterion=cross_entropy, n_classes=3)


def test_statistics_are_the_means_of_the_batches():
    """As of torch's update_bn, but with the dropout off: here in a backbone before it, which it cannot reach."""
    loss, other = classifier(), classifier()
    loss.reestimate()
    update_bn([views[0] for views, _ in other.batches], other.network)
    assert not any(module.training for module in loss.network.modules())
    for (name, one), two in zip(loss.network.state_dict().items(), other.network.state_dict().values()):
        assert torch.equal(one, two), name
    assert loss.network[0].layer1[1].momentum == 0.1
    assert loss.measure() == loss.measure()


def test_the_value_is_that_of_all_images_at_once():
    loss = classifier()
    logits = loss.network(torch.cat([views[0] for views, _ in loss.batches])).detach()
    labels = torch.cat([labels for _, labels in loss.batches])
    value, accuracy = loss.measure()
    torch.testing.assert_close(value, float(nn.functional.cross_entropy(logits.double(), labels)), rtol=1e-6, atol=0)
    assert accuracy == float((logits.argmax(1) == labels).double().mean())
    shares = [float(loss.of(batch).detach()) * len(batch[1]) for batch in loss.batches]
    torch.testing.assert_close(sum(shares) / 10, value, rtol=1e-6, atol=0)


def test_a_pretexts_value_is_the_mean_of_its_batches_and_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    method = SimCLR(FourStages(), temperature=0.5)
    method([images(6, 9), images(6, 8)], torch.zeros(6))
    batches = [([images(4, seed), images(4, seed + 10)], torch.zeros(4, dtype=torch.int64)) for seed in range(3)]
    loss = PretextLoss("s", method, batches, [], seed=0)
    state = torch.random.get_rng_state()
    value, accuracy = loss.measure()
    assert torch.equal(state, torch.random.get_rng_state()) and accuracy != accuracy
    expected = []
    for pair, _ in batches:
        z = nn.functional.normalize(torch.stack([method.online(view) for view in pair], 1), dim=2).flatten(0, 1)
        near = (z @ z.T / 0.5).fill_diagonal_(-torch.inf).log_softmax(1)
        expected.append(-near[torch.arange(8), torch.arange(8) ^ 1].mean().detach())
    torch.testing.assert_close(value, float(torch.stack(expected).mean()), rtol=1e-5, atol=0)


def test_a_targets_statistics_stay():
    torch.manual_seed(0)
    method = BYOL(FourStages(), hidden=16, out=8)
    batches = [([images(4), images(4, 1)], torch.zeros(4, dtype=torch.int64))]
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    PretextLoss("b", method, batches, [], seed=0).reestimate()
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("target.") for name in changed)
    assert {name.rpartition(".")[2] for name in changed} <= {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("name", SSL_METHODS)
def test_every_method_is_measured_and_restored_and_has_another_loss_elsewhere(name):
    method = build(name)
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    loss = PretextLoss(name, method, [(views(name), LABELS)], [], seed=0)
    with landscape.restored(method) as start:
        own, _ = loss.measure()
        directions = [landscape.random_direction(landscape.learned(method), seed) for seed in (0, 1)]
        landscape.move(method, start, directions, [0.4, -0.3])
        away, _ = loss.measure()
        landscape.move(method, start, directions, [0.0, 0.0])
        assert loss.measure()[0] == own != away
        assert not any(key.startswith("target.") for key in directions[0])
        landscape.move(method, start, directions, [0.4, -0.3])
    assert all(torch.equal(tensor, before[key]) for key, tensor in method.state_dict().items())
