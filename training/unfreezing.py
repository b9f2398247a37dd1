"""Fine-tuning in stages: first the classifier alone, then the backbone's layers with it, one more at a time from the
top (Howard & Ruder 2018, "Universal language model fine-tuning", section 3.3)."""

from dataclasses import dataclass

from torch import nn

from runtime.values import NonNegativeInt
from training.optim import depth_of

BACKBONE = "backbone"  # the name that `depth_of` looks for


@dataclass(kw_only=True)
class UnfreezeConfig:
    """`unfreeze.*`: when which layers of the backbone learn. A layer is what `optim.layer_decay` takes for one: a stage
    (ResNet, ConvNeXt) or a block (others), and the stem."""

    head_epochs: NonNegativeInt = 0  # in which only the classifier learns
    layer_epochs: NonNegativeInt = 0  # from one layer to the next, from the top; 0: all at once
    layers: NonNegativeInt | None = None  # that learn in the end; none: all, 0: the backbone stays as it is

    def layers_at(self, epoch: int, depth: int) -> int:
        """How many layers, of a backbone of `depth`, learn in an epoch."""
        most = depth if self.layers is None else min(self.layers, depth)
        if epoch < self.head_epochs:
            return 0
        return min(1 + (epoch - self.head_epochs) // self.layer_epochs, most) if self.layer_epochs else most

    def is_last(self, epoch: int, depth: int) -> bool:
        """Whether no further layer is unfrozen after this epoch."""
        most = depth if self.layers is None else min(self.layers, depth)
        return self.layers_at(epoch, depth) == most


class Layers:
    """The layers of a model's backbone, from the top. What stands above its stages, as a ViT's last norm, or has no
    number, belongs to the highest of them.

    Args:
        model: with all its parameters as they are to be trained; those without gradient now never get one.
        backbone: the part of it whose layers are meant.

    Attributes:
        count: of layers. learning: how many of them learn; -1 before the first `train`.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module):
        inside = f"{BACKBONE}."
        depths = {name: depth_of(inside + name) for name, _ in backbone.named_parameters()}
        order = sorted({depth for depth in depths.values() if depth is not None}, reverse=True)
        number: dict[int | None, int] = {None: 0} | {depth: place for place, depth in enumerate(order)}  # 0: the top
        self.count, self.learning, self._model = max(len(order), 1), -1, model
        self._parameters = [
            (number[depths[name]], parameter)
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        ]
        self._modules = [  # of dropout and stochastic depth, too
            (number.get(depth_of(f"{inside}{name}."), 0), module) for name, module in backbone.named_modules()
        ]

    def train(self, count: int) -> bool:
        """Put the model in train mode, but leave all layers below the `count` highest without gradients and in eval
        mode, so that neither their weights nor BatchNorm's statistics move; returns whether the count is a new one."""
        self._model.train()
        for place, parameter in self._parameters:
            parameter.requires_grad_(place < count)
        for place, module in self._modules:
            module.training = place < count
        changed, self.learning = count != self.learning, count
        return changed
