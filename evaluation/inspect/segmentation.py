"""Unsupervised segmentation: what STEGO learns from, what its clusters mean, and simpler ones to compare with.

Deviations from the official code: images are not cut into five crops, no conditional random field smooths the result,
and the test is at the size of the training.

Letters: N images of H x W pixels, h x w patches of them, C channels of the features, K clusters, L classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from data.dataset import Dataset
from data.loading import Loader
from data.normalize import normalization_of, normalize
from data.splits import stratified_split
from evaluation.features import extract
from evaluation.inspect.dense import Flattened
from runtime.distributed import all_reduce_sum, gather_rows
from runtime.errors import UserError
from runtime.memory import free_memory, gib
from search.nearest import nearest

NEAR = 7  # images most like each, of which one takes part in a step, as in the official code
PATCHES = 50_000  # at most, drawn at random, that k-means and the linear probe learn from
COPIES = 4  # of the features that exist at once while they are gathered and sorted


def all_maps(dense: nn.Module, loader: Loader) -> Tensor:
    """What `dense` makes of the loader's images by ascending index, (N, C, h, w) on its device, equal on all ranks.

    Raises:
        UserError: there is no memory for them.
    """
    rows, count = Flattened(dense), len(loader.indices)
    example = normalize(loader.dataset[int(loader.indices[0])][0][None].to(loader.device), rows.normalization)
    needed = 4 * COPIES * count * rows(example).shape[1]
    if needed > (free := free_memory(loader.device)):
        raise UserError(
            f"features of {count} images take {gib(needed)} while they are gathered, {gib(free)} are free: lower "
            "images or data.size"
        )
    flat, _ = extract(rows, loader, progress="features")
    return flat.unflatten(1, rows.shape)  # (N, C, h, w)


def near_images(maps: Tensor, count: int = NEAR) -> Tensor:
    """For each image (N, C, h, w), N > 1, the numbers of those most like it, by the cosine of their mean unit feature:
    (N, min(count, N - 1)) int64."""
    means = F.normalize(F.normalize(maps, dim=1).mean((2, 3)), dim=1)  # (N, C)
    numbers = torch.arange(len(means), device=means.device)
    return nearest(means, means, min(count, len(means) - 1), exclude=(numbers, numbers))[1]


def batch_numbers(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of `count` images step number `step` sees, (batch,) int64: a new order each epoch, without its rest."""
    epoch, place = divmod(step, count // batch)
    mixed = int(np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
    return order[place * batch : (place + 1) * batch]


@torch.no_grad()
def share(*networks: nn.Module) -> None:
    """Give every rank rank 0's parameters: all train alike, but on CUDA sums in another order drift apart."""
    for network in networks:
        for parameter in network.parameters():
            parameter.copy_(gather_rows(parameter)[: len(parameter)])


# --------------------------------------------------------------------- what clusters mean


def counts_of(
    clusters: Tensor, labels: Tensor, n_clusters: int, n_classes: int, inside: Tensor | None = None
) -> Tensor:
    """How many pixels of each class are in each cluster: (K, L) int64; both int64 of one shape. `inside`: bool of that
    shape, False in padding, which does not count."""
    pairs = clusters * n_classes + labels
    pairs = pairs.flatten() if inside is None else pairs[inside]
    return pairs.bincount(minlength=n_clusters * n_classes).view(n_clusters, n_classes).cpu()


def match(counts: Tensor) -> list[int | None]:
    """The class of each cluster, such that most pixels are right: one cluster per class (Hungarian matching), and None
    of clusters that are left over. counts: (K, L), K >= L."""
    clusters, classes = linear_sum_assignment(counts.numpy(), maximize=True)
    found = dict(zip(clusters.tolist(), classes.tolist()))
    return [found.get(cluster) for cluster in range(len(counts))]


def scores(counts: Tensor, classes: list[str], assigned: list[int | None] | None = None) -> dict:
    """Accuracy and intersection over union of clusters, from `counts_of` (K, L), K >= L.

    Pixels in clusters of no class are wrong. A class without pixels has no IoU (None) and is left out of the mean.

    Args:
        assigned: the class of each cluster, each class once; None: `match` finds it in these very counts.
    """
    assigned = match(counts) if assigned is None else assigned
    hits, iou = 0, {}
    for label, name in enumerate(classes):
        cluster = assigned.index(label)
        right = int(counts[cluster, label])
        either = int(counts[cluster].sum() + counts[:, label].sum()) - right
        hits += right
        iou[name] = right / either if counts[:, label].any() else None
    there = [value for value in iou.values() if value is not None]
    return {"miou": sum(there) / len(there), "accuracy": hits / int(counts.sum()), "iou": iou, "matching": assigned}


# --------------------------------------------------------------------- on images


@dataclass(frozen=True)
class Segmenter:
    """What STEGO has learned, and k-means on the same features beside it.

    Attributes:
        dense: images (B, 3, H, W) -> features (B, C, h, w). head: on them, in eval mode.
        centers: of the codes (K, D). baseline: of the features (K, C).
    """

    dense: nn.Module
    head: nn.Module
    centers: Tensor
    baseline: Tensor

    @torch.no_grad()
    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, D, h, w) and features (B, C, h, w) of images uint8 (B, 3, H, W), averaged with those of the mirror
        images, mirrored back, as in the official evaluation."""
        x = normalize(images, normalization_of(self.dense))
        ways = self.dense(x), self.dense(x.flip(3)).flip(3)
        (_, one), (_, other) = self.head(ways[0]), self.head(ways[1])
        return (one + other) / 2, (ways[0] + ways[1]) / 2

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Clusters of all pixels of images uint8 (B, 3, H, W): int64 (B, H, W), by STEGO and by k-means."""
        size = (images.shape[2], images.shape[3])
        codes, features = self.maps(images)
        return {
            "stego": clusters_of(codes, self.centers, size),
            "k_means": clusters_of(features, self.baseline, size),
        }


def confusion(segmenter: Segmenter, loader: Loader) -> dict[str, Tensor]:
    """`counts_of` the clusters and the masks of a loader's images, for each method (K, 2), over all ranks."""
    n_clusters = len(segmenter.centers)
    totals = {name: torch.zeros(n_clusters, 2, dtype=torch.int64) for name in ("stego", "k_means")}
    dataset = loader.dataset
    for images, masks, _, indices in loader.epoch(0):
        inside = dataset.inside(indices, images.device)  # (B, H, W)
        for name, clusters in segmenter(images).items():
            totals[name] += counts_of(clusters, masks.long(), n_clusters, 2, inside)
    return {name: all_reduce_sum(counts.to(loader.device)).cpu() for name, counts in totals.items()}


class Codes(nn.Module):
    """A segmenter's codes, as a network: normalized images (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.dense, self.head = segmenter.dense, segmenter.head
        self.normalization = normalization_of(segmenter.dense)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(x))[1]


def halves_with_masks(
    dataset: Dataset, indices: Tensor, grid: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Masks bool (N, H, W) of these images (N,), which patches of an h x w grid are mostly defect (N, h, w), and two
    halves of the N, each with half of every kind of image.

    Raises:
        UserError: all patches of a half are normal, or all defective.
    """
    masks = torch.stack([dataset.mask(i) for i in indices.tolist()])  # (N, H, W)
    defective = F.adaptive_avg_pool2d(masks[:, None].float(), grid)[:, 0] > 0.5  # (N, h, w)
    kinds = torch.from_numpy(np.unique(dataset.kinds, return_inverse=True)[1])[indices]
    halves = stratified_split(kinds, 0.5, seed)
    if any(len(defective[half].unique()) < 2 for half in halves):
        raise UserError(
            "linear=true needs patches with and without a defect in both halves of the test images: set linear=false, "
            "or raise data.size, which makes patches smaller"
        )
    return masks, defective, halves


def cross_tested(segmenter: Segmenter, loader: Loader, seed: int) -> Tensor:
    """`counts_of` a linear classifier of codes on a loader's images: each half of them is tested by the classifier that
    learned from the masks of the other; (2, 2)."""
    dataset, codes = loader.dataset, all_maps(Codes(segmenter), loader)
    masks, defective, halves = halves_with_masks(dataset, loader.indices, codes.shape[2:], seed)
    inside = dataset.inside(loader.indices, "cpu")  # (N, H, W)
    inside = torch.ones_like(masks) if inside is None else inside
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for learned, tested in (halves, halves[::-1]):
        odds = linear_probe(codes[learned], defective[learned].to(codes.device), codes[tested], seed)
        for some, mask, valid in zip(odds.split(16), masks[tested].split(16), inside[tested].split(16)):
            large = F.interpolate(some[:, None], mask.shape[1:], mode="bilinear", align_corners=False)[:, 0]
            counts += counts_of((large > 0).long().cpu(), mask.long(), 2, 2, valid)
    return counts


def clusters_of(codes: Tensor, centers: Tensor, size: tuple[int, int]) -> Tensor:
    """Codes (B, D, h, w), brought to H x W pixels -> the cluster whose center (K, D) has the largest cosine, (B, H, W).

    Interpolated first, as in the official code. Ties go to the lower number.
    """
    units, labels = F.normalize(centers, dim=1), []
    for code in codes:  # one by one: at full size they are large
        large = F.interpolate(code[None], size, mode="bilinear", align_corners=False)[0]  # (D, H, W)
        labels.append(torch.einsum("dhw,kd->khw", large, units).argmax(0))  # the code's own length changes no argmax
    return torch.stack(labels)


def k_means(maps: Tensor, clusters: int, seed: int) -> Tensor:
    """The baseline: k-means on patches of features (N, C, h, w) at length 1; centers (K, C)."""
    rows = some_patches(maps, seed)
    method = KMeans(clusters, n_init=4, random_state=seed).fit(F.normalize(rows, dim=1).cpu().numpy())
    return torch.from_numpy(method.cluster_centers_).to(maps)


def linear_probe(codes: Tensor, masks: Tensor, tested: Tensor, seed: int) -> Tensor:
    """Whether patches are defective, by logistic regression on codes (N, D, h, w) and masks bool (N, h, w) of other
    images: log odds of the `tested` (M, D, h, w), (M, h, w).

    Raises:
        UserError: all of these masks are empty, or full.
    """
    rows, labels = some_patches(codes, seed), some_patches(masks[:, None], seed)[:, 0]
    if len(labels.unique()) < 2:
        raise UserError("linear=true needs patches with and without a defect among those drawn of each half")
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    method = LogisticRegression(max_iter=1000)
    method.fit(((rows - mean) / std).double().cpu().numpy(), labels.cpu().numpy())
    weight = torch.from_numpy(method.coef_[0]).to(codes) / std  # (D,)
    bias = float(method.intercept_[0]) - float(weight @ mean)
    return torch.einsum("mdhw,d->mhw", tested, weight) + bias  # (M, h, w)


def some_patches(maps: Tensor, seed: int) -> Tensor:
    """At most `PATCHES` patches of (N, C, h, w), drawn at random, as rows (n, C)."""
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (N h w, C)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:PATCHES]
    return rows[drawn.to(rows.device)]
