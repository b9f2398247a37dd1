"""What methods that use a backbone's first stages ask of it."""

import torch
from torch import nn


@torch.no_grad()
def stage_shapes(backbone: nn.Module, last: int, size: int = 64) -> list[tuple[int, ...]]:
    """Shapes of stages 1 to `last` of one picture of size x size pixels, without the batch: [(C_i, H_i, W_i)] of a CNN.
    Nothing of the backbone changes."""
    modes = [module.training for module in backbone.modules()]
    image = next(backbone.parameters()).new_zeros(1, 3, size, size)
    shapes = [tuple(feature.shape[1:]) for feature in backbone.eval().forward_stages(image, last=last)]
    for module, mode in zip(backbone.modules(), modes):
        module.training = mode
    return shapes


def train_stages(backbone: nn.Module, last: int) -> None:
    """Leave trainable what stages 1 to `last` depend on and nothing else: DistributedDataParallel waits for every
    trainable parameter. Call it before the backbone is in train mode, or its BatchNorm statistics move."""
    parameters = list(backbone.requires_grad_(True).parameters())
    maps = backbone.forward_stages(parameters[0].new_zeros(1, 3, 64, 64), last=last)
    gradients = torch.autograd.grad(sum(feature.sum() for feature in maps), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)
