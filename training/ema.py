"""Exponential moving average of a network's parameters."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, for parameters only.

    Buffers are left alone as in official DINO and MoCo: the target runs in train mode and keeps its own BatchNorm
    statistics. Parameters stay float32: 1 - momentum of 4e-4 is lost in bfloat16's 8 bits.
    """
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


class Averaged(Generic[Network]):
    """A network and the moving average of its weights, which is the one to evaluate and to keep.

    BatchNorm's running statistics are averaged as the weights are (timm's ModelEmaV2), for the average is never in
    train mode and has none of its own. Official FixMatch and TorchSSL take those of the trained network instead, which
    there move by a thousandth a step, about as slowly as the average.

    Args:
        trained: whose weights the steps change.
        momentum: 0: there is no average, and `network` is `trained`.

    Attributes:
        network: in eval mode and without gradients.
    """

    def __init__(self, trained: Network, momentum: float):
        self.trained, self.momentum = trained, momentum
        self.network: Network = copy.deepcopy(trained).requires_grad_(False).eval() if momentum else trained

    @torch.no_grad()
    def update(self) -> None:
        """Called after each step of the optimizer."""
        if not self.momentum:
            return
        ema_update(self.network, self.trained, self.momentum)
        for average, now in zip(self.network.buffers(), self.trained.buffers()):
            if average.is_floating_point():
                average.lerp_(now, 1 - self.momentum)
            else:
                average.copy_(now)  # BatchNorm's count of batches

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Of a checkpoint: `model` is the one to load; the trained one, if it is another, is `learner`."""
        parts: dict[str, nn.Module] = {"model": self.network}
        return parts | ({"learner": self.trained} if self.momentum else {})
