"""Colors that mean different things look different to everyone, over everything they are drawn on."""

from itertools import combinations

import numpy as np
import pytest

from plots.heatmaps import INFERNO
from plots.style import ABOVE, ALARM, CATEGORIES, PAPER, PEAK, RIGHT, RIM, TRUE_DEFECT, USUAL, WRONG

# Machado et al. 2009, table 1, severity 1: what dichromats see, of linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colors, seen):
    """CIE 1976 L*a*b* under D65 of sRGB in 0..255, (..., 3)."""
    c = np.asarray(colors, float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.asarray(seen).T, 0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    t = xyz / [0.9505, 1.0, 1.089]
    x, y, z = np.moveaxis(np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def difference(one, other, seen):
    return np.linalg.norm(lab(one, seen) - lab(other, seen), axis=-1)


@pytest.mark.parametrize("vision", VISION)
def test_marks_of_one_kind_of_image_differ(vision):
    """A difference of 2.3 is just noticeable side by side; thin lines need ten times that."""
    for group in ([TRUE_DEFECT, ABOVE, PEAK, RIM], [USUAL, ALARM, PAPER], [RIGHT, WRONG, PAPER], [TRUE_DEFECT, RIGHT]):
        for one, other in combinations(group, 2):
            assert difference(one, other, VISION[vision]) > 28, (one, other)


@pytest.mark.parametrize("vision", VISION)
def test_the_true_defect_lies_neither_on_the_heat_map_nor_on_grey(vision):
    share = np.linspace(0, 1, 65)[:, None]  # of the ramp
    ramp = np.stack([np.interp(8 * share[:, 0], np.arange(9), INFERNO[:, i].numpy()) for i in range(3)], 1)
    for grey in range(0, 256, 15):
        blended = (1 - 0.85 * share) * grey + 0.85 * share * ramp
        assert difference(TRUE_DEFECT, blended, VISION[vision]).min() > 28
        for mark in (ABOVE, PEAK):  # the mark, or the rim that goes with it
            seen = np.maximum(difference(mark, blended, VISION[vision]), difference(RIM, blended, VISION[vision]))
            assert seen.min() > 28


@pytest.mark.parametrize("vision", VISION)
def test_classes_and_clusters_look_different_from_each_other_and_from_paper(vision):
    for one, other in combinations((*CATEGORIES, PAPER), 2):
        assert difference(one, other, VISION[vision]) > 14, (one, other)
