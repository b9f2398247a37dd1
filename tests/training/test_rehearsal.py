"""A rehearsal leaves no trace, and names the key whose size does not do."""

import pytest
import torch
from torch import nn

from runtime.errors import UserError
from training.rehearsal import batch_norm_needs_more, naming, no_trace, words


@pytest.mark.parametrize("training", [True, False])
def test_no_trace(training):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    network[1].eval()  # a module in another mode than the whole
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, x = [m.training for m in network.modules()], torch.randn(5, 3)
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError), no_trace(network, torch.device("cpu"), training=training):
        out = network(x)
        assert not out.requires_grad and all(module.training == training for module in network.modules())
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    network.train()(x)
    assert network[1].num_batches_tracked == 1  # it counts again


def test_naming():
    sizes = {"augment.size": 90, "augment.local_size": 32, "augment.strip_size": (90, 64)}
    for message, expected in {
        "90 x 90 are no multiple of 16": "augment.size=90: 90 x 90 are no multiple of 16",
        "90 x 64 are too few": "augment.strip_size=90,64: 90 x 64 are too few",
        "something else": "something else",
    }.items():
        with pytest.raises(UserError) as caught, naming(sizes):
            raise UserError(message)
        assert str(caught.value) == expected
    assert (words(90), words((90, 90)), words((90, 64))) == ("90", "90", "90,64")


def test_one_value_per_channel():
    with pytest.raises(UserError, match="batch_size=1 leaves one image per process"), batch_norm_needs_more(1):
        nn.BatchNorm1d(3)(torch.rand(1, 3))
    with pytest.raises(ValueError, match="another"), batch_norm_needs_more(1):
        raise ValueError("another")
