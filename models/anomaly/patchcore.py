"""PatchCore (Roth et al. 2022, "Towards total recall in industrial anomaly detection"): a thinned bank of patches.

From the top: the detector with `fit`, `measure` and the updates; what `fit` is made of; the published forms, `MODES`.
search/ has the exact searches: coreset.py picks the patches, bank.py keeps them and finds the nearest ones.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from models.anomaly.detector import Batch, Detector, Findings, Stage
from models.anomaly.maps import Border, grid_valid, image_score, render
from runtime.config import pick
from runtime.distributed import all_reduce_sum, gather_rows, is_main, world_size
from runtime.errors import UserError
from runtime.memory import Workspace, free_memory
from runtime.values import Few, NonNegativeFloat, PositiveInt, PositiveShare, Seed, Width, WidthOrZero
from search.bank import Bank
from search.bounds import full_precision
from search.coreset import Coreset, greedy_coreset
from search.nearest import with_gradient
from search.patches import Patches, all_ids, memory_plan


class PatchCore(Detector):
    """Distance of every patch of an image to the nearest patch of a coreset of the normal images' patches.

    Patches are locally averaged features of several stages at the finest one's resolution; the bank is their greedy
    k-center coreset (Algorithm 1), chosen under a random projection but kept unprojected. The map is the distances,
    enlarged and blurred (sigma 4); the score is the largest distance (eq. 6), weighted (eq. 7) unless mode=amazon, or
    what `image_score` takes of the map.

    `mode` takes one of the published forms as a whole; `MODES` lists what differs. Deviations: random
    numbers are torch's; nothing is projected that would not become narrower; a picked patch is not picked twice (in
    amazon's code it can be, once all distances are 0); images are normalized and resized by data/, the same for all.

    Under torchrun patches and bank are spread over the processes, with the picks and scores of one process. Patches
    beyond `memory_limit` lie in a memory-mapped file. `keep` and `add` change the images of a fitted bank.

    An image is left out by ignoring its bank patches. With coreset=1 that is a bank fitted without it; a thinned
    bank would have kept patches of others in their place, so left-out scores come out above a refit's (1.3 times on
    average for 24 textures at coreset=0.1) and thresholds from them on the safe side; `holdout=0.1` avoids that.

    The paper does not say its b of eq. 7; 9 is anomalib's. Amazon's mean over k neighbors is here k = 1.

    Args:
        backbone: any.
        mode: `paper`, `amazon` or `anomalib`.
        stages: 2 and 3 are strides 8 and 16 of a ResNet or MobileNetV2 with the ImageNet stem.
        neighborhood: side of the local average (odd), stride 1, zeros around the border counted in the mean as
            avg_pool2d and the authors' unfold do; 1 switches it off.
        embed_dim: channels of a patch after averaging over channels; none: the mode's.
        coreset: fraction of the patches to keep, in (0, 1]; at least one patch is kept, 1 keeps all in order.
        projection: width of the projection under which the coreset is chosen; 0: no projection; none: the mode's.
        neighbors: b of eq. 7, the bank patches around the nearest one; 1: the plain maximum; none: the mode's.
        image_score: `patch`, of the most anomalous patch (eqs. 6 and 7), or one of the map.
        memory_limit: GiB that the patches may take in RAM; none: half of what is free.
        seed: draws the projection and the coreset's first patch.
    """

    fits = True
    updates = True
    leaves_out = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mode: Literal["paper", "amazon", "anomalib"] = "paper",
        stages: tuple[Stage, ...] = (2, 3),
        neighborhood: Few = 3,
        embed_dim: Width | None = None,
        coreset: PositiveShare = 0.1,
        projection: WidthOrZero | None = None,
        neighbors: PositiveInt | None = None,
        image_score: Literal["patch", "max", "top1", "mean"] = "patch",
        memory_limit: NonNegativeFloat | None = None,
        seed: Seed = 0,
    ):
        super().__init__(backbone, stages)
        if neighborhood % 2 == 0:
            raise UserError(f"patchcore neighborhood={neighborhood}: the side of the local average is odd: 1, 3, 5")
        self.mode, self.neighborhood, self.coreset = pick(MODES, mode, "patchcore mode"), neighborhood, coreset
        self.embed_dim = embed_dim or self.mode.embed_dim
        self.projection, self.neighbors = projection, neighbors or self.mode.neighbors
        self.image_score, self.memory_limit, self.seed = image_score, memory_limit, seed
        self.bank = Bank()
        self.register_buffer("directions", torch.empty(0, 0))  # (D, width) of the projection
        self.register_buffer("cell", torch.zeros(2))  # height and width of a patch's cell, input pixels
        # covering radius under the projection: when fitted, and what it can be at most after `keep`
        self.register_buffer("radius", torch.zeros(2, dtype=torch.float64))

    def patches(self, features: list[Tensor]) -> Tensor:
        """Stages [(B, C_i, H_i, W_i)] -> patch features (B, h, w, D), h x w of the finest stage."""
        return self.mode.embed(features, self.neighborhood, self.embed_dim)

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:
        """Build the bank; processes share the images evenly, each in ascending order."""
        self.directions = self.directions.new_empty(0, 0)
        patches, work = self._collect(batches, n_images, draw=True)
        points, ids = self._narrow_all(patches.features, work), all_ids(patches.ids, self.radius.device)
        n_picks = max(1, int(self.coreset * len(ids)))
        if n_picks == len(ids):
            chosen = Coreset(ids, 0.0)
        else:
            chosen = self._greedy(points, n_picks, patches.ids, work, **self._begin(patches, points, ids))
        self.cell = self.cell.new_tensor(patches.cell)
        self.bank.budget = work.limit // 2
        self._hold(patches, chosen.picks, work)
        radius = chosen.radius
        if self.mode.starts > 1 and n_picks < len(ids):  # the greedy one knows a distance to starts that are not kept
            radius = float(gather_rows(torch.cat([self._squared(points), self.radius.new_zeros(1)])).max()) ** 0.5
        self.radius = self.radius.new_tensor([radius, radius])

    def measure(
        self,
        features: list[Tensor],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: Tensor | None = None,
    ) -> Findings:
        self.require_fitted(self.bank.origins)
        patches = self.patches(features)  # (B, h, w, D)
        grid = patches.shape[1:3]
        away = None if leave_out is None else leave_out[:, None].expand(-1, math.prod(grid)).flatten()  # (B h w,)
        queries = patches.flatten(0, 2)  # (B h w, D)
        squared, owners = self.bank.nearest(queries, 1, away)
        if queries.requires_grad:
            squared = with_gradient(queries, self.bank.rows(owners))
        squared, owners = (x.view(patches.shape[:3]) for x in (squared, owners))
        distances = squared if self.mode.squared else squared.sqrt()
        distances, inside = distances.float(), None if valid is None else grid_valid(valid, grid)
        compared = distances if inside is None else distances.masked_fill(~inside, -torch.inf)
        scores, peaks = compared.flatten(1).max(1)  # (B,)
        each = torch.arange(patches.shape[0], device=peaks.device)
        nearest = owners.flatten(1)[each, peaks]  # (B,) positions in the bank
        if self.image_score == "patch" and self.neighbors > 1 and len(self.bank) > 1:
            scores = scores * self.reweight(patches.flatten(1, 2)[each, peaks], nearest, leave_out)
        origins = self.bank.origins[nearest]  # (B, 3)
        maps = render(distances, size, inside, nearest=self.mode.nearest, border=self.mode.border)
        if self.image_score != "patch":
            scores = image_score(maps, valid, self.image_score)
        cell = patches.new_tensor([size[0] / grid[0], size[1] / grid[1]])
        spots = torch.stack([peaks // grid[1], peaks % grid[1]], 1)  # (B, 2)
        return Findings(scores, maps, (spots + 0.5) * cell, origins[:, 0], (origins[:, 1:] + 0.5) * self.cell)

    def reweight(self, patches: Tensor, owners: Tensor, leave_out: Tensor | None = None) -> Tensor:
        """The factor of eq. 7: w = 1 - exp |p - m*| / sum over m in N_b(m*) of exp |p - m|, (B,).

        A far patch whose nearest bank patch m* is itself far from the rest of the bank counts for more. N_b(m*) holds
        m* itself.

        Args:
            patches: p, (B, D), each image's most distant patch. owners: position of m* in the bank, (B,).
            leave_out: (B,), training images whose entries are no neighbors.
        """
        count = min(self.neighbors, len(self.bank))
        if leave_out is None:
            around = self.bank.around(owners, count)  # (B, b)
        else:
            around = self.bank.nearest(self.bank.rows(owners), count, leave_out)[1]
        exists = around < len(self.bank)
        neighbors = self.bank.rows(around.where(exists, 0))  # (B, b, D)
        to_neighbors = torch.linalg.vector_norm(patches[:, None] - neighbors, dim=2)  # (B, b)
        return 1 - to_neighbors.where(exists, -torch.inf).softmax(1)[:, 0]

    def prepare_export(self) -> None:
        if self.image_score == "patch" and self.neighbors > 1 and len(self.bank) > 1:
            self.bank.around(torch.arange(len(self.bank)), min(self.neighbors, len(self.bank)))

    def can_leave_out(self, count: int) -> bool:
        """Two images or more have patches in the bank: of a thinned one, all may be of one."""
        return count > 1 and len(self.bank.origins[:, 0].unique()) > 1

    @torch.no_grad()
    def add(self, batches: Iterable[Batch], n_images: int) -> None:
        """Extend the bank by more images, whose numbers it does not hold: of their patches, the greedy picks that it
        takes until none is farther from the bank than the radius it was fitted with (under the projection); all of them
        when the bank was to keep all."""
        self.require_fitted(self.bank.origins)
        patches, work = self._collect(batches, n_images, draw=False)
        if self.coreset == 1:
            picks = all_ids(patches.ids, self.radius.device)
        else:
            points = self._narrow_all(patches.features, work)
            # convolutions of other batch sizes differ in the last bits; 0 would mean to pick copies too
            radius = max(float(self.radius[0]) * (1 + 1e-5), 1e-6)
            n_patches, least = n_images * math.prod(patches.grid), self._squared(points).cpu()
            picks = self._greedy(points, n_patches, patches.ids, work, least=least, radius=radius).picks
        self._hold(patches, picks, work, beside=True)

    @torch.no_grad()
    def keep(self, numbers: Tensor) -> None:
        """Renumber the training images, numbers[old] = new, and forget those at -1 with their patches.

        What a forgotten patch covered lies within the fitted radius plus that patch's distance to its nearest
        remaining one; the largest such sum becomes the bound of the covering radius.
        """
        dropped = self._narrow(self.bank.keep(numbers))
        gaps = self._narrow_bank().nearest(dropped, 1)[0].sqrt()  # (n, 1)
        widest = gather_rows(torch.cat([gaps.flatten(), gaps.new_zeros(1)])).max()
        self.radius = torch.stack([self.radius[0], self.radius[1] + widest])

    def facts(self) -> dict[str, int | float]:
        fitted, at_most = self.radius.tolist()
        return {"bank": len(self.bank), "covering_radius": fitted, "covering_radius_at_most": at_most}

    def _collect(self, batches: Iterable[Batch], n_images: int, *, draw: bool) -> tuple[Patches, Workspace]:
        """The patches of this process's images, and where there is room for more tensors; `draw` a projection first.

        A line on stderr tells the memory that all will take, before it is taken.
        """
        work, ids, n_rows, features = Workspace.from_gib(self.memory_limit), [], 0, None
        for images, valid, indices in batches:
            found = self.patches(self.features(images))  # (B, h, w, D)
            if features is None:
                grid, width = tuple(found.shape[1:3]), found.shape[3]
                area, cell = math.prod(grid), (images.shape[2] / grid[0], images.shape[3] / grid[1])
                if draw:
                    self._draw_projection(width, n_images * area)
                room = -(-n_images // world_size()) * area  # the images are shared evenly
                if is_main():
                    kept = int(self.coreset * room) + 1 if draw else room
                    plan = memory_plan(grid, width, self.directions.shape[1] or width, room, kept, work)
                    print(f"patchcore, {plan}", file=sys.stderr)
                features = work.empty(room, width)
            elif tuple(found.shape[1:]) != (*grid, width):
                raise ValueError(f"images of {tuple(images.shape[2:])} pixels give other patches than those before")
            numbers = indices.cpu()[:, None] * area + torch.arange(area)  # (B, h w)
            found, numbers = found.flatten(0, 2), numbers.flatten()  # (B h w, D), (B h w,)
            if valid is not None:
                inside = grid_valid(valid, grid).flatten()
                found, numbers = found[inside], numbers[inside.cpu()]
            features[n_rows : n_rows + len(found)] = found
            n_rows += len(found)
            ids.append(numbers)
        self.require_images(features is not None)
        patches = Patches(features[:n_rows], torch.cat(ids), grid, cell)
        if (patches.ids.diff() <= 0).any():
            raise ValueError("training images must come in ascending order, each once")
        finite = all(some.sum(dtype=torch.float64).isfinite() for some in patches.features.split(2**14))
        if all_reduce_sum(torch.tensor(float(not finite), device=self.radius.device)) > 0:  # told on every process
            raise UserError(
                "patchcore: features of a training image are NaN or inf; check the weights and the precision"
            )
        return patches, work

    def _draw_projection(self, width: int, n_patches: int) -> None:
        """The directions under which the coreset of patches of `width` features is chosen; none if not fewer."""
        narrow = self.mode.width(n_patches) if self.projection is None else self.projection
        if 0 < narrow < width:
            generator = torch.Generator().manual_seed(self.seed)
            self.directions = self.mode.project(width, narrow, generator).to(self.radius.device)

    def _narrow(self, entries: Tensor) -> Tensor:
        """(n, D) -> (n, width) under the projection, if there is one."""
        if self.directions.numel() == 0:
            return entries
        with full_precision(entries.device):
            return entries @ self.directions.to(entries.device)

    def _narrow_all(self, features: Tensor, work: Workspace) -> Tensor:
        """`_narrow` of all patches (N_r, D), piece by piece: (N_r, width) on the CPU."""
        if self.directions.numel() == 0:
            return features
        narrow = work.empty(len(features), self.directions.shape[1])
        for some, out in zip(features.split(2**14), narrow.split(2**14)):
            out.copy_(self._narrow(some.to(self.directions.device)))
        return narrow

    def _narrow_bank(self) -> Bank:
        narrow = Bank()
        narrow.hold(self._narrow(self.bank.entries), self.bank.positions, self.bank.origins)
        return narrow

    def _begin(self, patches: Patches, points: Tensor, ids: Tensor) -> dict[str, int | Tensor]:
        """Where the greedy search begins: at one patch, or at the mean distance to several, none of which is kept."""
        starts = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.seed + 1))]
        starts = starts[: self.mode.starts]
        if self.mode.starts == 1:
            return {"start": int(starts)}
        return {"least": patches.squared_mean_distance(points, starts, self.radius.device)}

    def _greedy(self, points: Tensor, n_picks: int, ids: Tensor, work: Workspace, **begin) -> Coreset:
        with tqdm(total=n_picks, desc="coreset", unit="patch", delay=5, leave=False, disable=not is_main()) as bar:
            device = self.radius.device
            if device.type == "cuda" and 4 * points.nbytes < free_memory(device):
                points = points.to(device)
            return greedy_coreset(points, n_picks, ids=ids, progress=bar.update, empty=work.empty, **begin)

    def _squared(self, points: Tensor) -> Tensor:
        """Squared distance of each point (N_r, width) of this process to the bank, under the projection: (N_r,)."""
        bank, pieces = self._narrow_bank(), points.split(2**14)
        most = int(gather_rows(torch.tensor([len(pieces)], device=self.radius.device)).max())  # all must ask as often
        pieces = [*pieces, *(points[:0] for _ in range(most - len(pieces)))]
        return torch.cat([bank.nearest(piece.to(self.radius.device), 1)[0][:, 0] for piece in pieces])

    def _hold(self, patches: Patches, picks: Tensor, work: Workspace, *, beside: bool = False) -> None:
        """Make the picked patches the bank, or put them beside what it holds; on the GPU unless they fill it."""
        entries, positions, origins = patches.chosen(picks, work)
        device = self.radius.device
        if device.type == "cpu" or entries.nbytes < free_memory(device) // 4:
            entries = entries.to(device)
        (self.bank.extend if beside else self.bank.hold)(entries, positions.to(device), origins.to(device))


def concatenate(features: list[Tensor], side: int, width: int | None) -> Tensor:
    """Paper and anomalib: local means of each stage [(B, C_i, H_i, W_i)], bilinearly at the finest one's resolution,
    side by side; more than `width` channels are averaged over to that many -> (B, H, W, D)."""
    size = max(feature.shape[-2:] for feature in features)
    pooled = [F.avg_pool2d(feature, side, stride=1, padding=side // 2) for feature in features]
    aligned = [F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in pooled]
    patches = torch.cat(aligned, dim=1).permute(0, 2, 3, 1)  # (B, H, W, sum of C_i)
    if width and patches.shape[-1] > width:
        patches = F.adaptive_avg_pool1d(patches.flatten(1, 2), width).unflatten(1, size)  # (B, H, W, D)
    return patches


def average_twice(features: list[Tensor], side: int, width: int | None) -> Tensor:
    """amazon: every stage's unfolded (C, side, side) patch averaged to `width` numbers, then all stages' together.

    Their order is unfold, upsample, average; averaging first is the same, since both are linear, and 9 times cheaper.
    Stages of 512 and 1024 channels (ResNet-50, Wide-ResNet-50-2) under a 3 x 3 patch and width 1024 have a closed form:
    512 x 9 -> 1024 takes windows of 5 of 9 offsets that share the centre, 1024 x 9 -> 1024 is the local mean, and
    2048 -> 1024 averages neighbors. So nothing is unfolded: (9 mean(F2) + F2) / 10 and the mean of channel pairs of
    mean(F3).
    """
    size = max(feature.shape[-2:] for feature in features)
    if side == 3 and width == 1024 and [feature.shape[1] for feature in features] == [512, 1024]:
        fine, coarse = (F.avg_pool2d(feature, 3, stride=1, padding=1) for feature in features)
        coarse = coarse.unflatten(1, (512, 2)).mean(2)  # (B, 512, H_3, W_3)
        coarse = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        return torch.cat([(9 * fine + features[0]) / 10, coarse], dim=1).permute(0, 2, 3, 1)  # (B, H, W, 1024)
    stages = []
    for feature in features:
        patches = F.unfold(feature, side, padding=side // 2).transpose(1, 2)  # (B, H_i W_i, C_i side^2)
        means = F.adaptive_avg_pool1d(patches, width).transpose(1, 2)  # (B, width, H_i W_i)
        stages.append(F.interpolate(means.unflatten(2, feature.shape[-2:]), size, mode="bilinear", align_corners=False))
    stacked = torch.cat(stages, dim=1).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, stages x width)
    return F.adaptive_avg_pool1d(stacked, width).unflatten(1, size)  # (B, H, W, width)


def gaussian(channels: int, width: int, generator: Generator) -> Tensor:
    """paper: independent normal directions of variance 1 / width (Johnson-Lindenstrauss): (channels, width)."""
    return torch.randn(channels, width, generator=generator) / width**0.5


def linear_layer(channels: int, width: int, generator: Generator) -> Tensor:
    """amazon: the initial weight of nn.Linear(channels, width, bias=False), uniform within 1 / sqrt(channels)."""
    return (2 * torch.rand(channels, width, generator=generator) - 1) / channels**0.5


def sparse(channels: int, width: int, generator: Generator) -> Tensor:
    """anomalib: scikit-learn's SparseRandomProjection (Li et al. 2006), density 1 / sqrt(channels)."""
    density = channels**-0.5
    draw = torch.rand(channels, width, generator=generator)
    signs = (draw < density / 2).float() - (draw > 1 - density / 2).float()
    return signs / (density * width) ** 0.5


