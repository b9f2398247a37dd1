"""The loss of PsCo: pseudo-labels from a queue by optimal transport, and a supervised contrastive term on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import gather


@torch.no_grad()
def sinkhorn(similarities: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of images to a queue's rows that use all rows alike: (B, K) cosines -> (B, K), rows sum to 1.

    exp(similarity / epsilon), then in turn each column of all processes' images scaled to 1 / K and each row to 1 / B
    (official models.py distributed_sinkhorn with normalization='row', after SwAV's). In the logarithm, so that no
    epsilon overflows.
    """
    log_q = similarities.to(torch.promote_types(similarities.dtype, torch.float32)) / epsilon  # (B, K)
    for _ in range(iterations):
        columns = gather(log_q.logsumexp(0, keepdim=True)).logsumexp(0)  # (W, K) -> (K,)
        log_q = log_q - columns
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def psco(
    queries: Tensor, keys: Tensor, queue: Tensor, *, shots: int, temperature: float = 1.0, iterations: int = 3
) -> tuple[Tensor, Tensor]:
    """The pseudo-supervised contrastive term (Jang et al. 2023, "Unsupervised meta-learning via few-shot
    pseudo-supervised contrastive learning", eq. 5 to 7; official models.py PsCoMoCo).

        shots(i) = the `shots` rows of the queue that Sinkhorn assigns most to key i
        loss = mean over images i of  log( sum over all images' shots s of exp(q_i.s / T) ) - mean over s in
               shots(i) of q_i.s / T

    as if the images of the batch were the queries, and their shots the support set, of a few-shot task with a class
    for each image. Assignments and shots are those of the images of all processes; the official code balances the
    assignments over all processes, but takes the shots of each process's own images only. Computed in at least
    float32 with autocast off.

    Args:
        queries: (B, D) of the online network. keys: (B, D) of the target network. Both are normalised here.
        queue: (K, D) normalised keys of earlier batches, K >= shots.
        shots: K-shot. temperature: T. iterations: of Sinkhorn.

    Returns:
        The scalar, and the rows taken as shots (B, shots).
    """
    if queries.ndim != 2 or queries.shape != keys.shape or shots > len(queue):
        shapes = f"{tuple(queries.shape)}, {tuple(keys.shape)}, {shots} of {len(queue)}"
        raise ValueError(f"psco needs two (B, D) of one shape and as many shots as the queue has, not {shapes}")
    with torch.autocast(queries.device.type, enabled=False):
        dtype = torch.promote_types(queries.dtype, torch.float32)
        queries, keys = (F.normalize(x.to(dtype), dim=1) for x in (queries, keys.detach()))
        queue = queue.to(dtype)
        rows = sinkhorn(keys @ queue.T, iterations=iterations).topk(shots, dim=1).indices  # (B, shots)
        support = queue[rows]  # (B, shots, D)
        logits = queries @ gather(support).flatten(0, 1).T / temperature  # (B, W B shots)
        own = (queries * support.mean(1)).sum(1) / temperature  # (B,)
        return (logits.logsumexp(1) - own).mean(), rows
