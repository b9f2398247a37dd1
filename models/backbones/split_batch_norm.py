"""BatchNorm over parts of a batch, as if each part were on its own device."""

import torch
from torch import Tensor, nn

from runtime.errors import UserError


class SplitBatchNorm2d(nn.BatchNorm2d):
    """In training each of `splits` parts of the batch, every `splits`-th image, is normalized by its own statistics.

    Running statistics move by the mean over the parts (official MoCo, colab/moco_cifar10_demo.ipynb SplitBatchNorm).
    Parameters, buffers and evaluation are BatchNorm2d's. The parts are channels to one batch norm, so a channels_last
    batch is copied to the other layout.
    """

    splits: int

    @classmethod
    def convert(cls, network: nn.Module, splits: int) -> nn.Module:
        """Every BatchNorm2d of the network made one of these, in place."""
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__, module.splits = cls, splits
        return network

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; B a multiple of `splits` in training."""
        if not self.training:
            return super().forward(x)
        batch, channels, height, width = x.shape
        if batch % self.splits:
            raise UserError(
                f"method.splits={self.splits} does not divide the {batch} images of a batch: change it or batch_size"
            )
        parts = x.reshape(-1, self.splits * channels, height, width)  # (B / s, s C, H, W)
        mean = var = None
        if self.track_running_stats:
            mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)  # (s C,)
        out = nn.functional.batch_norm(
            parts,
            mean,
            var,
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.copy_(mean.view(self.splits, channels).mean(0))
                self.running_var.copy_(var.view(self.splits, channels).mean(0))
        return out.reshape(x.shape)
