"""RegAD's loss: the features of two images, once aligned, predict each other."""

import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import all_reduce_sum, world_size
from runtime.precision import at_least_float32


@at_least_float32
def symmetric_negative_cosine(p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor) -> Tensor:
    """Each side's prediction points where the other side's embedding does, at every position: a scalar in [-1, 1].

        L = mean over images and positions of -(cos(p1, z2) + cos(p2, z1)) / 2,  z1 and z2 without gradient

    Huang et al. 2022, "Registration based few-shot anomaly detection", as in the official losses/norm_loss.py; of
    vectors instead of maps it is SimSiam's (Chen & He 2021, eq. 2). Computed in at least float32 with autocast off.

    The mean is over the images of all processes: the losses of W processes, each with any number of images above
    zero, average to that of one with all, and so do the gradients.

    Args:
        p1, p2: predictions of the two sides, (B, C, H, W). z1, z2: their embeddings, of the same shape.
    Raises:
        ValueError: the shapes differ.
    """
    if not p1.shape == z1.shape == p2.shape == z2.shape:
        raise ValueError(f"shapes {[tuple(x.shape) for x in (p1, z1, p2, z2)]} differ")
    cosines = F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())  # (B, H, W)
    share = len(p1) / all_reduce_sum(cosines.new_tensor(float(len(p1))))  # of all processes' images
    return -world_size() * share * cosines.mean() / 2
