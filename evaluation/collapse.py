"""Is pretraining collapsing? Metrics of the embeddings for the curves, and a warning in words.

What to read from each curve (`embedding_health`; B images, their V views, D dimensions, rows L2-normalized):

- embedding/std: 1 healthy; 0: every image has the same embedding. Lower `optim.lr`, lengthen its warm-up, look at the
  head's BatchNorm and the EMA momentum.
- embedding/effective_rank: directions in use, at most min(B V, D), and B when views agree. Tens are healthy and rising
  is good; near 1 all lie on a line. Lower `optim.weight_decay` or `optim.lr`, weaken `augment` (Jing et al. 2022 show
  how it flattens). A method that learns from labels may well end at classes - 1.
- embedding/alignment: squared distance of an image's views, 2 - 2 positive_cosine. Falls towards 0, which is good only
  while uniformity stays low; near 2 the views are strangers: augmentation too strong, or nothing learned yet.
- embedding/uniformity: -2 to -4 healthy, 0 collapsed. Rising while alignment falls to 0: on the way to one point.
- embedding/positive_cosine, embedding/negative_cosine: of an image's views, and of different images. The gap between
  them is what is learned: 0.9 and 0.1 are healthy, 1 and 1 collapsed, equal ones nothing learned.

All of these are measured in train mode, in which BatchNorm takes the batch's own statistics. Whoever uses the backbone,
kNN first of all, uses it in eval mode, with running statistics (`feature_health`):

- features/std, features/effective_rank: the same of the backbone's features in eval mode. Near 0 and 1 while
  embedding/std is healthy: the running statistics have not settled yet, and the kNN metric means nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # at most so many embeddings are looked at: 256 images of two views
COLUMNS_AT_ONCE = 8192  # of the float64 products; DINO's rows have 65536

LEAST_STD = 0.05  # about sqrt(1 - mean cosine of pairs): pairs within 4 degrees; bfloat16's rounding makes 0.001
LEAST_FEATURES_STD = 0.01  # cosines differ by 1e-4
TIED_STD = 3e-4  # by 1e-7, about float32's rounding: all images are equally near
LEAST_RANK = 2.0  # a line has two directions at most, its own and the origin's
LEAST_DISTINCT = 8  # with fewer things to tell apart, a rank below 2 may be all there is


@torch.no_grad()
def embedding_health(z: Tensor) -> dict[str, float]:
    """Metrics of the embeddings z (B, V, D) of B images, V views each, of this process alone: no collective.

    Rows are L2-normalized first (zeros stay), so their scale plays no part: the losses with a cosine do not see it.
    With images i, j and views v, w:

        embedding/std              sqrt(D) mean over v, d of the standard deviation over i of z_ivd
        embedding/effective_rank   exp(-sum_k p_k ln p_k), p_k = s_k / sum s, s the singular values of all B V rows
        embedding/alignment        mean over i and v != w of |z_iv - z_iw|^2
        embedding/uniformity       ln mean over i != j, v, w of exp(-2 |z_iv - z_jw|^2)
        embedding/positive_cosine  mean over i and v != w of z_iv . z_iw
        embedding/negative_cosine  mean over i != j, v, w of z_iv . z_jw

    std is SimSiam's (Chen & He 2021, section 4.1), within each view, as views of several sizes differ even if images
    do not. The rank is RankMe (Garrido et al. 2023) of normalized rows, without its epsilon, as 0 ln 0 = 0 here. Rows
    are not centred, as there: equal rows have rank 1 instead of 0 / 0. Alignment (alpha 2) and uniformity (t 2) are
    Wang & Isola's (2020, section 4.1), the latter over pairs of different images in any views.

    Only the first max(2, 512 // V) images are used. The singular values are roots of the eigenvalues of Z Z^T
    (B V, B V) or, if D is smaller, Z^T Z (D, D); these are float64, which autocast leaves alone, since float32's
    rounding would be hundreds of singular values of 1e-3. Waits for the device.

    Returns:
        {name: value}; without the positives' metrics at V = 1, and without std and the negatives' at B = 1. NaN where
        z is not finite.

    Raises:
        ValueError: z is not (B, V, D), or empty.
    """
    if z.ndim != 3 or z.numel() == 0:
        raise ValueError(f"embedding_health needs embeddings (B, V, D), not {tuple(z.shape)}")
    z = z[: max(2, ROWS // z.shape[1])].to(torch.promote_types(z.dtype, torch.float32))
    batch, views, dim = z.shape
    largest = torch.linalg.vector_norm(z, math.inf, dim=2, keepdim=True)  # (B, V, 1); keeps squares in range
    z = F.normalize(z / largest.clamp_min(torch.finfo(z.dtype).tiny), dim=2)
    rows = z.flatten(0, 1)  # (B V, D)
    cosine = _products(rows)  # (B V, B V)
    square = cosine.diagonal()  # 1, or 0 of a row of zeros
    distance = (square[:, None] + square - 2 * cosine).clamp_min(0)  # squared

    image = torch.arange(batch, device=z.device).repeat_interleave(views)  # (B V,)
    same = image[:, None] == image
    health = {"effective_rank": _effective_rank(cosine if len(rows) <= dim else _products(rows.T))}
    if views > 1:
        positive = same & ~torch.eye(len(rows), dtype=torch.bool, device=z.device)
        health |= {"alignment": distance[positive].mean(), "positive_cosine": cosine[positive].mean()}
    if batch > 1:
        health |= {
            "std": z.std(dim=0).mean() * dim**0.5,
            "uniformity": (-2 * distance[~same]).exp().mean().log(),
            "negative_cosine": cosine[~same].mean(),
        }
    values = torch.stack([value.double() for value in health.values()]).tolist()  # read together
    return {f"embedding/{name}": value for name, value in zip(health, values)}


def feature_health(features: Tensor) -> dict[str, float]:
    """features/std and features/effective_rank of a backbone's features (N, D) in eval mode, one per image.

    As `embedding_health` defines them, of at most 512 rows spread evenly over the set; without std at N = 1.
    """
    rows = torch.linspace(0, len(features) - 1, min(len(features), ROWS)).round().long()
    health = embedding_health(features[rows.to(features.device)][:, None])  # of (N', 1, D)
    kept = ("std", "effective_rank")
    return {f"features/{name}": health[f"embedding/{name}"] for name in kept if f"embedding/{name}" in health}


def constant_warning(health: dict[str, float], embedding_std: float | None = None) -> str | None:
    """One line when `feature_health` says that features are nearly constant in eval mode, or None.

    Args:
        embedding_std: embedding/std of the same network in train mode, where it is known.
    """
    std = health.get("features/std", math.inf)
    if not std < LEAST_FEATURES_STD:
        return None
    text = f"features/std {std:.2g} is below {LEAST_FEATURES_STD}: in eval mode images have nearly the same features"
    text += ", and kNN is guessing" if std < TIED_STD else ", and the kNN metric says little about what was learned"
    if embedding_std is not None and embedding_std < LEAST_STD:
        return f"{text}; embedding/std {embedding_std:.2g} in train mode says the same: a collapse"
    if embedding_std is not None:
        text += f"; in train mode images differ (embedding/std {embedding_std:.2g})"
    return (
        f"{text}; running statistics of BatchNorm, if the backbone has any, need about 30 steps to settle: train for "
        "more steps, or lower optim.lr"
    )


def _products(x: Tensor) -> Tensor:
    """x x^T in float64, (n, m) -> (n, n)."""
    return sum(part.double() @ part.double().T for part in x.split(COLUMNS_AT_ONCE, dim=1))


def _effective_rank(products: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares, from the eigenvalues, their squares; 1 of zeros alone."""
    finite = products.isfinite().all()
    s = torch.linalg.eigvalsh(torch.where(finite, products, 0)).clamp_min(0).sqrt()  # raises on values not finite
    shares = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.where(finite, torch.special.entr(shares).sum().exp(), torch.nan)


def collapse_warning(
    loss: float, health: dict[str, float], *, chance: float | None, advice: str, epochs: float, distinct: int
) -> str | None:
    """One line that says what has collapsed and what to do, or None: all is well, it is early, or something is NaN.

    Nothing is reported in the first epoch, which is warm-up: there a loss near chance is no news.

    Args:
        loss: of the method alone, a mean over some steps.
        health: what `embedding_health` returned.
        chance: the loss of constant embeddings, as ln K of DINO or ln(2N - 1) of SimCLR; the
            warning comes within 0.1 % of it. None: that loss is nothing special, as of BYOL, whose best it is.
        advice: what to do then, the method's words.
        epochs: trained so far.
        distinct: what a healthy network tells apart in a batch: its images, or the classes of a method that learns
            from labels. A line is all that two classes need.
    """
    if epochs < 1 or not all(math.isfinite(value) for value in (loss, *health.values())):
        return None
    if chance is not None and abs(loss - chance) <= 1e-3 * abs(chance):
        return f"the loss {loss:.4g} is that of constant embeddings, {chance:.4g}: collapsed or not learning; {advice}"
    std, rank = (health.get(f"embedding/{name}", math.inf) for name in ("std", "effective_rank"))
    if std < LEAST_STD:
        return (
            f"embedding/std {std:.2g} is below {LEAST_STD}: all images have nearly one embedding (collapse to a "
            "point); lower optim.lr or raise optim.warmup_epochs, and go back to a checkpoint from before"
        )
    if rank < LEAST_RANK and distinct >= LEAST_DISTINCT:
        return (
            f"embedding/effective_rank {rank:.3g} is below {LEAST_RANK:g}: all images lie on a line (dimensional "
            "collapse); lower optim.weight_decay or optim.lr, or weaken augment"
        )
    return None
