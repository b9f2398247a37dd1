"""Where things are drawn: the colors of a known surface, lines where it crosses a level, marks; triangles."""

import numpy as np
import pytest
import torch

from plots.bars import SHADES
from plots.heatmaps import INFERNO, MARGIN
from plots.landscape import (
    HIGH,
    LEFT,
    PLOT,
    TOP,
    UNKNOWN,
    WIDE,
    Landscape,
    Scale,
    contour_image,
    curve_image,
    surface,
)


def bowl(name: str = "a", low: float = 0.1, power: float = 3.0, marks=((0.0, 0.0, ""),)) -> Landscape:
    """low at the center, rising with the distance in decades."""
    axis = torch.linspace(-1, 1, 21, dtype=torch.float64)
    loss = low * 10 ** (power * (axis[:, None] ** 2 + axis**2) / 2)
    return Landscape(name=name, note="", x=axis, y=axis, loss=loss, marks=[*marks])


def line(loss: list[float], name: str = "a") -> Landscape:
    x = torch.linspace(0, 1, len(loss), dtype=torch.float64)
    values = torch.tensor(loss, dtype=torch.float64)
    return Landscape(name=name, note="", x=x, y=None, loss=values, marks=[(0.0, 0.0, "")])


def pixel(image, x: float, y: float, column: int = 0) -> tuple:
    """Of the plot, x and y in [-1, 1]."""
    left = LEFT + column * (LEFT + PLOT + MARGIN)
    return image.getpixel((round(left + (x + 1) / 2 * PLOT), round(TOP + (1 - y) / 2 * PLOT)))


def test_dark_is_low_pale_is_high_and_the_cross_is_the_run():
    image = contour_image([bowl()], "x", "y")
    assert pixel(image, 0, 0) == (255, 255, 255)  # the cross
    darkness = [sum(pixel(image, at, at)) for at in (0.1, 0.42, 0.72, 0.97)]
    assert darkness == sorted(darkness) and darkness[0] < 30
    assert np.abs(np.array(pixel(image, 0.99, 0.99)) - INFERNO[-1].numpy()).max() < 30


def test_y_is_upwards_and_x_to_the_right():
    slope = bowl()
    slope.loss = slope.x[None] + 3 * slope.x[:, None] + 5.0
    image = contour_image([slope], "x", "y")
    sums = [sum(pixel(image, *at)) for at in ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9))]
    assert sums == sorted(sums) and len({*sums}) == 4


def test_several_are_on_one_scale():
    """The second, ten times as high, is drawn in the colors of the first where their losses are equal."""
    scale = Scale([bowl().loss, bowl(low=1.0, power=2.0).loss])
    assert scale.is_log and (scale.low, scale.high) == pytest.approx((0.1, 100))
    image = contour_image([bowl(), bowl("b", 1.0, 2.0)], "x", "y")
    alone = contour_image([bowl("b", 1.0, 2.0)], "x", "y")
    corner, both = np.array(pixel(image, 0.3, 0.3, 1)), np.array(pixel(alone, 0.3, 0.3))
    assert (corner > both).any()
    at = (2 / 3) ** 0.5  # of the first, where its loss is 10; the second's is 10 at 0.5 ** 0.5
    away = np.array(pixel(image, at - 0.02, at - 0.02)).astype(int) - np.array(pixel(image, 0.687, 0.687, 1))
    assert np.abs(away).max() < 12


def test_lines_lie_where_the_loss_crosses_a_level():
    image = contour_image([bowl()], "x", "y")
    level = [value for value, _ in Scale([bowl().loss]).levels()]
    assert level[0] == pytest.approx(0.1) and 1.0 in level and level[-1] == pytest.approx(100)
    row = np.array(image.convert("L"))[TOP + PLOT // 2 + 60]  # below the cross
    found = np.abs(np.diff(row[LEFT + 2 : LEFT + PLOT - 2].astype(int))) > 40
    y = 60 / PLOT * 2
    for value in (0.2, 0.5, 1.0):
        x = (2 * np.log10(value / 0.1) / 3 - y**2) ** 0.5
        near = np.flatnonzero(found) / PLOT * 2 - 1
        assert np.abs(near - x).min() < 0.03 and np.abs(near + x).min() < 0.03


def test_what_is_no_number_is_grey_and_ends_a_curve():
    broken = bowl()
    broken.loss[-4:, -4:] = torch.nan
    broken.loss[0, 0] = torch.inf
    image = contour_image([broken], "x", "y")
    assert pixel(image, 0.97, 0.97) == pixel(image, -0.99, -0.99) == UNKNOWN
    image = curve_image([line([1.0, 2.0, float("nan"), float("nan"), 2.0, 1.0])], "x")
    top, left = 40 + 26, LEFT + MARGIN
    drawn = (np.asarray(image)[top + 2 : top + HIGH - 2, left + 2 : left + WIDE - 2] == SHADES[0]).all(-1).any(0)
    gap = np.flatnonzero(~drawn)
    assert len(gap) == pytest.approx(0.6 * WIDE, abs=8) and gap[0] == pytest.approx(0.2 * WIDE, abs=6)


def test_scales():
    assert not Scale([torch.tensor([1.0, 9.0])]).is_log and Scale([torch.tensor([1.0, 10.0])]).is_log
    assert not Scale([torch.tensor([0.0, 10.0])]).is_log
    flat = Scale([torch.full((3,), 2.0)])
    assert flat.share(torch.tensor([2.0])).tolist() == pytest.approx([0.5]) and flat.levels()
    nothing = Scale([torch.tensor([float("nan")])])
    assert (nothing.low, nothing.high) == (0, 1)
    values = torch.tensor([0.5, 5.0, 50.0, float("inf")])
    assert Scale([values]).share(values).tolist()[:3] == pytest.approx([0, 0.5, 1])
    assert curve_image([line([1.0, 1.0, 1.0])], "x") and contour_image([bowl(power=0.0)], "x", "y")


def test_more_than_three_take_another_row():
    one, four = (contour_image([bowl(str(i)) for i in range(count)], "x", "y") for count in (1, 4))
    assert four.height == 2 * one.height and four.width == one.width + 2 * (LEFT + PLOT + MARGIN)


def test_a_surface_covers_its_square_in_triangles():
    made = bowl()
    made.loss = made.loss[:5, :7]
    vertices, colors, faces = surface(made, Scale([made.loss]))
    assert vertices.shape == colors.shape == (35, 3) and faces.shape == (2 * 4 * 6, 3)
    assert torch.equal(vertices[:, 1].argsort(stable=True), made.loss.flatten().argsort(stable=True))
    corners = vertices[faces.long()][..., [0, 2]]  # (F, 3, 2)
    (ax, ay), (bx, by) = ((corners[:, i] - corners[:, 0]).T for i in (1, 2))
    areas = (ax * by - ay * bx).abs() / 2
    front, back = vertices[:7], vertices[-7:]  # the lowest and the highest y
    assert (
        (front[:, 2] == 1).all() and (back[:, 2] == -1).all() and front[:, 0].tolist() == sorted(front[:, 0].tolist())
    )
    assert float(areas.sum()) == pytest.approx(4) and float(areas.min()) == pytest.approx(float(areas.max()))


def test_a_surface_has_no_more_vertices_than_tensorboard_can_number():
    axis = torch.linspace(-1, 1, 301, dtype=torch.float64)
    large = Landscape(name="", note="", x=axis, y=axis[:5], loss=axis.expand(5, -1) + 2, marks=[])
    vertices, _, faces = surface(large, Scale([large.loss]))
    assert len(vertices) == 5 * 151 and int(faces.max()) == len(vertices) - 1
