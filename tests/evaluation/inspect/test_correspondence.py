"""Mutual nearest patches against loops, places between files and inputs, and matches whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.geometry import Geometry
from evaluation.inspect.correspondence import (
    cosine_map,
    found_in_mirror,
    mutual_matches,
    nearest_patches,
    patches,
    places_of,
    spread,
    to_input_point,
)


def by_loop(a, b):
    """Pairs (i, j) of rows that are each other's nearest, ties to the lowest number."""
    there = [max(range(len(b)), key=lambda j: (float(x.double() @ b[j].double()), -j)) for x in a]
    back = [max(range(len(a)), key=lambda i: (float(y.double() @ a[i].double()), -i)) for y in b]
    return there, {(i, j) for i, j in enumerate(there) if back[j] == i}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (7, 4), (20, 25)])
def test_mutual_matches_are_a_loop(p, q, tied):
    a, b = F.normalize(torch.randn(p, 6), dim=1), F.normalize(torch.randn(q, 6), dim=1)
    if tied:  # unit vectors along axes: every cosine is 0, 1 or -1
        a, b = (torch.eye(3)[torch.randint(3, (n,))] * torch.randint(2, (n, 1)).mul(2).sub(1) for n in (p, q))
    there, pairs = by_loop(a, b)
    number, cosine = nearest_patches(a, b)
    assert number.tolist() == there
    torch.testing.assert_close(cosine, (a * b[number]).sum(1), atol=1e-6, rtol=1e-5)
    found = mutual_matches(a, b)
    assert set(zip(found.first.tolist(), found.second.tolist())) == pairs and len(found.first) == len(pairs) >= 1
    assert (found.cosine.diff() <= 0).all()


def test_a_shifted_image_is_found_again():
    maps = torch.randn(5, 6, 8)
    found = mutual_matches(patches(maps), patches(maps.roll(2, 2)))
    assert len(found.first) == 48
    assert torch.equal(found.second, (found.first // 8) * 8 + (found.first % 8 + 2) % 8)
    torch.testing.assert_close(cosine_map(maps.roll(2, 2), maps[:, 3, 1])[3, 3], torch.tensor(1.0))
    assert int(cosine_map(maps.roll(2, 2), maps[:, 3, 1]).argmax()) == 3 * 8 + 3


class Pixels(nn.Module):
    """Every block of 4 x 4 pixels is a patch, and its mean color the feature, or the column where it lies."""

    normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, by_column=False):
        super().__init__()
        self.by_column = by_column

    def forward(self, x):
        maps = F.avg_pool2d(x, 4)
        if self.by_column:
            angle = torch.arange(maps.shape[3]) / maps.shape[3] * 3
            return torch.stack([angle.cos(), angle.sin()])[None, :, None].expand(len(x), 2, *maps.shape[2:])
        return maps


def test_in_the_mirror_every_patch_of_its_own_color_is_found():
    image = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert found_in_mirror(Pixels(), image) > 0.97  # a color may nearly be another's multiple
    assert found_in_mirror(Pixels(by_column=True), image) < 0.2  # the place, not what is there: wrong but in the middle
    uniform = torch.full((3, 24, 40), 90, dtype=torch.uint8)
    assert found_in_mirror(Pixels(), uniform) < 0.2  # ties: the first patch for all


def test_one_line_of_each_square():
    places = torch.tensor([[1.0, 1.0], [9.0, 9.0], [2.0, 3.0], [1.0, 12.0], [8.0, 7.9]])
    assert spread(places, 10).tolist() == [0, 3]
    assert spread(places, 4).tolist() == [0, 1, 3, 4]
    assert spread(places[:0], 4).tolist() == []


@pytest.mark.parametrize("geometry", [Geometry(32, 48), Geometry(32, 48, "pad"), Geometry(32, 48, "crop", 60)])
@pytest.mark.parametrize("size", [(100, 70), (30, 90)])
def test_points_of_the_file_and_of_the_input(geometry, size):
    for point in ((10.0, 20.5), (0.0, 0.0), (29.0, 69.0)):
        y, x = to_input_point(point, geometry, size)
        back = geometry.to_original_point(torch.tensor([[y, x]], dtype=torch.float64), torch.tensor([size]))
        torch.testing.assert_close(back[0], torch.tensor(point, dtype=torch.float64))


def test_patches_are_numbered_row_by_row():
    places = places_of(torch.tensor([0, 5, 11]), (3, 4), Geometry(24, 64))
    assert places.tolist() == [[4.0, 8.0], [12.0, 24.0], [20.0, 56.0]]
