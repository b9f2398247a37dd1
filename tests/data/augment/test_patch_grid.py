"""PatchGrid against plain loops that cut with slices, where its patches lie, and what its guards do to colors."""

import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as F

from data.augment.patch_grid import DRAWS, LEAST, PatchGrid
from data.augment.random_numbers import uniform
from data.normalize import STD
from runtime.errors import UserError

P, GAP, JITTER = 16, 6, 3
PLAIN = {"size": P, "gap": GAP, "color": "none", "downsample_p": 0.0}
EXTENT = 3 * P + 2 * GAP + 2 * JITTER
COLORS = ("drop", "project", "none")
CELLS = [(row, column) for row in range(3) for column in range(3)]


def raw_images(count: int, size: int = EXTENT + 9) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def pixels(patches: list[torch.Tensor]) -> torch.Tensor:
    """9 x (B, 3, p, p) normalized -> (9, B, 3, p, p) float64 in [0, 1] but for the mean that was subtracted."""
    return torch.stack(patches).double() * torch.tensor(STD).double()[:, None, None]


def places(count: int, size: int, **options) -> torch.Tensor:
    """Top and left of every patch (9, count, 2), found again: rows and columns have each their own random byte."""
    rows, columns = torch.randint(0, 256, (2, size), dtype=torch.uint8)
    image = torch.stack([rows[:, None].expand(size, size), columns.expand(size, size), columns.expand(size, size)])
    patches = pixels(PatchGrid(3, **PLAIN, **options)(image.expand(count, -1, -1, -1), torch.arange(count), 2))
    found = []
    for code, line in ((rows, patches[:, :, 0].mean(3)), (columns, patches[:, :, 1].mean(2))):
        windows = code.double().div(255).unfold(0, P, 1)  # (size - P + 1, P)
        away = (
            (line[..., None, :] - (windows - windows.mean(1, keepdim=True))).abs().amax(-1)
        )  # (9, count, size - P + 1)
        assert away.amin(-1).max() < 1e-5
        found.append(away.argmin(-1))
    return torch.stack(found, dim=-1)


def uniformly(values: torch.Tensor, low: int, high: int) -> bool:
    """Whole numbers from low to high, all about equally often."""
    counts = torch.bincount(values.flatten() - low, minlength=high - low + 1)
    return len(counts) == high - low + 1 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("jitter", [0, JITTER])
def test_patches_equal_slices(jitter):
    """The whole of it without colors, one image and patch at a time, with the documented draws."""
    images, ids = raw_images(5), torch.arange(30, 35)
    ours = torch.stack(PatchGrid(1, **PLAIN, jitter=jitter)(images, ids, 4))
    assert ours.dtype == torch.float32 and ours.shape == (9, 5, 3, P, P)
    room = images.shape[2] - (3 * P + 2 * GAP + 2 * jitter)
    place = uniform((1, 4, 9, ids), 2)
    for cell, (row, column) in enumerate(CELLS):
        numbers = uniform((1, 4, cell, ids), DRAWS)
        for i, image in enumerate(images):
            top, left = (int(u * (room + 1)) for u in place[i].tolist())
            top += row * (P + GAP) + int(numbers[i, 0] * (2 * jitter + 1))
            left += column * (P + GAP) + int(numbers[i, 1] * (2 * jitter + 1))
            patch = image[:, top : top + P, left : left + P].double() / 255
            patch = (patch - patch.mean((1, 2), keepdim=True)) / torch.tensor(STD)[:, None, None]
            torch.testing.assert_close(ours[cell, i].double(), patch, atol=2e-6, rtol=0)


def test_without_jitter_the_cells_are_a_grid_at_a_uniform_place():
    size = EXTENT - 2 * JITTER + 7
    corners = places(2000, size, jitter=0)
    offsets = torch.tensor(CELLS)[:, None] * (P + GAP)
    assert torch.equal(corners - offsets, corners[:1].expand(9, -1, -1))
    for axis in (0, 1):
        assert uniformly(corners[0, :, axis], 0, 7)
    assert abs(stats.spearmanr(*corners[0].T).statistic) < 0.08


def test_jitter_is_uniform_and_every_patchs_own():
    """In an image without room to spare the grid lies at 0, so that the places are the jitter itself."""
    moves = places(1000, EXTENT, jitter=JITTER) - torch.tensor(CELLS)[:, None] * (P + GAP)  # (9, 1000, 2)
    for cell in range(9):
        for axis in (0, 1):
            assert uniformly(moves[cell, :, axis], 0, 2 * JITTER)
    correlation = torch.corrcoef(moves.double().transpose(1, 2).reshape(18, 1000)) - torch.eye(18)
    assert correlation.abs().max() < 0.15


@pytest.mark.parametrize("color", COLORS)
def test_the_mean_of_every_channel_is_zero(color):
    made = torch.stack(PatchGrid(0, size=P, color=color)(raw_images(8, 99), torch.arange(8), 0))
    assert made.mean((3, 4)).abs().max() < 1e-5 and made.isfinite().all()


