"""Points and thumbnails stand where they belong."""

import numpy as np
import pytest
import torch

from plots.scatter import CELLS, PANEL, TILE, TOP, Cloud, fitted_points, scatter_image, thumbnail_map
from plots.style import CATEGORIES, category


def test_points_keep_their_proportions_in_the_square():
    points = fitted_points(torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.0, 5.0]]))
    assert points.amin() >= 0 and points.amax() <= 1
    across, up = points[1] - points[0], points[2] - points[1]
    assert across[0] == pytest.approx(0.92) and across[1] == 0 and up[1] == pytest.approx(-0.46)  # y downwards
    assert fitted_points(torch.ones(3, 2)).tolist() == [[0.5, 0.5]] * 3


def test_a_dot_has_the_color_of_its_class():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.5], [0.5, 0.5], [0.7, 0.5]])
    labels = torch.tensor([0, 1, 3, 0, 1, 3])  # each class's name covers one of its dots at most
    image = np.asarray(scatter_image([Cloud("a", "b", points)], labels, list("wxyz"), "title"))
    for (x, y), label in (((0.0, 0.0), 0), ((1.0, 1.0), 1), ((0.7, 0.5), 3)):
        at = round(24 + (0.04 + 0.92 * x) * PANEL), round(TOP + (0.96 - 0.92 * y) * PANEL)
        near = image[at[1] - 8 : at[1] + 9, at[0] - 8 : at[0] + 9].reshape(-1, 3).astype(int)
        assert np.abs(near - category(label)).sum(1).min() < 12


@pytest.mark.parametrize("classes", [1, 2, 40])
def test_one_class_and_many(classes):
    labels = torch.arange(80) % classes
    image = scatter_image(
        [Cloud("PCA", "", torch.randn(80, 2))] * 2, labels, [f"class {i}" for i in range(classes)], "t"
    )
    assert image.width > 2 * PANEL and PANEL < image.height < 1000


def test_in_each_cell_stands_the_image_nearest_to_its_center():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.51, 0.49], [0.517, 0.483]])  # the last two in one cell
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8) * 50
    sheet = np.asarray(thumbnail_map(points, images, "title"))
    place = fitted_points(points) * CELLS
    for i in (0, 1, 3):
        x, y = (24 + int(place[i, 0]) * TILE + TILE // 2, 62 + int(place[i, 1]) * TILE + TILE // 2)
        assert (sheet[y, x] == 50 * i).all()
    assert place[2].long().tolist() == place[3].long().tolist()


def test_colors_repeat_after_three_turns():
    colors = [category(i) for i in range(3 * len(CATEGORIES))]
    assert len({*colors}) == len(colors) and category(len(colors)) == colors[0] == CATEGORIES[0]
