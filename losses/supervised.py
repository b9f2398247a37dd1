"""Losses of a classifier by name. Logits (B, C); targets (B, C), each row a distribution over the classes: one-hot,
smoothed or mixed. Means over this process's images: equal batches on all ranks make DDP's average the global mean."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from losses.focal import focal
from runtime.precision import at_least_float32
from runtime.schema import choice
from runtime.values import NonNegativeFloat


def soft_targets(labels: Tensor, n_classes: int, smoothing: float = 0.0) -> Tensor:
    """(1 - s) one-hot + s / C (Szegedy et al. 2016, section 7): labels (B,) int64 -> (B, C) float32."""
    return F.one_hot(labels, n_classes).float() * (1 - smoothing) + smoothing / n_classes


@at_least_float32
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum over c of t_c log softmax(z)_c, and its mean over the images. Computed in at least float32 with autocast
    off."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


@at_least_float32
def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-(t_c log sigmoid(z_c) + (1 - t_c) log(1 - sigmoid(z_c))), and its mean over images and classes, as torch's
    BCEWithLogitsLoss: every class against the rest. Computed in at least float32 with autocast off."""
    return F.binary_cross_entropy_with_logits(logits, targets)


@at_least_float32
def focal_cross_entropy(logits: Tensor, targets: Tensor, *, gamma: NonNegativeFloat = 2.0) -> Tensor:
    """-sum over c of t_c (1 - p_c)^gamma log p_c with p = softmax(z), and its mean over the images: Lin et al. 2017,
    equation 4, for classes that exclude each other, without alpha. Computed in at least float32 with autocast off.

    Args:
        gamma: how much less an image counts whose class is already likely; 0 is the cross-entropy.
    """
    return (targets * focal(logits.log_softmax(1), gamma)).sum(1).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": binary_cross_entropy,
    "focal": focal_cross_entropy,
}


@dataclass(kw_only=True)
class LossConfig:
    """`loss.*`: its name and its keyword-only arguments."""

    name: str = choice(LOSSES)
    options: dict = field(default_factory=dict)


@at_least_float32
def probabilities(logits: Tensor, loss: str, temperature: float = 1.0) -> Tensor:
    """What a classifier trained by this loss takes its logits (B, C) for, divided by the temperature: softmax, or with
    `bce` a sigmoid for each class, which need not add up to 1. (B, C), in at least float32."""
    scaled = logits / temperature
    return scaled.sigmoid() if loss == "bce" else scaled.softmax(1)
