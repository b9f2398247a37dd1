"""PaDiM (Defard et al. 2021, "PaDiM: a patch distribution modeling framework"): a Gaussian at every position."""

import random
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.anomaly.detector import Batch, Detector, Findings, Stage
from models.anomaly.gaussian import covariance_form, low_rank_form, put_left_out
from models.anomaly.maps import ImageScore, image_score, peak, render
from runtime.distributed import gather_rows
from runtime.errors import UserError
from runtime.memory import Workspace
from runtime.values import NonNegativeFloat, PositiveFloat, Seed, Width, coerce
from search.bounds import full_precision, require_finite

Form = Literal["auto", "covariance", "low_rank"]


class PaDiM(Detector):
    """Mahalanobis distance of every position's features from those of the normal images at the same position.

    The de-facto reference is xiahaifeng1995/PaDiM-Anomaly-Detection-Localization (the authors published no code), and
    channels=550 (Wide-ResNet-50-2) or 100 (ResNet-18) is its form, with its very channels: several stages at the finest
    one's resolution (nearest), covariance with denominator n - 1 plus regularization I, distances bilinearly upsampled,
    sigma 4; score: `image_score`. Without `channels` all are used, at no loss: see `form`.

    Different from it: images are resized by `data.resample`, there by Lanczos; the map is not scaled to 0..1 over the
    test set, which changes no ranking; with one training image, where n - 1 = 0, the covariance is regularization I
    alone.

    Positions only compare when images are aligned, so images of another size and padding are refused.

    Args:
        backbone: any.
        stages: stages that are concatenated, at the resolution of the finest.
        channels: as many are drawn at random, once for all positions; None: all of them.
        regularization: what is added to the covariance's diagonal, above 0.
        form: `covariance` stores d x d numbers per position, `low_rank` n x (d + n) for n training images; the
            distances are the same. `auto`: the one that stores less.
        image_score: what of an image's map is its score; the reference's is `max`.
        seed: draws the channels, as Python's random.seed(seed); random.sample(range(all), channels).
        memory_limit: GiB of RAM for the training features while fitting; beyond it they go to a temporary file. None:
            half of what is free, or on a GPU its own memory.

    Raises:
        UserError: bad options, or at `fit` and scoring: NaN features, padding, images of another size.
    """

    name = "padim"  # in messages; another method may be PaDiM on features of its own
    fits = True
    leaves_out = True
    positional = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: tuple[Stage, ...] = (1, 2, 3),
        channels: Width | None = None,
        regularization: PositiveFloat = 0.01,
        form: Form = "auto",
        image_score: ImageScore = "max",
        seed: Seed = 1024,
        memory_limit: NonNegativeFloat | None = None,
    ):
        super().__init__(backbone, stages)
        self.channels, self.regularization, self.seed = channels, regularization, seed
        self.form = coerce(form, Form, "padim form")
        self.memory_limit, self.image_score = memory_limit, image_score
        self.register_buffer("drawn", torch.empty(0, dtype=torch.int64))  # (d,) ascending
        self.register_buffer("numbers", torch.empty(0, dtype=torch.int64))  # (n,) of the fitted images, ascending
        self.register_buffer("mean", torch.empty(0, 0, 0))  # (h, w, d)
        self.register_buffer("deviations", torch.empty(0, 0, 0))  # (h w, n, d); covariance form: (h w, 0, d)
        self.register_buffer("factor", torch.empty(0, 0, 0))  # (h w, n, n) or (h w, d, d)
        self.register_buffer("left_out", torch.empty(0, 0, 0))  # (n, h, w): each from the others' Gaussians

    def draw(self, total: int) -> Tensor:
        """The channels to use (d,) of `total`, ascending: the distance does not depend on their order."""
        if self.channels is None:
            return torch.arange(total)
        if self.channels > total:
            raise UserError(f"padim channels={self.channels}, but stages {list(self.stages)} have {total}: lower it")
        return torch.tensor(sorted(random.Random(self.seed).sample(range(total), self.channels)))

    def embed(self, features: list[Tensor], workspace: Workspace | None = None) -> Tensor:
        """Stages [(B, C_i, H_i, W_i)] -> (B, h, w, d): the drawn channels at the finest stage's resolution."""
        size, first, parts = max(feature.shape[-2:] for feature in features), 0, []
        if torch.compiler.is_exporting():  # whose shapes must not depend on the values of `drawn`
            whole = torch.cat([F.interpolate(feature, size, mode="nearest") for feature in features], 1)
            rows = whole.permute(0, 2, 3, 1)  # (B, h, w, sum of C_i)
            return rows if len(self.drawn) == rows.shape[-1] else rows[..., self.drawn]
        for feature in features:
            channels = self.drawn[(self.drawn >= first) & (self.drawn < first + feature.shape[1])] - first
            first += feature.shape[1]
            if len(channels) == 0:  # of few random ones a stage may have none, and interpolate refuses an empty map
                continue
            part = feature.permute(0, 2, 3, 1)  # (B, H_i, W_i, C_i)
            part = part if len(channels) == feature.shape[1] else part[..., channels]
            if part.shape[1:3] != size:
                part = F.interpolate(part.permute(0, 3, 1, 2), size, mode="nearest").permute(0, 2, 3, 1)
            parts.append(part)  # (B, h, w, d_i)
        if workspace is None:
            return torch.cat(parts, dim=-1)
        rows = workspace.empty(len(features[0]), *size, len(self.drawn))
        for part, columns in zip(parts, rows.split([part.shape[-1] for part in parts], dim=-1)):
            columns.copy_(part)
        return rows

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """One pass over the images, then the statistics, some positions at a time. All processes hold all state.

        Memory: the features of this process's images, h w d x 4 bytes each, and the fitted state. Covariance form:
        sums are reduced over processes; low-rank form: a few positions' images at a time are gathered by number.
        """
        kept, indices, grid = self.collect(batches)
        order = gather_rows(indices).argsort()
        (positions, d), n, device = kept[0].shape[1:], len(order), self.mean.device
        low_rank = self.form == "low_rank" or (self.form == "auto" and n * (d + n) < d * d)
        side, n_rows = (n, n) if low_rank else (d, 0)
        deviations = self.mean.new_empty(positions, n_rows, d)
        factor = self.mean.new_empty(positions, side, side)
        means, left_out, failed = [], [], []
        budget = 2**25 if device.type == "cpu" else 2**32  # bytes; a CPU is fastest in reach of its caches
        step = max(1, budget // (16 * (n * d + 2 * side * side)))
        for first in range(0, positions, step):
            x = torch.cat([rows[:, first : first + step] for rows in kept]).to(device)  # (n of this process, step, d)
            with full_precision(device):
                if low_rank:
                    found = low_rank_form(gather_rows(x)[order], self.regularization)
                else:
                    found = covariance_form(x, n, self.regularization)
            deviations[first : first + step], factor[first : first + step] = found.deviations, found.factor
            means.append(found.mean)
            left_out.append(found.left_out)
            failed.append(found.failed)
        if torch.cat(failed).any():
            raise UserError(
                f"{self.name} regularization={self.regularization} is too small for these features: raise it"
            )
        table = torch.cat(left_out, dim=1).float()  # (n, h w), in covariance form the images of this process
        table = table if low_rank else gather_rows(table)[order]
        self.mean, self.left_out = torch.cat(means).unflatten(0, grid), table.unflatten(1, grid)
        self.deviations, self.factor = deviations, factor

    def collect(self, batches: Iterable[Batch]) -> tuple[list[Tensor], Tensor, tuple[int, int]]:
        """Draw the channels and read the images of this process: features [(B, h w, d)], numbers (N,), (h, w)."""
        device, kept, sums, indices = self.mean.device, [], [], []
        in_ram = device.type == "cpu" or self.memory_limit is not None
        workspace = Workspace.from_gib(self.memory_limit) if in_ram else None
        for batch in batches:
            features = self.features(batch.images)
            if not kept:
                self.drawn = self.draw(sum(feature.shape[1] for feature in features)).to(device)
            rows = self.embed(features, workspace)  # (B, h, w, d)
            if not kept:
                grid = rows.shape[1:3]
            self.require_aligned(rows, grid, batch.valid)
            sums.append(_sums(features))
            indices.append(batch.indices)
            kept.append(rows.flatten(1, 2))  # (B, h w, d)
        sums, self.numbers = self.in_order(sums, indices)
        require_finite(sums, "features of the training images")
        return kept, torch.cat(indices), grid

    def distances(self, rows: Tensor) -> Tensor:
        """(B, h, w, d) -> Mahalanobis distances (B, h, w), float32.

        The low-rank form takes the training images' deviations X (n, d) with the weights a that minimize
        |delta - X^T a|^2 + ridge |a|^2: the minimum is regularization times the squared distance. A sum of squares
        does not cancel as |delta|^2 - delta^T X^T a would, and rounding in a counts by its square only.
        """
        away = (rows - self.mean).flatten(1, 2).transpose(0, 1)  # (h w, B, d)
        with full_precision(rows.device):
            if self.deviations.shape[1]:
                weights = self.factor.mT @ (self.factor @ (self.deviations @ away.mT))  # (h w, n, B)
                rest = torch.baddbmm(away, weights.mT, self.deviations, alpha=-1)  # (h w, B, d)
                ridge = max(self.deviations.shape[1] - 1, 1)  # over regularization
                squared = rest.square().sum(2) / self.regularization + ridge * weights.square().sum(1)  # (h w, B)
            else:
                squared = (self.factor @ away.mT).square().sum(1)  # (h w, B)
        return squared.sqrt().T.unflatten(1, rows.shape[1:3])  # (B, h, w)

    def measure(
        self,
        features: list[Tensor],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: Tensor | None = None,
    ) -> Findings:
        """`leave_out`: the images must be those left out: their distances were found by `fit`."""
        self.require_fitted(self.mean)
        rows = self.embed(features)  # (B, h, w, d)
        self.require_aligned(rows, self.mean.shape[:2], valid)
        require_finite(_sums(features), "features of the images")
        grid = self.distances(rows)
        if leave_out is not None:
            if len(self.numbers) == 1:
                raise UserError(f"{self.name}: without its one training image nothing is left to compare; give more")
            grid = put_left_out(grid, self.left_out, self.numbers, leave_out)
        maps = render(grid, size)  # (B, H, W)
        return Findings(image_score(maps, None, self.image_score), maps, peak(maps))

    def require_aligned(self, rows: Tensor, grid: tuple[int, int], valid: Tensor | None) -> None:
        self.refuse_padding(valid)
        if tuple(rows.shape[1:3]) != tuple(grid):
            raise UserError(
                f"{self.name} compares position by position: it was fitted on {grid[0]} x {grid[1]} positions, and "
                f"these images have {rows.shape[1]} x {rows.shape[2]}: give images of the size it was fitted on"
            )

    def refuse_padding(self, valid: Tensor | None) -> None:
        if valid is not None and not valid.all():
            raise UserError(
                f"{self.name} compares position by position, which padding shifts: fit it with data.fit=squash or crop"
            )


def _sums(features: list[Tensor]) -> Tensor:
    """[(B, C_i, H_i, W_i)] -> (B, 1): finite if all numbers are, but where float32 squares would overflow too."""
    return sum(feature.sum((1, 2, 3)) for feature in features)[:, None]
