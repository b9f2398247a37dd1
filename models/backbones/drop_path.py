"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): training skips the residual branch of a block at random."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the residual branch of an image with probability `p`, else divide it by 1 - p: (B, ...) -> (B, ...).

    In training only, and for each image by itself, as in timm and torchvision (`mode="row"`); Huang et al. drop whole
    batches, and scale when testing. The expected output of a block is its output in eval mode.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p  # (B, 1, ...)
        return x * keep / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


def drop_rates(rate: float, blocks: int) -> list[float]:
    """One rate per block, from 0 for the first to `rate` for the last in equal steps (Huang et al., equation 4, counts
    from the input; official DINO's linspace is this)."""
    return [rate * i / max(1, blocks - 1) for i in range(blocks)]