def paper_width(n_patches: int) -> int:  # noqa: ARG001
    return 128


def anomalib_width(n_patches: int) -> int:
    """scikit-learn's johnson_lindenstrauss_min_dim for eps = 0.9."""
    return max(1, int(4 * math.log(n_patches) / (0.9**2 / 2 - 0.9**3 / 3)))


@dataclass(frozen=True)
class Mode:
    """One published form."""

    embed: Callable[[list[Tensor], int, int | None], Tensor]
    embed_dim: int | None  # None: as many as the stages have together
    project: Callable[[int, int, Generator], Tensor]
    width: Callable[[int], int]  # of the projection, for a number of patches
    starts: int  # 1: the greedy search begins with one random patch; n: with the mean distance to n patches, none kept
    squared: bool  # patch scores are squared distances (faiss)
    neighbors: int  # b of the paper's eq. 7; 1: no weighting
    nearest: bool  # the map is enlarged by repeating pixels, not bilinearly
    border: Border  # of the blur


MODES = {
    "paper": Mode(concatenate, 1024, gaussian, paper_width, 1, False, 9, False, "repeat"),
    "amazon": Mode(average_twice, 1024, linear_layer, paper_width, 10, True, 1, False, "repeat"),
    "anomalib": Mode(concatenate, None, sparse, anomalib_width, 1, False, 9, True, "mirror"),
}
