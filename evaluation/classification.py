"""Classification metrics from scores and labels."""

from typing import Literal

import torch
from torch import Tensor

MOST_CONFUSED = 10  # pairs listed in a report
Average = Literal["macro", "micro", "weighted"]


def confusion_matrix(predictions: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Counts (C, C) int64, rows the truth and columns the prediction; predictions and labels (N,) in [0, C)."""
    pairs = labels * n_classes + predictions  # (N,)
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)  # (C, C)


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) int64: how many classes come before an image's own, 0 where the prediction is right and C where its own is
    no candidate (-inf). Equal scores are settled for the lowest class index; scores (N, C), labels (N,)."""
    n_classes = scores.shape[1]
    own = scores.gather(1, labels[:, None])  # (N, 1)
    lower = torch.arange(n_classes, device=labels.device) < labels[:, None]  # (N, C) columns that win a tie
    rank = ((scores > own) | ((scores == own) & lower)).sum(1)  # (N,)
    return rank.where(own[:, 0] > -torch.inf, n_classes)


def precision_recall_f1(hits: Tensor, of_truth: Tensor, of_prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of counts in float64: right predictions, images of the class, predictions of it. What has no images or is never
    predicted has zero (zero_division=0)."""
    precision, recall = hits / of_prediction.clamp(min=1), hits / of_truth.clamp(min=1)
    return precision, recall, 2 * hits / (of_truth + of_prediction).clamp(min=1)


def averaged(hits: Tensor, of_truth: Tensor, of_prediction: Tensor, average: Average) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 over the classes that have images: scikit-learn's with `labels=` these classes and
    zero_division=0.

    Args:
        hits: (..., C) float64, right predictions of each class.
        of_truth: (C,) float64, its images.
        of_prediction: (..., C) float64, predictions of it.
        average: macro: the mean over classes; weighted: that weighted by their images; micro: of the counts of all.

    Returns:
        (...) each.
    """
    present = of_truth > 0  # (C,)
    counts = tuple(count[..., present] for count in (hits, of_truth, of_prediction))
    if average == "micro":
        counts = tuple(count.sum(-1, keepdim=True) for count in counts)
    precision, recall, f1 = precision_recall_f1(*counts)
    if average == "weighted":
        share = counts[1] / counts[1].sum()  # (C',)
        return (precision * share).sum(-1), (recall * share).sum(-1), (f1 * share).sum(-1)
    return precision.mean(-1), recall.mean(-1), f1.mean(-1)


def classification_report(scores: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Every metric of a classification, ready for JSON; shares in [0, 1].

    Equal scores are settled for the lowest class index, in top-1, top-5 and the confusion matrix alike. Macro metrics
    are means over the classes *that have test images*, as scikit-learn's with `labels=` these classes, so that macro
    recall is balanced accuracy. Such a class that is never predicted has precision and F1 zero (zero_division=0); a
    class without test images has None.

    Args:
        scores: (N, C), larger is likelier; -inf for a class that is no candidate (kNN: it got no vote), which is no
            hit at any rank, though official DINO's top-5 counts it.
        labels: (N,) int64 in [0, C).
        classes: the C names.

    Returns:
        n_test, top1, top5 (None for five classes or fewer, where nothing could miss), balanced_accuracy,
        macro_precision, macro_recall, macro_f1;
        per_class: {name: {n_test, accuracy (= recall), precision, f1}};
        classes: the names, and confusion: C rows (truth) of C counts (prediction);
        most_confused: [{truth, predicted, count, share (of the truth's images)}], by falling count.

    Raises:
        ValueError: shapes that do not fit, no image, labels outside [0, C), scores that are NaN or +inf, an image
            without any candidate.
    """
    n_test, n_classes = len(labels), len(classes)
    if scores.shape != (n_test, n_classes) or n_test == 0:
        raise ValueError(f"expected scores (N, {n_classes}) and labels (N,), got {scores.shape} and {labels.shape}")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, outside [0, {n_classes})")
    if not scores.amax(1).isfinite().all():  # NaN, +inf, or nothing but -inf
        raise ValueError("scores hold values that are not finite, or an image has no candidate")

    rank = ranks(scores, labels)  # (N,)
    matrix = confusion_matrix(scores.argmax(1), labels, n_classes).cpu()  # (C, C)
    counts = matrix.diagonal().double(), matrix.sum(1).double(), matrix.sum(0).double()  # (C,) each
    precision, recall, f1 = precision_recall_f1(*counts)
    macro_precision, macro_recall, macro_f1 = map(float, averaged(*counts, "macro"))
    of_truth = matrix.sum(1)

    per_class = {}
    for i, name in enumerate(classes):
        metrics = {"accuracy": recall, "precision": precision, "f1": f1}
        metrics = {key: float(values[i]) if of_truth[i] else None for key, values in metrics.items()}
        per_class[name] = {"n_test": int(of_truth[i]), **metrics}
    return {
        "n_test": n_test,
        "top1": float((rank < 1).double().mean()),
        "top5": float((rank < 5).double().mean()) if n_classes > 5 else None,
        "balanced_accuracy": macro_recall,
        "macro_precision": macro_precision,
        "macro_recall": macro_recall,
        "macro_f1": macro_f1,
        "per_class": per_class,
        "classes": list(classes),
        "confusion": matrix.tolist(),
        "most_confused": most_confused(matrix, classes),
    }


def most_confused(matrix: Tensor, classes: list[str]) -> list[dict]:
    """The `MOST_CONFUSED` largest cells off the diagonal that are not zero, ties in row order; matrix (C, C)."""
    wrong = matrix.clone().fill_diagonal_(0).flatten()  # (C*C,)
    pairs = []
    for cell in wrong.argsort(descending=True, stable=True)[:MOST_CONFUSED].tolist():
        truth, predicted = divmod(cell, len(classes))
        if count := int(wrong[cell]):
            share = count / int(matrix[truth].sum())
            pairs.append({"truth": classes[truth], "predicted": classes[predicted], "count": count, "share": share})
    return pairs
