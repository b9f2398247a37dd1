"""SPD, the loss of SPot-the-Difference."""

import torch.nn.functional as F
from torch import Tensor

from runtime.precision import at_least_float32


@at_least_float32
def spd(anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """A local defect must move an embedding further than a slight change of the whole image does.

        loss = mean over images of  cos(a, n) - cos(a, p),    between -2 and 2

    with a the image's embedding, p the one after a weak global augmentation, n the one after that and a local defect.
    It is 0 while the defect leaves no trace, and -1 if the defect alone turns the embedding, by a right angle.

    Zou et al. 2022, "SPot-the-Difference self-supervised pre-training for anomaly detection and segmentation" (arXiv
    2207.14315), section 3, without margin or temperature; it stands beside the contrastive loss with weight 0.1. The
    authors published no code of it: the formula and the weight are checked only against other people's notes on the
    paper. Gradients flow into all three, whether or not they do in the paper. Computed in at least float32 with
    autocast off.

    Args:
        anchor, positive, negative: (B, D) embeddings, normalized here; one of zeros has cosine 0 with everything.

    Returns:
        The scalar loss, a mean over this process's images (equal batches on all ranks make DDP's average the global
        one), and the mean of cos(a, n).
    """
    if anchor.ndim != 2 or not anchor.shape == positive.shape == negative.shape:
        shapes = ", ".join(str(tuple(z.shape)) for z in (anchor, positive, negative))
        raise ValueError(f"spd needs three (B, D) tensors of one shape, not {shapes}")
    similarity = F.cosine_similarity(anchor, negative).mean()
    return similarity - F.cosine_similarity(anchor, positive).mean(), similarity
