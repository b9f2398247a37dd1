"""What a metric on validation images decides: a lower learning rate on a plateau, an early end, the weights to keep."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from runtime.errors import UserError
from runtime.integrity import faults, first_two
from runtime.values import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt


@dataclass(kw_only=True)
class PlateauConfig:
    """`plateau.*`: torch's ReduceLROnPlateau on the validation loss, with its defaults but for the factor's."""

    factor: OpenUnitInterval = 0.1  # on the learning rate
    patience: NonNegativeInt = 10  # epochs in a row that may bring nothing; one more, and the rate falls
    threshold: NonNegativeFloat = 1e-4  # share of the best loss by which a loss must be below it


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """`early_stopping.*`: end when the validation loss no longer falls."""

    patience: PositiveInt = 5  # epochs in a row without a lower loss, after which the training ends
    min_delta: NonNegativeFloat = 0.0  # by which a loss must be below the lowest one to count
    restore: bool = True  # what is kept and tested are the weights of the lowest loss; false: the last ones


class ValidationWatch:
    """Follows the loss on validation images, epoch by epoch; part of a checkpoint.

    Attributes:
        rate: factor on the learning rate. ended: whether the training is over.
        epoch, best: of the lowest loss, by `early_stopping.min_delta`.
    """

    def __init__(self, plateau: PlateauConfig | None, early_stopping: EarlyStoppingConfig | None):
        self.plateau, self.early_stopping = plateau, early_stopping
        self.rate, self.ended, self.epoch, self.best = 1.0, False, 0, math.inf
        self.waited, self.plateau_best, self.plateau_waited = 0, math.inf, 0
        self.weights: dict = {}

    @property
    def restores(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.restore

    def see(self, epoch: int, loss: float, model: nn.Module, *, counts: bool) -> None:
        """Take note of an epoch's validation loss.

        Args:
            epoch: its number, from 1. model: with the weights that had this loss.
            counts: whether patience runs, as it does not while further layers are still to be unfrozen.
        """
        if self.early_stopping is not None:
            if loss < self.best - self.early_stopping.min_delta or math.isinf(self.best):
                self.best, self.epoch, self.waited = loss, epoch, 0
                if self.restores:
                    self.weights = {name: value.clone() for name, value in model.state_dict().items()}
            else:
                self.waited += 1
        if self.plateau is not None:
            if loss < self.plateau_best * (1 - self.plateau.threshold):
                self.plateau_best, self.plateau_waited = loss, 0
            else:
                self.plateau_waited += 1
        if not counts:
            self.waited = self.plateau_waited = 0
        if self.plateau is not None and self.plateau_waited > self.plateau.patience:
            self.rate, self.plateau_waited = self.rate * self.plateau.factor, 0
        self.ended = self.early_stopping is not None and self.waited >= self.early_stopping.patience

    def restore(self, model: nn.Module) -> None:
        """Give the model the weights of the lowest loss, if they are kept."""
        if self.weights:
            if wrong := list(faults(model.state_dict(), self.weights, "watch.weights")):
                raise UserError(f"the best weights in the checkpoint do not fit: {first_two(wrong)}")
            model.load_state_dict(self.weights)

    def state_dict(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("plateau", "early_stopping")}

    def load_state_dict(self, state: dict) -> None:
        kinds = {key: type(value) for key, value in self.state_dict().items()}
        for key, kind in kinds.items():
            if type(state.get(key)) is not kind:
                raise ValueError(f"{key} is missing or of another type")
            setattr(self, key, state[key])
        if not all(isinstance(value, torch.Tensor) for value in self.weights.values()):
            raise ValueError("weights has more than tensors")
