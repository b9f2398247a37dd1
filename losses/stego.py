"""STEGO's loss: codes are alike where features are, more than is usual, and unlike elsewhere."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.memory import send
from runtime.precision import at_least_float32
from runtime.values import Few, NonNegativeFloat, Range

Shift = Annotated[float, Range(least=-1, most=1)]


@dataclass(kw_only=True)
class StegoConfig:
    """`stego.*`: weights and shifts, those of train_config.yml in the official code, made for DINO's ViTs."""

    intra_weight: NonNegativeFloat = 0.67  # of an image with itself
    inter_weight: NonNegativeFloat = 0.25  # of an image with one of those most like it
    negative_weight: NonNegativeFloat = 0.63  # of an image with others at random
    intra_shift: Shift | None = 0.18  # cosine of features above which codes attract each other; none: the mean of these
    inter_shift: Shift | None = 0.12  # likewise
    negative_shift: Shift | None = 0.46  # likewise
    pointwise: bool = True  # features are compared with what is usual at their patch
    zero_clamp: bool = True  # codes that are farther apart than orthogonal are left alone
    samples: Few = 11  # positions per side that are compared, at random
    negatives: Few = 5  # other images for each one


class Pairs(NamedTuple):
    """What `stego` returns: losses () before their weights, and mean cosines () of features and codes."""

    loss: Tensor
    feature_cosine: Tensor
    code_cosine: Tensor


@at_least_float32
def correspondence_loss(
    features: Tensor,
    codes: Tensor,
    other_features: Tensor,
    other_codes: Tensor,
    *,
    shift: float | None,
    pointwise: bool = True,
    zero_clamp: bool = True,
) -> Pairs:
    """How little the codes of two images correspond where their features do (Hamilton et al. 2022, equations 3 to 5).

        loss = mean over positions p of one image and q of the other of  -max(S_pq, 0) (F_pq - shift)

    with F and S the cosines of features and codes. With `pointwise` F becomes F - mean over q, plus what brings the
    mean over everything back to what it was; without `zero_clamp` S counts where it is negative, too. No gradient flows
    into the features. As in the official code (modules.py). Computed in at least float32 with autocast off.

    Deviation: shift None is the mean of F, so that codes attract and repel each other in balance, whatever the cosines
    of a backbone. With the official constants all codes become one where features are more alike than DINO's.

    Args:
        features, other_features: (B, C, h, w) and (B, C, i, j), pair by pair. codes, other_codes: likewise, D channels.
    """
    with torch.no_grad():
        cosine = correlation(features, other_features)  # (B, h, w, i, j)
        alike = cosine - cosine.mean((3, 4), keepdim=True) if pointwise else cosine
        alike = alike - alike.mean() + cosine.mean()
    code_cosine = correlation(codes, other_codes)
    attracted = code_cosine.clamp(min=0) if zero_clamp else code_cosine
    limit = cosine.mean() if shift is None else shift
    return Pairs(-(attracted * (alike - limit)).mean(), cosine.mean(), code_cosine.detach().mean())


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all positions of (B, C, h, w) with all of (B, C, i, j): (B, h, w, i, j)."""
    return torch.einsum("bchw,bcij->bhwij", F.normalize(a, dim=1), F.normalize(b, dim=1))  # (B, h, w, i, j)


@at_least_float32
def stego(
    features: Tensor, codes: Tensor, near_features: Tensor, near_codes: Tensor, config: StegoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """STEGO's loss of a batch: the weighted sum of `correspondence_loss` over its three kinds of pairs.

    Positions are `config.samples`^2 random ones of each image, interpolated; one draw for the images themselves, one
    for all that they are compared with. Random numbers are the global generator's.

    Args:
        features, codes: (B, C, h, w) and (B, D, h, w).
        near_features, near_codes: of an image most like each.

    Returns:
        The loss, and of each kind (intra, inter, negative) stats: loss before its weight, cosine of features and codes.
    """
    batch, side = len(features), config.samples
    drawn = send(2 * torch.rand(2, batch, side, side, 2) - 1, features.device).to(features.dtype)
    ours, theirs = drawn.unbind(0)  # (B, s, s, 2) each, x before y
    f, c = sample(features, ours), sample(codes, ours)
    options: dict[str, Any] = {"pointwise": config.pointwise, "zero_clamp": config.zero_clamp}
    kinds = {
        "intra": [correspondence_loss(f, c, f, c, shift=config.intra_shift, **options)],
        "inter": [
            correspondence_loss(
                f, c, sample(near_features, theirs), sample(near_codes, theirs), shift=config.inter_shift, **options
            )
        ],
        "negative": [
            correspondence_loss(
                *(f, c, sample(features[others], theirs), sample(codes[others], theirs)),
                shift=config.negative_shift,
                **options,
            )
            for others in (send(other_images(batch), features.device) for _ in range(config.negatives))
        ],
    }
    means = {kind: Pairs(*(torch.stack(column).mean() for column in zip(*pairs))) for kind, pairs in kinds.items()}
    weights = {"intra": config.intra_weight, "inter": config.inter_weight, "negative": config.negative_weight}
    total = sum(weight * means[kind].loss for kind, weight in weights.items())
    stats = {f"{kind}_{name}": value.detach() for kind, pair in means.items() for name, value in pair._asdict().items()}
    return torch.as_tensor(total), stats


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at points (B, s, s, 2) in [-1, 1], x before y, whose ends are the middle of the
    outermost patches: (B, C, s, s), as in the official code, which transposes the points."""
    at = points.transpose(1, 2)  # (B, s, s, 2)
    return F.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=True)


def other_images(count: int) -> Tensor:
    """For each of `count` images the number of another one, (count,) int64; none is paired with itself unless alone.

    A random permutation whose fixed points go one on, so that a number may come twice (super_perm in the official
    code).
    """
    order = torch.randperm(count)
    return torch.where(order == torch.arange(count), order + 1, order) % count
