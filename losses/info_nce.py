"""InfoNCE in MoCo's two forms: against a queue of earlier keys (v1, v2), and against the batch's keys (v3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.focal import focal
from runtime.distributed import gather, rank
from runtime.precision import at_least_float32


@at_least_float32
def queue_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, *, gamma: float = 0.0) -> Tensor:
    """MoCo v1 and v2 (He et al. 2020, eq. 1; official moco/builder.py).

        loss = mean over images of  -log( exp(q.k / T) / (exp(q.k / T) + sum over rows n of the queue of
               exp(q.n / T)) )

    Args:
        queries: (B, D) of the online network, normalized here.
        keys: (B, D) of the target network for another view, normalized here; no gradient flows into them.
        queue: (K, D) normalized keys of earlier batches; no gradient flows into them.
        temperature: T > 0. gamma: of the focal term, see losses/focal.py; 0: none.

    Returns:
        The scalar mean over this rank's images: equal batches on all ranks make DDP's average the global one.
        Computed in at least float32 with autocast off.
    """
    _same_shape("queue_nce", queries, keys)
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)
    positive = (queries * keys).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, queries @ queue.detach().T], dim=1) / temperature  # (B, 1 + K)
    return focal(logits.log_softmax(1)[:, 0], gamma).mean()


@at_least_float32
def batch_nce(queries: Tensor, keys: Tensor, temperature: float, *, gamma: float = 0.0) -> Tensor:
    """One direction of MoCo v3 (Chen, Xie & He 2021, eq. 1 and algorithm 1; official moco/builder.py ctr_loss).

        loss = 2 T * mean over images i of  -log( exp(q_i.k_i / T) / sum over the images j of all processes of
               exp(q_i.k_j / T) )

    Keys are gathered without gradient. Arguments and result as for `queue_nce`.
    """
    _same_shape("batch_nce", queries, keys)
    queries, keys = F.normalize(queries, dim=1), gather(F.normalize(keys.detach(), dim=1))  # (B, D), (W B, D)
    own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    log_p = (queries @ keys.T / temperature).log_softmax(1)  # (B, W B)
    return 2 * temperature * focal(log_p.gather(1, own[:, None]), gamma).mean()


def _same_shape(name: str, queries: Tensor, keys: Tensor) -> None:
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise ValueError(f"{name} needs two (B, D) of one shape, not {tuple(queries.shape)} and {tuple(keys.shape)}")
