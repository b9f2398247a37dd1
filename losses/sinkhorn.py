"""Balanced soft assignments by Sinkhorn's algorithm: pseudo-labels that use all classes alike."""

import torch
from torch import Tensor

from runtime.distributed import gather
from runtime.precision import at_least_float32


@torch.no_grad()
@at_least_float32
def sinkhorn(similarities: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of images to a queue's rows that use all rows alike: (B, K) cosines -> (B, K), rows sum to 1.

    exp(similarity / epsilon), then in turn each column of all processes' images scaled to 1 / K and each row to 1 / B
    (official models.py distributed_sinkhorn with normalization='row', after SwAV's). In the logarithm, so that no
    epsilon overflows; in at least float32 with autocast off.
    """
    log_q = similarities / epsilon  # (B, K)
    for _ in range(iterations):
        columns = gather(log_q.logsumexp(0, keepdim=True)).logsumexp(0)  # (W, K) -> (K,)
        log_q = log_q - columns
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()