def test_projection_removes_green_against_magenta_and_nothing_else():
    images, ids, axis = raw_images(6), torch.arange(6), torch.tensor([-1.0, 2.0, -1.0]).double()
    plain, projected = (
        pixels(PatchGrid(0, **PLAIN | {"color": color})(images, ids, 0)).movedim(2, -1) for color in ("none", "project")
    )
    matrix = torch.eye(3).double() - axis[:, None] * axis / (axis @ axis)  # the paper's B
    torch.testing.assert_close(projected, plain @ matrix, atol=1e-6, rtol=0)
    assert (projected @ axis).abs().max() < 1e-6 < 0.1 < (plain @ axis).abs().max()


def test_one_random_channel_is_kept_and_the_others_are_noise():
    images, ids = raw_images(60), torch.arange(60)
    images = (images.float() * torch.tensor([0.2, 1.0, 0.5])[:, None, None]).byte()  # channels of unlike spread
    plain, dropped = (pixels(PatchGrid(0, **PLAIN | {"color": color})(images, ids, 0)) for color in ("none", "drop"))
    same = (plain - dropped).abs().amax((3, 4)) < 1e-6  # (9, 60, 3)
    assert (same.sum(2) == 1).all()
    assert uniformly(same.int().argmax(2), 0, 2)
    spread = plain[same].std((1, 2), correction=0)  # (540,)
    noise = dropped[~same].unflatten(0, (540, 2)) / spread[:, None, None, None] * 100  # (540, 2, p, p)
    assert (noise.std((2, 3)) - 1).abs().max() < 0.25 and abs(noise.std() - 1) < 0.005
    assert stats.kstest(noise.flatten()[::13], "norm").pvalue > 1e-3
    first, second = noise.unbind(1)
    for one, other in ((first, second), (first[1:], first[:-1]), (first[..., 1:], first[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_shrunk_patches_equal_torchvisions_resize_there_and_back():
    images, ids = raw_images(40), torch.arange(40)
    plain, ours = (pixels(PatchGrid(0, **PLAIN | {"downsample_p": p})(images, ids, 0)) for p in (0.0, 0.4))
    changed = (plain - ours).abs().amax((2, 3, 4)) > 1e-6
    assert stats.binomtest(changed.sum().item(), 360, 0.4).pvalue > 1e-3
    sides = set()
    for cell in range(9):
        for i, u in enumerate(uniform((0, 0, cell, ids), DRAWS).tolist()):
            assert changed[cell, i] == (u[2] < 0.4)
            side = int((LEAST**2 + u[3] * (P**2 - LEAST**2)) ** 0.5)
            small = F.resize(plain[cell, i].float(), [side, side], antialias=True)
            expected = F.resize(small, [P, P], antialias=True).double()
            expected = expected - expected.mean((1, 2), keepdim=True)
            if u[2] < 0.4:
                sides.add(side)
                torch.testing.assert_close(ours[cell, i], expected, atol=1e-5, rtol=0)
    assert sides == set(range(LEAST, P))


@pytest.mark.parametrize("color", COLORS)
def test_patches_do_not_depend_on_the_batch(color, monkeypatch):
    images, ids = raw_images(7), torch.randperm(100)[:7]
    grid = PatchGrid(5, size=P, gap=GAP, jitter=JITTER, color=color, downsample_p=0.5)
    whole = grid(images, ids, 2)
    parts = [grid(i, s, 2) for i, s in zip(images.split(2), ids.split(2))]
    assert all(torch.equal(patch, torch.cat(pieces)) for patch, pieces in zip(whole, zip(*parts)))
    order = torch.randperm(7)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, grid(images[order], ids[order], 2)))
    monkeypatch.setattr("data.augment.views.CPU_PIXELS", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, grid(images, ids, 2)))


def test_patches_differ_between_seeds_epochs_cells_and_samples():
    images, ids = raw_images(1).expand(4, -1, -1, -1), torch.arange(4)
    made = [
        PatchGrid(seed, size=P, gap=GAP, jitter=JITTER)(images, ids, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    patches = [patch[i] for views in made for patch in views for i in range(4)]
    assert all(not torch.equal(a, b) for n, a in enumerate(patches) for b in patches[:n])
    constant = PatchGrid(0, size=P)(torch.full((2, 3, 90, 90), 77, dtype=torch.uint8), torch.arange(2), 0)
    assert torch.stack(constant).abs().max() < 1e-5  # no spread, no noise


def test_the_papers_sizes_are_the_defaults():
    grid = PatchGrid(0)
    assert (grid.size, grid.jitter, grid.color) == (96, 7, "drop") and [view.size for view in grid.views] == [96] * 9
    at_least = 3 * 96 + 2 * 48 + 2 * 7
    patches = grid(raw_images(1, at_least), torch.arange(1), 0)
    assert [tuple(patch.shape) for patch in patches] == [(1, 3, 96, 96)] * 9
    with pytest.raises(UserError, match=f"images of 397 x 397 pixels are too small .*set data.size={at_least}"):
        grid(raw_images(1, at_least - 1), torch.arange(1), 0)


def test_empty_batch_autocast_and_inputs():
    images, ids, grid = raw_images(3), torch.arange(3), PatchGrid(0, size=P, gap=GAP, jitter=JITTER)
    assert [tuple(patch.shape) for patch in grid(images[:0], ids[:0], 0)] == [(0, 3, P, P)] * 9
    plain, before = grid(images, ids, 0), images.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, grid(images, ids, 0)))
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="uint8"):
        grid(images.float(), ids, 0)
