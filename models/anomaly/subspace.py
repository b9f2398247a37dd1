"""SubspaceAD (Lendering et al. 2026, "SubspaceAD: training-free few-shot anomaly detection via subspace modeling")."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.anomaly.detector import Batch, Detector, Findings, Stage
from models.anomaly.maps import ImageScore, grid_valid, image_score, peak, render
from models.anomaly.patchcore import concatenate
from runtime.distributed import gather_rows
from runtime.errors import UserError
from runtime.values import Few, PositiveShare, coerce
from search.bounds import require_finite

Combine = Literal["concat", "mean"]


class Subspace(Detector):
    """Squared distance of every patch from the subspace of the normal images' patches.

    The subspace is the fewest principal components that hold the share `variance` of the patches' variance, through
    their mean. There is no bank, nothing is drawn, and the state is as large for any number of images: D x D numbers.

    The map is the squared residuals, enlarged and blurred (sigma 4); score: `image_score`. Official: one ViT's tokens,
    the mean over seven of its layers (`combine=mean`), 30 random rotations of each image, a blur that is cut off at
    3 x 3 pixels; here rotations are evenly spaced, so that a fit can be repeated.

    Leaving an image out is a refit without it: its own patches' scatter is taken away and the components are found
    anew, one eigendecomposition per image (D = 384: 0.03 s, D = 1536: 1.3 s on a CPU core).

    Args:
        backbone: any.
        stages: stages that a patch is made of.
        combine: `concat`: side by side at the finest one's resolution (bilinear); `mean`: their mean, for stages of one
            shape, as a ViT's.
        variance: share that the subspace holds, in (0, 1].
        rotations: each training image is learned in as many, evenly spaced over 360 degrees, its border mirrored; for
            few images of parts that lie at any angle. Above 1 the state has D x D further numbers per image.
        image_score: what of an image's map is its score; the official one is `top1`.

    Raises:
        UserError: bad options, stages that have no mean, or at `fit` and scoring: NaN features.
    """

    fits = True
    leaves_out = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: tuple[Stage, ...] = (2, 3),
        combine: Combine = "concat",
        variance: PositiveShare = 0.99,
        rotations: Few = 1,
        image_score: ImageScore = "top1",
    ):
        super().__init__(backbone, stages)
        self.combine = coerce(combine, Combine, "subspace combine")
        self.variance, self.rotations, self.image_score = variance, rotations, image_score
        self.register_buffer("numbers", torch.empty(0, dtype=torch.int64))  # (n,) of the fitted images, ascending
        double = {"dtype": torch.float64}
        self.register_buffer("count", torch.zeros((), **double))  # of all patches
        self.register_buffer("mean", torch.empty(0, **double))  # (D,)
        self.register_buffer("scatter", torch.empty(0, 0, **double))  # (D, D)
        self.register_buffer("axes", torch.empty(0, 0, **double))  # (D, D - k) orthonormal: what is not kept
        self.register_buffer("own_counts", torch.empty(0, **double))  # (n,) of each image; rotations=1: (0,)
        self.register_buffer("own_means", torch.empty(0, 0, **double))  # (n, D)
        self.register_buffer("own_scatters", torch.empty(0, 0, 0, **double))  # (n, D, D)

    def patches(self, features: list[Tensor]) -> Tensor:
        """Stages [(B, C_i, H_i, W_i)] -> patch features (B, h, w, D)."""
        if self.combine == "concat":
            return concatenate(features, 1, None)
        if any(feature.shape[1:] != features[0].shape[1:] for feature in features):
            shapes = ", ".join("x".join(map(str, feature.shape[1:])) for feature in features)
            raise UserError(
                f"subspace combine=mean: stages {list(self.stages)} are {shapes} here: set combine=concat, or one stage"
            )
        return torch.stack(features).mean(0).permute(0, 2, 3, 1)  # (B, h, w, D)

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """One pass over the images, sums in float64: each image's mean, then its scatter about that, then all together.

        Nothing cancels, whatever the mean; processes hold the same state, of the images of all.
        """
        whole, means, indices, each = None, [], [], []
        for batch in batches:
            for own in self._of_images(batch):
                whole = own if whole is None else together([whole, own])
                means.append(own.mean[None])
                if self.rotations > 1:
                    each.append(own)
            indices.append(batch.indices)
        means, self.numbers = self.in_order(means, indices)
        require_finite(means, "features of the training images")
        whole = together([Moments(*parts) for parts in zip(*(gather_rows(part[None]) for part in whole))])
        self.count, self.mean, self.scatter = whole
        self.axes = left_over(whole, self.variance, rounding(whole))
        if self.rotations > 1:
            order = gather_rows(torch.cat(indices)).argsort()
            own = (gather_rows(torch.stack(parts))[order] for parts in zip(*each))
            self.own_counts, self.own_means, self.own_scatters = own

    def _of_images(self, batch: Batch) -> list["Moments"]:
        """Of the patches of each of a batch's images, in all its rotations."""
        found: list[Moments] = []
        for turn in range(self.rotations):
            images, valid = batch.images, batch.valid
            if turn > 0:
                images = rotated(images, turn / self.rotations)
                valid = valid if valid is None else rotated(valid[:, None].float(), turn / self.rotations)[:, 0] > 0.5
            rows = self.patches(self.features(images))  # (B, h, w, D)
            inside = [None] * len(rows) if valid is None else grid_valid(valid, rows.shape[1:3])
            new = list(map(moments, rows, inside))
            found = list(map(together, zip(found, new))) if found else new
        return found

    def measure(
        self,
        features: list[Tensor],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: Tensor | None = None,
    ) -> Findings:
        """`leave_out`: the images must be those left out, for the patches that are taken away are theirs."""
        self.require_fitted(self.numbers)
        rows = self.patches(features)  # (B, h, w, D)
        require_finite(rows.sum((1, 2, 3))[:, None], "features of the images")
        inside = None if valid is None else grid_valid(valid, rows.shape[1:3])
        grid = residuals(rows, self.mean, self.axes)  # (B, h, w)
        if leave_out is not None:
            if len(self.numbers) == 1:
                raise UserError("subspace: without its one training image nothing is left to compare; give more")
            whole = Moments(self.count, self.mean, self.scatter)
            for image, number in enumerate(leave_out.tolist()):
                for place in (self.numbers == number).nonzero()[:, 0].tolist():  # none if it was not fitted
                    if self.rotations > 1:
                        own = Moments(self.own_counts[place], self.own_means[place], self.own_scatters[place])
                    else:
                        own = moments(rows[image], None if inside is None else inside[image])
                    others = without(whole, own)
                    axes = left_over(others, self.variance, rounding(whole))
                    grid[image] = residuals(rows[image], others.mean, axes)
        maps = render(grid, size, inside)  # (B, H, W)
        return Findings(image_score(maps, valid, self.image_score), maps, peak(maps, valid))

    def facts(self) -> dict[str, int | float]:
        dimensions, dropped = self.axes.shape
        return {"patches": int(self.count), "dimensions": dimensions, "components": dimensions - dropped}


