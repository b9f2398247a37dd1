"""The triplet loss with negatives mined from the batch."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import gather
from runtime.precision import at_least_float32

Mining = Literal["semi_hard", "hardest", "own"]


@at_least_float32
def triplet(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, *, mining: Mining = "semi_hard"
) -> tuple[Tensor, dict[str, Tensor]]:
    """An anchor lies nearer to its positive than to a negative, by a margin (Schroff et al. 2015, FaceNet, eq. 1-4).

        loss = mean over images of  max(0, |a - p| - |a - n| + margin)

    on unit vectors, with Euclidean distances as in torch's TripletMarginLoss; FaceNet squares them. Each anchor takes
    one of the negatives of all images of all processes:

        semi_hard: the nearest that is farther away than the positive; if none is, the farthest (the rule of
            TensorFlow Addons' triplet_semihard_loss). The hardest ones make the embeddings collapse early in training.
        hardest: the nearest. own: the anchor's own, row by row, as torch.

    One embedding for all images gives exactly `margin`. Distances are lengths of differences, whose gradient at 0 is
    0; sqrt(2 - 2 cos) loses the small ones to rounding. Computed in at least float32 with autocast off.

    Args:
        anchor, positive, negative: (B, D) embeddings, normalized here; B equal on all ranks. Gradients flow into all.
        margin: on distances, which lie between 0 and 2.

    Returns:
        The scalar mean over this rank's images, whose gradient averaged over ranks is that of the whole batch; and
        the mean distances `positive_distance`, `negative_distance` and the share of images with a loss, `active`.
    """
    if anchor.ndim != 2 or not anchor.shape == positive.shape == negative.shape:
        shapes = ", ".join(str(tuple(z.shape)) for z in (anchor, positive, negative))
        raise ValueError(f"triplet needs three (B, D) of one shape, not {shapes}")
    anchor, positive, negative = (F.normalize(z, dim=1) for z in (anchor, positive, negative))
    if mining != "own":
        negative = gather(negative)  # (W B, D)
        negative = negative[_mine(anchor, positive, negative, mining)]  # (B, D)
    near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)  # (B,)
    each = F.relu(near - far + margin)
    stats = {"positive_distance": near.mean(), "negative_distance": far.mean(), "active": (each > 0).float().mean()}
    return each.mean(), {name: value.detach() for name, value in stats.items()}


@torch.no_grad()
def _mine(anchor: Tensor, positive: Tensor, negatives: Tensor, mining: Mining) -> Tensor:
    """Which of the negatives (N, D) each anchor (B, D) takes: (B,). Equal pairs have equal distances, bit for bit."""
    distance = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distance(anchor, negatives)  # (B, N)
    if mining == "hardest":
        return distances.argmin(1)
    outside = distances > distance(anchor[:, None], positive[:, None])[:, 0]  # (B, N) against (B, 1)
    nearest = distances.masked_fill(~outside, float("inf")).argmin(1)
    return torch.where(outside.any(1), nearest, distances.argmax(1))
