"""Features as points of a plane, how far to trust such a picture, and TensorBoard's projector.

Letters: N images, D features, k neighbors.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE, trustworthiness
from torch import Tensor

from data.dataset import Dataset
from evaluation.dataset.inspection import tile
from runtime.errors import UserError
from runtime.log import Log
from search.nearest import nearest

NEIGHBORS = 10
EQUAL = 1e-12  # features of length 1 that differ by no more are equal but for rounding
SPRITE = 48  # pixels of the longer side of an image in TensorBoard's projector
COMPONENTS = 50  # principal components that the projector gets: its own methods start from so many


def unit(features: Tensor) -> Tensor:
    """(N, D) with rows of length 1, float64 on the CPU: their distances rank as the cosines do that kNN compares."""
    return F.normalize(features.double().cpu(), dim=1)


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first components of features (N, D), (N, min(count, N, D)) float64, and each one's share of the variance.

    In every component the largest loading is positive, as in scikit-learn; where all features are equal, shares are 0.
    """
    points = features.double()
    points = points - points.mean(0)
    left, strengths, loadings = torch.linalg.svd(points, full_matrices=False)
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))[:, 0]  # (min(N, D),)
    variances = strengths.square()
    shares = variances / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
    return (left * strengths * largest.sign())[:, :count], shares[:count]


def tsne(features: Tensor, *, perplexity: float, learning_rate: float | None, seed: int) -> Tensor:
    """scikit-learn's t-SNE (Barnes-Hut) of features (N, D), begun at their principal components: (N, 2) float64. Equal
    features, as of a collapsed network, have none and begin at random.

    learning_rate: None: N / 48, at least 50 (Belkina et al. 2019).

    Raises:
        UserError: fewer than four images, or a perplexity that asks for more neighbors than there are.
    """
    count = len(features)
    if count < 4:
        raise UserError(f"t-SNE needs four images or more, and there are {count}: raise images, or add some")
    if not perplexity < count:
        raise UserError(
            f"perplexity={perplexity:g} must be below the number of images, {count}: {count // 3}, a third, will do"
        )
    points = features.double().cpu()
    start = "pca" if (points - points[0]).abs().max() > EQUAL else "random"  # scikit-learn divides by their deviation
    method = TSNE(perplexity=perplexity, learning_rate=learning_rate or "auto", init=start, random_state=seed)
    return torch.from_numpy(method.fit_transform(points.numpy())).double()


def trust(space: Tensor, plane: Tensor, labels: Tensor, k: int = NEIGHBORS) -> dict[str, float]:
    """How much of features (N, D), N >= 4, can be read off their points (N, 2) in a plane.

    Returns:
        trustworthiness: 1 if an image's k nearest points are also near in the space, about 0.5 of points at random
            (Venna & Kaski 2001, equation 2). k is lowered below N / 2 where images are few.
        knn, knn_space: share of images whose class is that of most of their k nearest others in the plane, and in the
            space; without where there is only one class.
    """
    count = len(space)
    k = min(k, (count - 1) // 2)
    numbers = {"trustworthiness": float(trustworthiness(space.numpy(), plane.numpy(), n_neighbors=k))}
    if len(labels.unique()) > 1:
        numbers |= {"knn": leave_one_out(plane, labels, k), "knn_space": leave_one_out(space, labels, k)}
    return numbers


def leave_one_out(points: Tensor, labels: Tensor, k: int) -> float:
    """Share of points (N, D) whose label (N,) is the most frequent one among their k nearest others, by Euclidean
    distance; of equally frequent labels the one with the nearest point counts."""
    numbers = torch.arange(len(points))
    _, neighbors = nearest(points, points, k, exclude=(numbers, numbers))  # (N, k), nearest first
    around = labels[neighbors]  # (N, k)
    votes = (around[:, :, None] == around[:, None]).sum(2)  # (N, k), of the label of each neighbor
    winner = around.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # argmax takes the first, which is the nearest
    return float((winner == labels).double().mean())


def draw(sets: dict[str, Dataset], images: int, seed: int) -> dict[str, Tensor]:
    """At most so many images of all sets together, drawn at random: {name: positions, ascending}."""
    places = [(name, position) for name, dataset in sets.items() for position in range(len(dataset))]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(places))[:images])
    chosen = [places[i] for i in drawn]
    by_set = {name: torch.tensor([at for own, at in chosen if own == name], dtype=torch.int64) for name in sets}
    return {name: positions for name, positions in by_set.items() if len(positions)}


def project(log: Log, key: str, features: Tensor, columns: dict[str, list[str]], thumbnails: Tensor) -> None:
    """TensorBoard's projector: the principal components of features (N, D), texts of each image in `columns`, and
    thumbnails uint8 (N, 3, s, s)."""
    log.embedding(key, principal_components(features, COMPONENTS)[0], columns, thumbnails)


def thumbnail(dataset: Dataset, position: int, side: int = SPRITE) -> Tensor:
    """An image in a square: uint8 (3, side, side), gray bars beside images that are not square."""
    small = tile(dataset, position, side)
    out = torch.full((3, side, side), 128, dtype=torch.uint8)
    top, left = ((side - length) // 2 for length in small.shape[1:])
    out[:, top : top + small.shape[1], left : left + small.shape[2]] = small
    return out