class Moments(NamedTuple):
    """Of the rows of a matrix, float64."""

    count: Tensor  # ()
    mean: Tensor  # (D,)
    scatter: Tensor  # (D, D), the sum of the outer products of the rows' deviations from the mean


def moments(rows: Tensor, inside: Tensor | None) -> Moments:
    """Of an image's patches (h, w, D), those that `inside` (h, w) leaves, one at least: mean first, then scatter."""
    rows = (rows.flatten(0, 1) if inside is None else rows[inside]).double()  # (n, D)
    mean = rows[0] + (rows - rows[0]).mean(0)  # exact for copies
    centred = rows - mean
    return Moments(mean.new_tensor(len(rows)), mean, centred.T @ centred)


def together(parts: Sequence[Moments]) -> Moments:
    """Of the rows of all parts (Chan et al. 1979)."""
    counts, means = (torch.stack(each) for each in list(zip(*parts))[:2])  # (m,), (m, D)
    count = counts.sum()
    mean = means[0] + (counts[:, None] * (means - means[0])).sum(0) / count
    away = (means - mean) * counts[:, None].sqrt()
    return Moments(count, mean, sum(part.scatter for part in parts) + away.T @ away)


def without(whole: Moments, own: Moments) -> Moments:
    """Of the rows of `whole` that are not among its part `own`: `together` solved for the other part."""
    count = whole.count - own.count
    away = own.mean - whole.mean
    scatter = whole.scatter - own.scatter - (own.count * whole.count / count) * torch.outer(away, away)
    return Moments(count, whole.mean - away * (own.count / count), scatter)


def rounding(whole: Moments) -> Tensor:
    """An eigenvalue of the scatter that is no more than this is 0: what float64 sums and float32 features leave."""
    exact = len(whole.mean) * torch.finfo(torch.float64).eps * whole.scatter.trace()
    return exact + torch.finfo(torch.float32).eps ** 2 * whole.count * whole.mean.square().sum()


def left_over(found: Moments, variance: float, least: Tensor) -> Tensor:
    """Axes (D, D - k) orthogonal to the k principal components, the fewest that hold the share `variance`.

    Eigenvalues up to `least` count as 0: without variance no component is kept.
    """
    spread, axes = torch.linalg.eigh(found.scatter)  # ascending
    lost = spread.where(spread > least, 0).cumsum(0)  # (D,) with the first 1, 2, ... axes dropped
    return axes[:, : int((lost <= (1 - variance) * lost[-1]).sum())]


def residuals(rows: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Squared distances of rows (..., D) from the subspace orthogonal to axes (D, m) through the mean (D,): float32."""
    return ((rows.double() - mean) @ axes).square().sum(-1).float()


def rotated(images: Tensor, share: float) -> Tensor:
    """(B, C, H, W) turned counterclockwise by a share of 360 degrees about the center, bilinear, borders mirrored."""
    (height, width), angle = images.shape[-2:], 2 * math.pi * share
    cos, sin = math.cos(angle), math.sin(angle)
    turn = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
