"""The average of a classifier's weights: a plain loop in float64, BatchNorm's statistics, and what a checkpoint has."""

import torch
from torch import nn

from training.ema import Averaged


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def train(averaged: Averaged, steps: int) -> list[dict]:
    """Its states after each step."""
    optimizer, states = torch.optim.SGD(averaged.trained.parameters(), lr=0.1), []
    for _ in range(steps):
        averaged.trained(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()
        states.append({name: value.clone() for name, value in averaged.trained.state_dict().items()})
    return states


def test_the_average_is_that_of_a_plain_loop():
    """Weights and running statistics; the count of batches is the last one."""
    trained = network().train()
    averaged = Averaged(trained, 0.75)
    expected = {name: value.double() for name, value in trained.state_dict().items()}
    states = train(averaged, 5)
    for state in states:
        for name, value in state.items():
            expected[name] = value if value.dtype == torch.int64 else 0.75 * expected[name] + 0.25 * value.double()
    found = averaged.network.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)
        still = ("0.bias", "1.num_batches_tracked")  # BatchNorm takes the bias out again, so it has no gradient
        assert name in still or not torch.equal(value, states[-1][name]), name
    assert found["1.num_batches_tracked"] == 5


def test_the_average_is_no_part_of_the_training():
    """The trained network's weights are those without one; the average has no gradients and stays in eval mode."""
    averaged, alone = Averaged(network().train(), 0.9), Averaged(network().train(), 0.0)
    ends = []
    for each in (averaged, alone):
        torch.manual_seed(1)
        ends.append(train(each, 3)[-1])
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert not averaged.network.training and averaged.trained.training
    assert not any(parameter.requires_grad for parameter in averaged.network.parameters())
    assert averaged.parts == {"model": averaged.network, "learner": averaged.trained}


def test_without_momentum_there_is_none():
    trained = network()
    averaged = Averaged(trained, 0.0)
    averaged.update()
    assert averaged.network is trained and averaged.parts == {"model": trained}


def test_what_does_not_learn_does_not_move_by_a_bit():
    averaged = Averaged(network(), 0.9)
    averaged.trained[0].requires_grad_(False)
    before = averaged.network.state_dict()["0.weight"].clone()
    train(averaged, 4)
    assert torch.equal(averaged.network.state_dict()["0.weight"], before)
    assert not torch.equal(averaged.network.state_dict()["3.weight"], averaged.trained[3].weight)
