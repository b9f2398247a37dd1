"""Losses of unlabelled images from pseudo-labels of their weak views."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import gather
from runtime.precision import at_least_float32


@at_least_float32
def consistency(logits: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """The cross-entropy of strong views with the pseudo-labels that are kept, and its mean over all of the images, also
    those not kept: FixMatch (Sohn et al. 2020), equation 4. Computed in at least float32 with autocast off.

    logits (U, C) of the strong views, targets (U, C) of the weak ones, keep (U,) 1 or 0.
    """
    return -(keep * (targets * logits.log_softmax(1)).sum(1)).mean()


@at_least_float32
def fairness(logits: Tensor, keep: Tensor, shares: Tensor, histogram: Tensor) -> Tensor:
    """FreeMatch's penalty on strong views that leave classes out (Wang et al. 2023, equations 11 and 12): sum over c of
    q_c log(r_c + 1e-12) with q = norm(shares / histogram) and r = norm(p / h), where p (C,) is the mean probability of
    the strong views that are kept, h (C,) the share of them that each class is the likeliest of, and norm divides by
    the sum. Where a denominator is 0, so is the quotient, as in the official code (USB); if nothing is kept, the loss
    is 0. Views of all processes together. Computed in at least float32 with autocast off.

    logits (U, C) of the strong views, keep (U,) 1 or 0; shares and histogram (C,): of the weak views so far.
    """
    keep = gather(keep)
    probabilities = gather(logits.softmax(1))  # (W U, C)
    count = keep.sum().clamp(min=1)
    mean = (keep[:, None] * probabilities).sum(0) / count
    likeliest = F.one_hot(probabilities.argmax(1), probabilities.shape[1])
    wanted = normed(shares * inverse(histogram))
    found = normed(mean * inverse((keep[:, None] * likeliest).sum(0) / count))
    return (wanted * (found + 1e-12).log()).sum() * (keep.sum() > 0)


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x.clamp(min=1e-30), 0)


def normed(x: Tensor) -> Tensor:
    return x / x.sum().clamp(min=1e-30)
