"""NT-Xent, the contrastive loss of SimCLR."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.focal import focal
from runtime.distributed import gather, rank
from runtime.precision import at_least_float32


@at_least_float32
def nt_xent(z: Tensor, temperature: float, *, bank: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """Normalized temperature-scaled cross-entropy (Chen et al. 2020, eq. 1) over two views or more.

        loss = mean over anchors a and their positives p of  -log( exp(a.p / T) / sum over all x != a of exp(a.x / T) )

    with p the anchor's V - 1 other views and x running over all views of the images of all processes: W B V - 1 terms
    and, if there is a memory bank, its K rows. For V = 2 without a bank it is the paper's loss; TensorFlow SimCLR adds
    the means of the two halves and is therefore twice this value; lightly and solo-learn agree with it. For V > 2 it is
    SupCon's L_out with a class for each image. Computed in at least float32 with autocast off.

    Args:
        z: (B, V, D) embeddings, normalized here; B equal on all ranks.
        temperature: T > 0.
        bank: (K, D) normalized embeddings of earlier images, the same on all ranks; no gradient flows into them.
        gamma: of the focal term, see losses/focal.py; 0: none.

    Returns:
        The scalar mean over this rank's anchors; its gradient, averaged over ranks, is that of the whole batch.
    """
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"nt_xent needs (B, V, D) with two views or more, not {tuple(z.shape)}")
    batch, views, _ = z.shape
    z = F.normalize(z, dim=2)
    anchors, keys = z.flatten(0, 1), gather(z).flatten(0, 1)  # (B V, D), (W B V, D)
    view = torch.arange(views, device=z.device)
    first = (torch.arange(batch, device=z.device) + rank() * batch)[:, None] * views  # (B, 1), among the keys
    own = (first + view).flatten()  # (B V,)
    others = (view[:, None] + view[1:]) % views  # (V, V - 1)
    positives = (first[..., None] + others).flatten(0, 1)  # (B V, V - 1)
    logits = (anchors @ keys.T / temperature).scatter(1, own[:, None], float("-inf"))  # (B V, W B V)
    if bank is not None:
        logits = torch.cat([logits, anchors @ bank.detach().T / temperature], dim=1)  # (B V, W B V + K)
    return focal(logits.log_softmax(1).gather(1, positives), gamma).mean()
