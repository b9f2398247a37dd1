"""Images beside their views."""

import numpy as np
import pytest
import torch

from plots.sheets import view_sheets


def tile(sheet, row, column):
    y, x = 88 + 216 * row, 24 + 216 * column
    return np.asarray(sheet)[y : y + 208, x : x + 208]


def test_a_row_for_each_image_and_a_column_for_each_view():
    """Every image and view is of one shade, by its number."""
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 10, 10) * 20
    sizes = [12, 12, 12, 8, 8]
    views = [(images[:, :, :1, :1] + 1 + v).expand(6, 3, size, size) / 255 for v, size in enumerate(sizes)]
    sheets = view_sheets(images, views)
    assert list(sheets) == [
        "images 1-4, views 1-3 of 5",
        "images 1-4, views 4-5 of 5",
        "images 5-6, views 1-3 of 5",
        "images 5-6, views 4-5 of 5",
    ]
    for (first, start), (rows, columns), sheet in zip(
        [(0, 0), (0, 3), (4, 0), (4, 3)], [(4, 3), (4, 2), (2, 3), (2, 2)], sheets.values()
    ):
        assert sheet.size == (48 + (columns + 1) * 216 - 8, 88 + rows * 216 - 8 + 24)
        for row in range(rows):
            assert (tile(sheet, row, 0) == 20 * (first + row)).all()
            for column in range(columns):
                assert (tile(sheet, row, 1 + column) == 20 * (first + row) + 1 + start + column).all()


@pytest.mark.parametrize(("n", "v"), [(1, 1), (4, 3), (8, 10)])
def test_few_and_many(n, v):
    sheets = view_sheets(torch.zeros(n, 3, 9, 9, dtype=torch.uint8), [torch.rand(n, 3, 5, 7)] * v)
    assert len(sheets) == -(-n // 4) * -(-v // 3)
    assert all(sheet.width <= 920 and sheet.height <= 970 for sheet in sheets.values())  # readable at once
