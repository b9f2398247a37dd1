"""Exponential moving average of a network's parameters."""

import torch
from torch import nn


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, for parameters only.

    Buffers are left alone as in official DINO and MoCo: the target runs in train mode and keeps its own BatchNorm
    statistics. Parameters stay float32: 1 - momentum of 4e-4 is lost in bfloat16's 8 bits.
    """
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)
