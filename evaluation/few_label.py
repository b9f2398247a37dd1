"""What a backbone's features are worth when only a few images of each class have a label."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.knn import KNN_SETTINGS, knn_accuracy
from evaluation.logistic import logistic_probe

LABELS = (1, 2, 5, 10, 20)  # per class
DRAWS = 5


def draw(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Positions, ascending, of `per_class` random images of each class, or of all where a class has no more.

    A draw of more images has those of one of fewer, by the same seed, in it.

    Args:
        labels: (N,) int64.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels.cpu()[order]
    earlier = torch.empty_like(labels)  # images of the same class before this one
    for label in labels.unique():
        own = labels == label
        earlier[own] = torch.arange(int(own.sum()))
    return order[earlier < per_class].sort().values


def few_label(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    n_classes: int,
    per_class: Sequence[int] = LABELS,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[dict]:
    """kNN and logistic regression with 1, 2, 5, ... labels per class, over several draws of the labeled images.

    As in DINOv2's kNN (n_per_class_list, n_tries). Test images and features are the same in all draws, so the
    deviation is that of the choice of labels.

    Args:
        train: features (N, D) and labels (N,), of which some are drawn.
        test: features (M, D) and labels (M,), all of which are classified.

    Returns:
        For each number: {"per_class", "n_labeled", "<measure>_top1": mean over the draws, "<measure>_top1_std": their
        standard deviation (N - 1; None of one draw), "<measure>_top1_draws"}, of measures knn (k = 20, T = 0.07;
        fewer images all vote) and logistic (`logistic_probe`).
    """
    rows = []
    for count in per_class:
        chosen = [draw(train[1], count, seed + number).to(train[1].device) for number in range(draws)]
        top1: dict[str, list[float]] = {"knn": [], "logistic": []}
        for one in chosen:
            about = (train[0][one], train[1][one], test[0])
            top1["knn"].append(knn_accuracy(*about, test_labels=test[1], n_classes=n_classes, **KNN_SETTINGS[0]))
            logits, _ = logistic_probe(*about, n_classes=n_classes, seed=seed)
            top1["logistic"].append(float((logits.argmax(1) == test[1]).double().mean()))
        row = {"per_class": count, "n_labeled": len(chosen[0])}
        for name, values in top1.items():
            spread = float(torch.tensor(values).double().std()) if draws > 1 else None
            row |= {f"{name}_top1": sum(values) / draws, f"{name}_top1_std": spread, f"{name}_top1_draws": values}
        rows.append(row)
    return rows
