"""Shapes of a backbone's first stages, and training those alone, for methods that use no more of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def stage_shapes(backbone: nn.Module, last: int, size: int = 64) -> list[tuple[int, ...]]:
    """Shapes of stages 1 to `last` of one image of size x size pixels, without the batch: [(C_i, H_i, W_i)] of a CNN.
    A ViT whose patches do not divide the size gets the next multiple of them. The backbone is left unchanged."""
    with torch.no_grad(), _stages(backbone, last, size) as maps:
        return [tuple(feature.shape[1:]) for feature in maps]


def train_stages(backbone: nn.Module, last: int) -> None:
    """Leave trainable what stages 1 to `last` depend on and nothing else, since DistributedDataParallel waits for every
    trainable parameter. BatchNorm's statistics stay as they are."""
    # asked again, because some parameters are never trained and stay without
    parameters = [p for p in backbone.requires_grad_(True).parameters() if p.requires_grad]
    with torch.enable_grad(), _stages(backbone, last, 64) as maps:
        gradients = torch.autograd.grad(sum(feature.sum() for feature in maps), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


@contextmanager
def _stages(backbone: nn.Module, last: int, size: int) -> Iterator[list[Tensor]]:
    """The stages of a black image, in eval mode; afterwards every module is in its former mode."""
    patch = getattr(backbone, "patch", 1)
    size = -(-size // patch) * patch
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        yield backbone.eval().forward_stages(next(backbone.parameters()).new_zeros(1, 3, size, size), last=last)
    finally:
        for module, mode in modes:
            module.training = mode
