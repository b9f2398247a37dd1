"""A plateau as torch's scheduler sees it, early stopping by hand, and both taken up again in the middle."""

import random

import pytest
import torch
from torch import nn

from training.plateau import EarlyStoppingConfig, PlateauConfig, ValidationWatch


def sequence(seed: int) -> list[float]:
    """Losses with ties, and steps of all sizes."""
    draw = random.Random(seed)
    values = [1.0]
    for _ in range(60):
        values.append(max(0.0, draw.choice([values[-1], values[-1] * draw.uniform(0.9, 1.1), min(values), 0.3])))
    return values


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("factor", "patience", "threshold"), [(0.15, 2, 1e-4), (0.5, 0, 0.0), (0.1, 5, 0.02)])
def test_the_rate_is_that_of_torchs_reduce_lr_on_plateau(seed, factor, patience, threshold):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    about = {"factor": factor, "patience": patience, "threshold": threshold}
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **about, eps=0)
    watch, model = ValidationWatch(PlateauConfig(**about), None), nn.Linear(1, 1)
    for epoch, loss in enumerate(sequence(seed), 1):
        theirs.step(loss)
        watch.see(epoch, loss, model, counts=True)
        assert watch.rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert not watch.ended


CASES = [  # losses, min_delta, patience: the epoch after which it ends, and the one that is kept
    ([3, 2, 1, 1, 1], 0.0, 2, 5, 3),
    ([3, 2, 1.95, 1.92, 1.91, 1.0], 0.1, 3, 5, 2),  # small steps do not count, even together
    ([3, 2, 1.95, 1.89], 0.1, 3, None, 4),
    ([1], 0.0, 1, None, 1),
    ([1, 1], 0.0, 1, 2, 1),
    ([1, 0.5, 0.6, 0.4, 0.6, 0.6], 0.0, 2, 6, 4),
]


@pytest.mark.parametrize(("losses", "min_delta", "patience", "end", "kept"), CASES)
def test_early_stopping_keeps_the_weights_of_the_lowest_loss(losses, min_delta, patience, end, kept):
    model, watch = nn.Linear(1, 1), ValidationWatch(None, EarlyStoppingConfig(patience=patience, min_delta=min_delta))
    for epoch, loss in enumerate(losses, 1):
        nn.init.constant_(model.weight, epoch)
        watch.see(epoch, float(loss), model, counts=True)
        if watch.ended:
            break
    assert (epoch if watch.ended else None) == end and watch.epoch == kept
    watch.restore(model)
    assert model.weight.item() == kept


def test_epochs_before_the_last_unfreezing_count_for_no_patience_but_may_be_the_best():
    watch = ValidationWatch(PlateauConfig(factor=0.5, patience=0), EarlyStoppingConfig(patience=2))
    for epoch, counts in enumerate([False] * 6 + [True] * 2, 1):
        assert not watch.ended and watch.rate == 1
        watch.see(epoch, 1.0 if epoch > 1 else 0.5, nn.Linear(1, 1), counts=counts)
        if counts:
            assert watch.rate == 0.5 ** (epoch - 6)
            break
    watch.see(8, 1.0, nn.Linear(1, 1), counts=True)
    assert watch.ended and watch.epoch == 1


def test_restore_false_keeps_no_weights():
    watch, model = ValidationWatch(None, EarlyStoppingConfig(restore=False)), nn.Linear(1, 1)
    watch.see(1, 1.0, model, counts=True)
    nn.init.constant_(model.weight, 7)
    watch.restore(model)
    assert model.weight.item() == 7 and watch.state_dict()["weights"] == {} and not watch.restores


def test_taken_up_again_it_goes_on_as_before():
    about = PlateauConfig(factor=0.5, patience=1), EarlyStoppingConfig(patience=4)
    losses, model = sequence(3), nn.Linear(1, 1)
    whole, part = ValidationWatch(*about), ValidationWatch(*about)
    for epoch, loss in enumerate(losses, 1):
        again = ValidationWatch(*about)
        again.load_state_dict(part.state_dict())
        part = again
        for watch in (whole, part):
            watch.see(epoch, loss, model, counts=True)
        assert str(whole.state_dict()) == str(part.state_dict())
        nn.init.normal_(model.weight)
    for wrong in ({}, whole.state_dict() | {"rate": "1"}, whole.state_dict() | {"weights": {"a": 1}}):
        with pytest.raises(ValueError, match=r"missing or of another type|more than tensors"):
            part.load_state_dict(wrong)
