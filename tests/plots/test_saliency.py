"""Sheets of saliency maps."""

import numpy as np
import torch

from plots.saliency import CAPTION, HEADING, SIDE, TOP, Panel, Row, saliency_sheet
from plots.style import ABOVE, TRUE_DEFECT


def tile(sheet, row, column, side_by_side=0):
    y, x = TOP + HEADING + row * (HEADING + SIDE + CAPTION), 24 + side_by_side + column * (SIDE + 8)
    return np.asarray(sheet)[y : y + SIDE, x : x + SIDE]


def test_an_image_beside_its_maps():
    image = torch.full((3, 20, 20), 120, dtype=torch.uint8)
    heat, part, mask = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    heat[0, 0], part[2:, 2:], mask[:, 10:] = 1, True, True
    rows = [Row(image, None, "a", [], [Panel(heat, part, ["x", "y", "z"]), Panel(torch.ones(2, 2), None, [])])]
    rows.append(Row(image, mask, "b", ["one"], [Panel(heat, None, ["x"])]))
    sheet = saliency_sheet(rows, "title", ["one", "two"])
    assert (tile(sheet, 0, 0) == 120).all() and (tile(sheet, 0, 2) == 120).all()  # a constant map leaves it bare
    first = tile(sheet, 0, 1)
    assert (
        first[4, 4].tolist() != [120] * 3 and (first == ABOVE).all(2).any() and not (first == TRUE_DEFECT).all(2).any()
    )
    beside = 3 * (SIDE + 8) + 16  # two rows fit side by side
    second = tile(sheet, 0, 1, beside)
    assert (second == TRUE_DEFECT).all(2).any() and (tile(sheet, 0, 0, beside) == TRUE_DEFECT).all(2).any()
    assert sheet.size == (48 + 2 * beside, TOP + HEADING + SIDE + CAPTION + 24)


def test_many_panels_stand_below_each_other():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    rows = [Row(image, None, str(i), [], [Panel(torch.rand(2, 2), None, ["head"])] * 14) for i in range(2)]
    sheet = saliency_sheet(rows, "title", [])
    assert sheet.width == 48 + 15 * (SIDE + 8) + 16 and sheet.height == TOP + 2 * (HEADING + SIDE + CAPTION) + 24
