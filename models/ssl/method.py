"""What every pretraining method has: an online network, perhaps an EMA target, and `forward(views, labels)`."""

import copy

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A backbone with the head that is thrown away after pretraining."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class SSLMethod(nn.Module):
    """Base of the pretraining methods; the training loop relies on exactly this.

    Attributes:
        online: the network that gradients train; `online.backbone` is what it is all for.
        target: its exponential moving average, updated by the loop after each step; None without one.
        needs_labels: whether pictures without classes make no sense.
        epoch: written by the loop before each step, for options that are counted in epochs.

    Each has `forward(views, labels) -> (loss, stats)`: views V x (B, 3, h, w) and labels (B,) on the device; the scalar
    loss to minimise, and {name: 0-d tensor} for the curves.
    """

    online: Encoder
    needs_labels = False

    def __init__(self):
        super().__init__()
        self.target: Encoder | None = None
        self.epoch = 0

    def cancel_gradients(self) -> None:
        """Called between clipping and the optimizer's step: drop the gradients of what is frozen for now."""

    @property
    def backbone(self) -> nn.Module:
        """The backbone to evaluate and to keep: the target's when there is one."""
        return (self.online if self.target is None else self.target).backbone


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy with the same weights and no gradients: the start of an EMA target."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of L2-normalised rows (N, D), times sqrt(D): about 1 is healthy, 0
    means that all pictures have one embedding (SimSiam, section 4.1)."""
    z = nn.functional.normalize(z.float(), dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5
