"""The images of the most confused pairs, chosen and drawn."""

import numpy as np
import pytest
import torch

from evaluation.classification import confusion_matrix
from evaluation.confused import confused_pairs
from plots.confusion import THUMBNAIL, Confused, confused_sheet


class Shades:
    """Image i is of shade 10 i."""

    def __init__(self, count):
        self.names = [f"class/{i}.png" for i in range(count)]

    def image(self, i):
        return torch.full((3, 20, 30), 10 * i, dtype=torch.uint8)


def test_the_most_certain_mistakes_come_first():
    """Ties: the first images; kNN's image without a vote for the truth is the most certain."""
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2, 1])
    scores = torch.zeros(10, 3)
    scores[:7, 1] = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.5, 0.0, 0.25])  # the sixth is right, by the lower index
    scores[2, 0] = -torch.inf
    scores[7, 1], scores[8, 2] = 1, 1
    scores[9, 2] = 1
    matrix = confusion_matrix(scores.argmax(1), labels, 3)
    first, second = confused_pairs(scores, labels, matrix, Shades(10), ["a", "b", "c"])
    assert (first.truth, first.predicted, first.count, first.share) == ("a", "b", 6, 6 / 7)
    assert [name for name, _ in first.images] == [f"class/{i}.png" for i in (2, 1, 3, 0, 4)]
    assert [int(image[0, 0, 0]) for _, image in first.images] == [20, 10, 30, 0, 40]
    assert (second.truth, second.predicted, [name for name, _ in second.images]) == ("b", "c", ["class/9.png"])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_sheet_shows_each_image_whole(count):
    sizes = [(20, 30), (30, 20), (1, 300), (140, 140), (400, 400)]
    images = [(f"{'long/' * i}ü{i}.png", torch.full((3, *sizes[i]), 40 * i, dtype=torch.uint8)) for i in range(count)]
    pairs = [Confused("a" * 80, "Öl", 7, 0.001, images)] * (2 if count else 0)
    sheet = np.asarray(confused_sheet(pairs, 12))
    assert sheet.shape[1] <= 1100
    for row in range(len(pairs)):
        for i, (height, width) in enumerate(sizes[:count]):
            y, x = 92 + row * (THUMBNAIL + 56), 24 + 230 + i * (THUMBNAIL + 16)
            longer = max(height, width)
            high, wide = max(1, round(height * THUMBNAIL / longer)), max(1, round(width * THUMBNAIL / longer))
            assert (sheet[y : y + high, x : x + wide] == 40 * i).all()
            assert (sheet[y : y + high, x + wide : x + wide + 8] == 255).all()
