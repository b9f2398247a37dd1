"""Whose robustness is measured: a backbone's kNN, a classifier or an anomaly detector, each with the same contract.

`look(loader, text) -> Observed` of all images, equal on all ranks; `numbers(observed)` are its metrics, of which
`error` is what the curves and the mCE are made of, and `measure` says what it is; `decisions(observed)` are the images'
classes or verdicts, None without a threshold.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loading import Loader
from evaluation.anomaly.bootstrap import with_intervals
from evaluation.anomaly.detection import alarms, examine_set
from evaluation.anomaly.thresholds import binomial_interval
from evaluation.features import extract
from evaluation.inspect.changed import Changed
from evaluation.knn import KNN_SETTINGS, knn_scores
from models.anomaly.detector import Detector
from models.classifier import Classifier

Images = Loader | Changed
Context = Callable[[], AbstractContextManager]


class Observed(NamedTuple):
    """What a network says of N images, in data set order."""

    scores: Tensor  # (N, C) of classes, or (N,) how anomalous they are
    embeddings: Tensor | None  # (N, D); None of a detector
    labels: Tensor  # (N,)


class Neighbors:
    """DINO's kNN, k = 20, on the features of a backbone."""

    kind, measure = "knn", "1 - top-1 of kNN"

    def __init__(self, backbone: nn.Module, bank: tuple[Tensor, Tensor], n_classes: int):
        self.backbone, self.bank, self.n_classes = backbone, bank, n_classes

    def look(self, loader: Images, text: str) -> Observed:
        features, labels = extract(self.backbone, loader, progress=text)
        scores = knn_scores(*self.bank, features, **KNN_SETTINGS[0], n_classes=self.n_classes)
        return Observed(scores, features, labels)

    def numbers(self, observed: Observed) -> dict[str, Any]:
        return class_errors(observed)

    def decisions(self, observed: Observed) -> Tensor | None:
        return observed.scores.argmax(1)


class Both(nn.Module):
    """Images (B, 3, H, W), normalized, -> features and logits of a classifier side by side, (B, D + C)."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier, self.normalization = classifier, classifier.normalization

    def forward(self, x: Tensor) -> Tensor:
        features = self.classifier.backbone(x)
        return torch.cat([features.float(), self.classifier.head(features).float()], dim=1)


class Trained:
    """A classifier with its own head. `columns` (C,): which logit is that of the data set's first class, and so on."""

    kind, measure = "classifier", "1 - top-1"

    def __init__(self, classifier: Classifier, columns: list[int], context: Context):
        self.network, self.columns, self.context = Both(classifier), columns, context

    def look(self, loader: Images, text: str) -> Observed:
        with self.context():
            rows, labels = extract(self.network, loader, progress=text)
        width = rows.shape[1] - len(self.columns)
        return Observed(rows[:, width:][:, self.columns], rows[:, :width], labels)

    def numbers(self, observed: Observed) -> dict[str, Any]:
        return class_errors(observed)

    def decisions(self, observed: Observed) -> Tensor | None:
        return observed.scores.argmax(1)


class Detecting:
    """An anomaly detector with the threshold that its run stored."""

    kind, measure = "detector", "1 - image AUROC"

    def __init__(self, detector: Detector, threshold: float | None, context: Context, seed: int):
        self.detector, self.threshold, self.context, self.seed = detector, threshold, context, seed

    def look(self, loader: Images, text: str) -> Observed:
        with self.context():
            found = examine_set(self.detector, loader, text)
        return Observed(found.scores, None, loader.dataset.labels)

    def numbers(self, observed: Observed) -> dict[str, Any]:
        """Image AUROC with its interval, and the rates of alarms at the threshold among good and defective images."""
        scores, labels = observed.scores, observed.labels
        measured = with_intervals(scores, labels, None, None, seed=self.seed)
        auroc, ends = measured["image_auroc"], measured["image_auroc_interval"]
        rates = alarms(scores, labels, self.threshold)
        false, good = rates["observed_false_alarms"], int((labels == 0).sum())
        return {
            "error": None if auroc is None else 1 - auroc,
            "error_interval": None if ends is None else [1 - ends[1], 1 - ends[0]],
            "image_auroc": auroc,
            "false_alarms": false,
            "false_alarms_interval": None if false is None else list(binomial_interval(round(false * good), good)),
            "detections": rates["observed_detections"],
        }

    def decisions(self, observed: Observed) -> Tensor | None:
        return None if self.threshold is None else observed.scores > self.threshold


Subject = Neighbors | Trained | Detecting
SUBJECTS: dict[str, type[Subject]] = {kind.kind: kind for kind in (Neighbors, Trained, Detecting)}


def class_errors(observed: Observed) -> dict[str, Any]:
    """The share of images whose likeliest class is wrong, with its interval."""
    wrong, n = int((observed.scores.argmax(1) != observed.labels).sum()), len(observed.labels)
    return {"error": wrong / n, "error_interval": list(binomial_interval(wrong, n))}


def cosine(first: Observed, second: Observed) -> float | None:
    """Mean cosine of the embeddings of the same images."""
    if first.embeddings is None or second.embeddings is None:
        return None
    return float(F.cosine_similarity(first.embeddings.double(), second.embeddings.double()).mean())


def changed_share(first: Tensor | None, second: Tensor | None) -> float | None:
    """Share of the images whose decision is another one."""
    return None if first is None or second is None else float((first != second).double().mean())
