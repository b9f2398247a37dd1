"""SupCon, the supervised contrastive loss."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.focal import focal
from runtime.distributed import gather, rank
from runtime.precision import at_least_float32


@at_least_float32
def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    base_temperature: float = 0.07,
    form: Literal["out", "in"] = "out",
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """All views of all images with an anchor's label attract it, all others repel (Khosla et al. 2020).

        out, eq. 2:  -mean over p in P(i) of  log( exp(i.p / T) / sum over a != i of exp(i.a / T) )
        in,  eq. 3:  -log( mean over p in P(i) of the same fraction )

    for each anchor i, and its mean over the anchors times T / T_base, as in the official losses.py; P(i) are the other
    embeddings with i's label, a runs over all others, of the images of all processes and of the memory bank. The
    paper finds `out` clearly better (its section 3.2.2), official code and results are `out`; solo-learn's "SupCon" is
    `in` up to a constant for each anchor, log |P(i)|. An anchor without positives, possible only for V = 1, has a
    loss of 0, as in the official code.

    With labels that are all different and V = 2 both forms are T / T_base times NT-Xent. Computed in at least float32
    with autocast off.

    Args:
        z: (B, V, D) embeddings of V views, normalized here; B equal on all ranks.
        labels: (B,) int64, >= 0. temperature, base_temperature: T and T_base > 0; T_base = T leaves the factor out.
        bank, bank_labels: (K, D) normalized embeddings of earlier images and their labels (K,), the same on all
            ranks; no gradient flows into them. A row with the label -1 belongs to no class.
        gamma: of the focal term, on each fraction or, with `in`, on their mean; see losses/focal.py. 0: none.

    Returns:
        The scalar mean over this rank's anchors; its gradient, averaged over ranks, is that of the whole batch.
    """
    if z.ndim != 3 or labels.shape != z.shape[:1]:
        raise ValueError(f"sup_con needs (B, V, D) and (B,), not {tuple(z.shape)} and {tuple(labels.shape)}")
    z = F.normalize(z, dim=2)
    views = z.shape[1]
    anchors, keys = z.flatten(0, 1), gather(z).flatten(0, 1)  # (B V, D), (W B V, D)
    key_labels = gather(labels).repeat_interleave(views)  # (W B V,)
    if bank is not None:
        assert bank_labels is not None  # they come together
        keys, key_labels = torch.cat([keys, bank.detach()]), torch.cat([key_labels, bank_labels])
    own = torch.arange(len(anchors), device=z.device) + rank() * len(anchors)  # the anchors among the keys
    positive = labels.repeat_interleave(views)[:, None] == key_labels  # (B V, W B V + K)
    positive = positive.scatter(1, own[:, None], False)
    logits = (anchors @ keys.T / temperature).scatter(1, own[:, None], float("-inf"))
    log_share = logits.log_softmax(1)  # (B V, W B V + K), -inf at the anchor itself
    count = positive.sum(1)
    if form == "out":
        each = focal(log_share.masked_fill(~positive, 0), gamma).sum(1) / count.clamp(min=1)
    else:
        alone = count == 0  # these anchors get log 1, since the logarithm of an empty sum has no gradient
        log_share = log_share.masked_fill(~positive, float("-inf")).masked_fill(alone[:, None], 0)
        log_mean = log_share.logsumexp(1) - count.clamp(min=1).to(z.dtype).log()
        each = focal(log_mean.masked_fill(alone, 0), gamma)
    return temperature / base_temperature * each.mean()
