"""Which classes are taken for which, drawn: the confusion matrix, and test images of the most confused pairs."""

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.dataset import Dataset
from evaluation.classification import confusion_matrix, most_confused
from plots.confusion import Confused, confused_sheet, confusion_image
from plots.heatmaps import save
from runtime.log import Log

SHOWN = 5  # images of a pair


def draw_confusion(log: Log, scores: Tensor, labels: Tensor, dataset: Dataset, classes: list[str]) -> None:
    """Write confusion.png and confused.png into the run folder, and both to TensorBoard; rank 0 writes.

    Args:
        scores: (N, C) of the images of `dataset`, in its order.
        labels: (N,) int64.
    """
    if not log.writer:
        return
    matrix = confusion_matrix(scores.argmax(1), labels, len(classes)).cpu()
    drawn = {
        "confusion": confusion_image(matrix, classes),
        "confused": confused_sheet(confused_pairs(scores, labels, matrix, dataset, classes), len(labels)),
    }
    for name, image in drawn.items():
        save(image, log.folder / f"{name}.png")
        log.image(name, pil_to_tensor(image))


def confused_pairs(
    scores: Tensor, labels: Tensor, matrix: Tensor, dataset: Dataset, classes: list[str]
) -> list[Confused]:
    """The pairs of `most_confused`, each with the `SHOWN` images whose predicted class has the highest score over the
    true one's (ties: the first images)."""
    scores, labels, number = scores.cpu(), labels.cpu(), {name: i for i, name in enumerate(classes)}
    predicted, pairs = scores.argmax(1), []
    for pair in most_confused(matrix, classes):
        truth, wrong = number[pair["truth"]], number[pair["predicted"]]
        mistaken = ((labels == truth) & (predicted == wrong)).nonzero()[:, 0]  # (count,)
        margin = scores[mistaken, wrong] - scores[mistaken, truth]  # (count,) inf where kNN gave the truth no vote
        first = mistaken[torch.argsort(margin, descending=True, stable=True)][:SHOWN].tolist()
        images = [(dataset.names[i], dataset.image(i)) for i in first]
        pairs.append(Confused(pair["truth"], pair["predicted"], pair["count"], pair["share"], images))
    return pairs
