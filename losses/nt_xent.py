"""NT-Xent, the contrastive loss of SimCLR."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import gather, rank


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over two views (Chen et al. 2020, eq. 1).

        loss = mean over the 2B anchors a of  -log( exp(a.p / T) / sum over all x != a of exp(a.x / T) )

    with p the anchor's other view and x running over both views of the pictures of all processes: 2WB - 1 terms.
    TensorFlow SimCLR adds the means of the two halves and is therefore twice this value; lightly and solo-learn agree
    with it. Computed in at least float32 with autocast off.

    Args:
        z1, z2: (B, D) embeddings of the two views, normalised here; B equal on all ranks.
        temperature: T > 0.

    Returns:
        The scalar mean over this rank's anchors; its gradient, averaged over ranks, is that of the whole batch.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"nt_xent needs two (B, D) tensors of one shape, not {tuple(z1.shape)} and {tuple(z2.shape)}")
    with torch.autocast(z1.device.type, enabled=False):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z1, z2 = F.normalize(z1.to(dtype), dim=1), F.normalize(z2.to(dtype), dim=1)
        keys1, keys2 = gather(z1), gather(z2)  # (W*B, D)
        own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)  # this rank's rows among the keys
        loss1 = _half(z1, keys2, keys1, own, temperature)
        loss2 = _half(z2, keys1, keys2, own, temperature)
        return (loss1 + loss2) / 2


def _half(anchors: Tensor, positives: Tensor, same_view: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of anchors (B, D) against [other view | own view without itself], both (W*B, D)."""
    across = anchors @ positives.T / temperature  # (B, W*B)
    within = anchors @ same_view.T / temperature  # (B, W*B)
    within = within.scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(torch.cat([across, within], dim=1), own)
