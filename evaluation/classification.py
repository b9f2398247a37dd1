"""Classification metrics from scores and labels."""

import torch
from torch import Tensor

MOST_CONFUSED = 10  # pairs listed in a report


def confusion_matrix(predictions: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Counts (C, C) int64, rows the truth and columns the prediction; predictions and labels (N,) in [0, C)."""
    pairs = labels * n_classes + predictions  # (N,)
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)  # (C, C)


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

    own = scores.gather(1, labels[:, None])  # (N, 1)
    lower = torch.arange(n_classes, device=labels.device) < labels[:, None]  # (N, C) columns that win a tie
    rank = ((scores > own) | ((scores == own) & lower)).sum(1)  # (N,) 0: the prediction is right
    candidate = own[:, 0] > -torch.inf  # (N,)

    matrix = confusion_matrix(scores.argmax(1), labels, n_classes).cpu()  # (C, C)
    hits, of_truth, of_prediction = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)  # (C,) each
    recall = hits / of_truth.clamp(min=1)
    precision = hits / of_prediction.clamp(min=1)
    f1 = 2 * hits / (of_truth + of_prediction).clamp(min=1)
    present = of_truth > 0  # (C,)

    per_class = {}
    for i, name in enumerate(classes):
        metrics = {"accuracy": recall, "precision": precision, "f1": f1}
        metrics = {key: float(values[i]) if present[i] else None for key, values in metrics.items()}
        per_class[name] = {"n_test": int(of_truth[i]), **metrics}
    return {
        "n_test": n_test,
        "top1": float((rank < 1).double().mean()),
        "top5": float((candidate & (rank < 5)).double().mean()) if n_classes > 5 else None,
        "balanced_accuracy": float(recall[present].mean()),
        "macro_precision": float(precision[present].mean()),
        "macro_recall": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
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
