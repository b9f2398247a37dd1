"""What networks are given and what they say, batch by batch: plain tensors, whatever computed them."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Training images of this process, as `fit` receives them."""

    images: Tensor  # (B, 3, H, W) normalized
    valid: Tensor | None  # bool (B, H, W), False in padding; None: no padding
    indices: Tensor  # (B,) int64 on the images' device: the images' numbers in the training set


class TrainingBatch(NamedTuple):
    """Training images of this process, as a method that is trained by gradients gets them."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64 on the images' device
    ids: Tensor  # (B,) int64 on the CPU: the images' numbers in the training set
    epoch: int
    seed: int  # of the run; with epoch and ids it is the key of whatever is drawn for an image


class Findings(NamedTuple):
    """What a detector finds in B images. Positions are (y, x) in pixels of the input, at the center of a patch."""

    scores: Tensor  # (B,) how anomalous each image is
    maps: Tensor | None = None  # (B, H, W) float32, how anomalous each pixel is; None when the method has none
    peaks: Tensor | None = None  # (B, 2) float: the most anomalous patch
    nearest_image: Tensor | None = None  # (B,) int64: the training image that comes nearest, where one is remembered
    nearest_positions: Tensor | None = None  # (B, 2) float: its patch nearest to the most anomalous one


class Answers(NamedTuple):
    """What a classifier says of B images; C classes."""

    logits: Tensor  # (B, C) float32
    probabilities: Tensor  # (B, C) float32, with the run's temperature
    scores: Tensor  # (B,) float32, how little each image looks like the training images; inf: not known
