"""The loss of PsCo: pseudo-labels from a queue by optimal transport, and a supervised contrastive term on them."""

import torch.nn.functional as F
from torch import Tensor

from losses.sinkhorn import sinkhorn
from runtime.distributed import gather
from runtime.precision import at_least_float32


@at_least_float32
def psco(
    queries: Tensor, keys: Tensor, queue: Tensor, *, shots: int, temperature: float = 1.0, iterations: int = 3
) -> tuple[Tensor, Tensor]:
    """The pseudo-supervised contrastive term (Jang et al. 2023, "Unsupervised meta-learning via few-shot
    pseudo-supervised contrastive learning", eq. 5 to 7; official models.py PsCoMoCo).

        shots(i) = the `shots` rows of the queue that Sinkhorn assigns most to key i
        loss = mean over images i of  log( sum over all images' shots s of exp(q_i.s / T) ) - mean over s in
               shots(i) of q_i.s / T

    as if the images of the batch were the queries and their shots the support set of a few-shot task with one class
    per image. Assignments and shots are those of the images of all processes; the official code balances the
    assignments over all processes, but takes the shots of each process's own images only. Computed in at least
    float32 with autocast off.

    Args:
        queries: (B, D) of the online network. keys: (B, D) of the target network. Both are normalized here.
        queue: (K, D) normalized keys of earlier batches, K >= shots.
        shots: K-shot. temperature: T. iterations: of Sinkhorn.

    Returns:
        The scalar, and the rows taken as shots (B, shots).
    """
    if queries.ndim != 2 or queries.shape != keys.shape or shots > len(queue):
        shapes = f"{tuple(queries.shape)}, {tuple(keys.shape)}, {shots} of {len(queue)}"
        raise ValueError(f"psco needs two (B, D) of one shape and as many shots as the queue has, not {shapes}")
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)
    rows = sinkhorn(keys @ queue.T, iterations=iterations).topk(shots, dim=1).indices  # (B, shots)
    support = queue[rows]  # (B, shots, D)
    logits = queries @ gather(support).flatten(0, 1).T / temperature  # (B, W B shots)
    own = (queries * support.mean(1)).sum(1) / temperature  # (B,)
    return (logits.logsumexp(1) - own).mean(), rows
