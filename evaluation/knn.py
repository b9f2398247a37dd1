"""Weighted k-nearest-neighbor classification on frozen features, as DINO measures it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.collapse import feature_health
from evaluation.features import extract
from runtime.errors import UserError

# DINO's own setting, and the one lightly and most CIFAR tables use; both are always reported.
KNN_SETTINGS = ({"k": 20, "temperature": 0.07}, {"k": 200, "temperature": 0.1})

SIMILARITIES_AT_ONCE = 2**24  # 128 MiB of float64, and about twice that in all


@torch.no_grad()
def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    temperature: float,
    n_classes: int,
) -> Tensor:
    """Class scores (N_test, n_classes) float32; each row sums to 1, and a class that got no vote has 0.

    The vote of DINO (Caron et al. 2021, eval_knn.py; InstDisc, Wu et al. 2018): features (N, D) are L2-normalized,
    the k training images of highest cosine similarity s vote for their class with weight exp(s / temperature). The
    votes are divided by their sum (a softmax over the neighbors, as in DINOv2): the same order, and no overflow at
    small temperatures. `argmax` and `classification_report` settle equal scores for the lowest class index.

    Deviations: similarities and votes are float64 rounded to float32, so TF32, the device and the chunk size change
    nothing and copies of an image tie exactly; of equally similar images the lower index is nearer (DINO: any
    order). With fewer than k training images all of them vote (`few_neighbors` has the words for it).

    Raises:
        UserError: one class only, of which every vote is right.
        ValueError: shapes that do not fit, labels outside [0, n_classes), no training image, values not finite.
    """
    _check(train_features, train_labels, test_features, n_classes)
    n_train = len(train_features)
    k = min(k, n_train)
    train = F.normalize(train_features.double(), dim=1)  # (N_train, D)
    votes = torch.empty(len(test_features), n_classes, device=train.device)  # (N_test, n_classes) float32
    rows = max(1, SIMILARITIES_AT_ONCE // n_train)
    for chunk, out in zip(test_features.split(rows), votes.split(rows)):
        similarity = (F.normalize(chunk.double(), dim=1) @ train.T).float()  # (B, N_train)
        nearest, neighbors = _top(similarity, k)  # (B, k)
        weights = (nearest.double() / temperature).softmax(1)  # (B, k)
        tally = weights.new_zeros(out.shape).scatter_add_(1, train_labels[neighbors], weights)  # (B, n_classes)
        out.copy_(tally)
    return votes


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    test_labels: Tensor,
    k: int,
    temperature: float,
    n_classes: int,
) -> float:
    """Share of test images whose class gets the largest vote of `knn_scores`, in [0, 1]."""
    scores = knn_scores(train_features, train_labels, test_features, k=k, temperature=temperature, n_classes=n_classes)
    return float((scores.argmax(1) == test_labels).double().mean())


def knn_metrics(backbone: nn.Module, bank, queries) -> dict[str, float]:
    """`knn20_top1` and `knn200_top1` of the images of Loader `queries` by those of `bank`, and the bank's
    `feature_health`, equal on all ranks."""
    (train, labels), (test, test_labels) = extract(backbone, bank), extract(backbone, queries)
    about = {"test_labels": test_labels, "n_classes": len(bank.dataset.classes)}
    metrics = {f"knn{s['k']}_top1": knn_accuracy(train, labels, test, **about, **s) for s in KNN_SETTINGS}
    return metrics | feature_health(train)


def few_neighbors(n_train: int, *ks: int) -> str | None:
    """One line when there are fewer than k training images for a k of `KNN_SETTINGS` or of `ks`, or None."""
    lacking = sorted(k for k in {setting["k"] for setting in KNN_SETTINGS} | set(ks) if k > n_train)
    if not lacking:
        return None
    asked = " and ".join(f"k={k}" for k in lacking)
    return f"kNN with {asked}: there are only {n_train} training images, and all of them vote"


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, (B, k) each in no particular order; ties go to the lower column."""
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)  # (B, k+1), falling
    threshold = values[:, k - 1 : k]  # (B, 1) the k-th largest
    # topk takes any of the columns that tie at the threshold; only rows where one is left out are done again.
    tied = (values[:, k:] == threshold).any(1)  # (B,)
    values, columns = values[:, :k], columns[:, :k]
    if tied.any():
        rows, threshold = similarity[tied], threshold[tied]
        above, equal = rows > threshold, rows == threshold  # (B', N_train)
        room = k - above.sum(1, keepdim=True)  # (B', 1)
        chosen = above | (equal & (equal.cumsum(1) <= room))  # (B', N_train), exactly k in each row
        columns[tied] = chosen.nonzero()[:, 1].view(-1, k)  # (B', k)
        values[tied] = rows.gather(1, columns[tied])  # (B', k)
    return values, columns


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, n_classes: int) -> None:
    n_train = len(train_features)
    if n_train == 0 or train_labels.shape != (n_train,) or train_features.shape[1:] != test_features.shape[1:]:
        raise ValueError(
            f"expected train_features (N, D) with N > 0, train_labels (N,) and test_features (M, D), got "
            f"{tuple(train_features.shape)}, {tuple(train_labels.shape)} and {tuple(test_features.shape)}"
        )
    if n_classes < 2:
        raise UserError("kNN tells classes apart, and there is only one: give a data set with two classes or more")
    if train_labels.min() < 0 or train_labels.max() >= n_classes:
        raise ValueError(f"train_labels run from {train_labels.min()} to {train_labels.max()}; n_classes={n_classes}")
    for name, features in (("train_features", train_features), ("test_features", test_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
