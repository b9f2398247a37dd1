"""The likelihood of a normalizing flow per channel, and CFlow-AD's loss on it."""

import math

import torch.nn.functional as F
from torch import Tensor

from runtime.precision import at_least_float32


@at_least_float32
def log_density(z: Tensor, log_det: Tensor) -> Tensor:
    """Log-likelihood of what a flow has mapped to z, divided by the channels, in nats: (N,).

        log p(x) / C = (log |det dz/dx| - |z|^2 / 2) / C - log(2 pi) / 2

    Gudovskiy et al. 2022, as in the official code (utils.py, `get_logp`, then divided by C in train.py). Computed in
    at least float32 with autocast off.

    Args:
        z: (N, C). log_det: (N,).
    """
    return (log_det - 0.5 * z.square().sum(1)) / z.shape[1] - 0.5 * math.log(2 * math.pi)


def flow_likelihood(density: Tensor) -> Tensor:
    """mean of -log sigmoid(log p / C) over a fiber, from `log_density` (N,): a scalar.

    The official loss (train.py, `log_theta`): near -log p / C where a vector is unlikely, and with ever less weight on
    vectors that are already likely, whereas the paper has the plain likelihood. The losses of W processes with equally
    many vectors average to that of one with all, and so do the gradients.
    """
    return -F.logsigmoid(density).mean()
