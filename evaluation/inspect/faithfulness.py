"""Whether a saliency map shows what counts: the target falls when the salient pixels go, and stays when the others go.

Deletion and insertion (Petsiuk et al. 2018, "RISE", section 4.1): pixels are removed in the order of the map, and the
area under the target's curve over the removed share is taken. deletion: the most salient go first, so a good map has a
small area. insertion: the most salient stay longest (they are inserted first), so it has a large one. Their difference,
`faithfulness`, is 0 on average for a map that knows nothing, and that is what a random map is measured for.

Different from RISE: what is removed becomes the mean of what is left, weighted by a Gaussian of the distance
(normalized convolution, Knutsson and Westin 1993), not gray and not the blurred image. Gray leaves the outline of what
went, and a blur what is larger than itself; Rong et al. 2022, "A consistent and efficient evaluation strategy for
attribution methods" (ROAD), fill holes from around them for that reason, by a linear system for which this stands.
And the same filling is used for both, in `STEPS` steps. To a detector such smooth patches are anomalies by themselves
(docs/results/saliency.md), so for its score they get the `texture` of a normal image.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.anomaly.maps import upsample

STEPS = 10  # in which all pixels are removed
WIDTH = 1 / 16  # sigma of the Gaussian, of the image's height and width
CENTER = 1 / 4  # sigma of the center prior, likewise


class Faithfulness(NamedTuple):
    """In units of the target; curves over the removed share, 0 to 1 in `STEPS` steps."""

    deletion: float
    insertion: float
    deletion_curve: list[float]  # the most salient pixels are removed first
    insertion_curve: list[float]  # the least salient ones

    @property
    def faithfulness(self) -> float:
        return self.insertion - self.deletion


@torch.no_grad()
def faithfulness(
    image: Tensor,
    saliency: Tensor,
    value: Callable[[Tensor], Tensor],
    *,
    texture: Tensor | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Faithfulness:
    """Of one map.

    Args:
        image: (3, H, W) normalized. saliency: (H, W).
        value: the target of images (B, 3, H, W): (B,).
        texture: as of `without`.
        seed: decides which of equally salient pixels goes first, as half of a Grad-CAM map can be 0.
    """
    rank, pixels = removal_rank(saliency, seed), saliency.numel()
    counts = [round(pixels * step / STEPS) for step in range(STEPS + 1)]
    keeps = [rank >= count for count in counts] + [rank < pixels - count for count in counts[1:-1]]
    found = []
    for first in range(0, len(keeps), batch_size):
        images = [without(image, keep, texture) for keep in keeps[first : first + batch_size]]
        found.append(value(torch.stack(images)).double().cpu())  # (B,)
    values = torch.cat(found).tolist()
    deletion = values[: STEPS + 1]
    insertion = [deletion[0], *values[STEPS + 1 :], deletion[-1]]
    return Faithfulness(area(deletion), area(insertion), deletion, insertion)


def area(curve: list[float]) -> float:
    """Under a curve over 0 to 1 at equal steps, by trapezoids."""
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


def removal_rank(saliency: Tensor, seed: int) -> Tensor:
    """When each pixel of (H, W) goes, 0 for the most salient; equal ones in random order: int64 (H, W)."""
    flat = saliency.flatten()  # (H W,)
    shuffled = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffled[flat[shuffled].argsort(descending=True, stable=True)]  # (H W,)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(flat), device=flat.device)
    return rank.view(saliency.shape)  # (H, W)


def without(image: Tensor, keep: Tensor, texture: Tensor | None = None) -> Tensor:
    """The image (C, H, W), where `keep` bool (H, W) is False filled from the pixels that are left; with none left by
    its mean color.

    The Gaussian is not cut off, so that something is in reach of the middle of any hole; float64 has it to 38 sigma.

    Args:
        texture: (C, H, W), another image: the hole also gets what this one has more than its own filling would have,
            which leaves no edge where the two differ in brightness.
    """
    other = torch.zeros_like(image) if texture is None else texture
    rest = (image - other).double()  # what is filled; the filling is linear
    if keep.any():
        rows, columns = (_gaussian(n, image.device) for n in keep.shape)  # (H, H), (W, W)
        filled = rows @ (rest * keep) @ columns / (rows @ keep.double() @ columns)  # (C, H, W)
    else:
        filled = rest.mean((1, 2), keepdim=True)
    return torch.where(keep, image, other + filled.to(image.dtype))


def _gaussian(n: int, device: torch.device) -> Tensor:
    """exp(-d^2 / 2 sigma^2) of the distances d between n pixels: (n, n) float64."""
    at = torch.arange(n, dtype=torch.float64, device=device) / (n * WIDTH)
    return torch.exp(-(at[:, None] - at).square() / 2)


def random_map(grid: tuple[int, int], size: tuple[int, int], seed: int) -> Tensor:
    """Uniform random numbers on as coarse a grid as the map's, enlarged in the same way: (H, W)."""
    return enlarged(torch.rand(grid, generator=torch.Generator().manual_seed(seed)), size)


def center_map(size: tuple[int, int]) -> Tensor:
    """A Gaussian in the middle, where things mostly are: (H, W)."""
    y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in size)
    return torch.exp(-(y[:, None].square() + x.square()) / (2 * CENTER**2))


def enlarged(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w) at the size of the input, bilinearly: (H, W)."""
    return upsample(grid[None], size, align_corners=False)[0]


class Localization(NamedTuple):
    """How a map agrees with the mask of a defect."""

    inside: float  # share of the map, above its minimum, within the mask
    hit: float  # 1 if the largest pixel lies within (the pointing game, Zhang et al. 2016, without a tolerance)


def localization(saliency: Tensor, mask: Tensor) -> Localization:
    """Of a map (H, W) and a mask bool (H, W). Of several largest pixels the share within counts, so that a constant map
    has the mask's share of the image in both."""
    heat = saliency.double() - saliency.min()
    heat = torch.ones_like(heat) if heat.sum() == 0 else heat
    largest = heat == heat.max()
    return Localization(float(heat[mask].sum() / heat.sum()), float((largest & mask).sum() / largest.sum()))
