"""The focal term of contrastive losses: pairs that are already told apart count less."""

from torch import Tensor


def focal(log_p: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p of each log-probability (Lin et al. 2017, "Focal loss", equation 4, without alpha).

    gamma 0 is the cross-entropy. No contrastive paper uses it; it is offered as an experiment.
    """
    if gamma == 0:
        return -log_p
    return -((-log_p.expm1()).clamp(min=1e-12) ** gamma) * log_p  # clamped: x^gamma has no gradient at 0 for gamma < 1
