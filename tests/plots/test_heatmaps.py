import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation

from plots.heatmaps import (
    INFERNO,
    Caption,
    Row,
    captioned,
    colorize,
    outline,
    outline_above,
    overlay,
    sheet,
    single_heatmap,
)
from plots.style import ABOVE, ALARM, GRID, PEAK, TRUE_DEFECT, WRONG

BLUE = torch.tensor(TRUE_DEFECT, dtype=torch.uint8)


def test_the_ramp_goes_through_its_anchors_and_is_clamped():
    colors = colorize(torch.linspace(0, 1, 9)[None])
    assert colors.shape == (3, 1, 9) and colors.dtype == torch.uint8
    assert torch.equal(colors[:, 0].T.float(), INFERNO)
    between = colorize(torch.full((1, 1), 1.5 / 8))[:, 0, 0].float()
    assert torch.equal(between, ((INFERNO[1] + INFERNO[2]) / 2).round())
    assert torch.equal(colorize(torch.tensor([[-1.0, 2.0, float("inf")]])), colorize(torch.tensor([[0.0, 1.0, 1.0]])))


def test_hotter_is_lighter():
    luma = torch.tensor([0.2126, 0.7152, 0.0722]) @ colorize(torch.linspace(0, 1, 256)[None])[:, 0].float()
    assert (luma[8:] - luma[:-8] > 0).all()


def test_overlay_leaves_usual_scores_bare_and_covers_hot_ones():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    heat = torch.full((5, 7), -3.0)
    heat[0, 0], heat[0, 1] = 2.0, 9.0  # at `high` and beyond
    got = overlay(image, heat, -1.0, 2.0)
    grey = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
    assert got.shape == (3, 5, 7) and got.dtype == torch.uint8
    assert (got[:, 1:].int() - torch.tensor(grey[1:].astype(int))).abs().max() <= 1
    for x in (0, 1):
        expected = 0.85 * INFERNO[-1] + 0.15 * float(grey[0, x])
        assert (got[:, 0, x] - expected).abs().max() <= 1


def test_the_outline_lies_around_the_mask_only():
    image = torch.zeros(3, 7, 9, dtype=torch.uint8)
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[3, 4] = mask[4, 5] = True
    drawn = (outline(image, mask, width=1) == BLUE[:, None, None]).all(0)
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[2:5, 3:6] = expected[3:6, 4:7] = True
    assert torch.equal(drawn, expected & ~mask)
    assert torch.equal(outline(image, torch.zeros_like(mask)), image)
    assert torch.equal(outline(image, torch.ones_like(mask)), image)


@pytest.mark.parametrize(("width", "rim"), [(2, 0), (2, 1), (9, 4)])
@pytest.mark.parametrize("size", [(40, 50), (1, 7), (6, 1)])
def test_outlines_against_scipy(size, width, rim):
    torch.manual_seed(0)
    image, mask = torch.randint(1, 250, (3, *size), dtype=torch.uint8), torch.rand(size) > 0.99
    mask[0, 0] = True
    square = np.ones((3, 3), bool)

    def grown(pixels):
        return binary_dilation(mask.numpy(), square, iterations=pixels) if pixels else mask.numpy()

    drawn = outline(image, mask, ABOVE, width=width, rim=rim).permute(1, 2, 0).numpy()
    expected = image.permute(1, 2, 0).numpy().copy()
    if rim:
        expected[grown(2 * rim + width) & ~mask.numpy()] = 0
    expected[grown(rim + width) & ~grown(rim)] = ABOVE
    assert np.array_equal(drawn, expected)


def test_what_lies_above_the_pixel_threshold_is_outlined_and_a_tie_does_not():
    image, heat = torch.full((3, 30, 30), 90, dtype=torch.uint8), torch.zeros(30, 30)
    heat[10:20, 10:20], heat[25, 25] = 2.0, 1.0
    drawn = (outline_above(image, heat, 1.0) == torch.tensor(ABOVE, dtype=torch.uint8)[:, None, None]).all(0)
    rows, columns = np.nonzero(drawn.numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 22, 7, 22)
    assert not drawn[9:21, 9:21].any()
    assert torch.equal(outline_above(image, heat, None), image)
    assert torch.equal(outline_above(image, heat, 2.0), image)


def spots(drawn, color):
    return (drawn == torch.tensor(color, dtype=torch.uint8)).all(-1)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_sheet(n):
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:20, 20:40] = True
    heat = torch.zeros(40, 60)
    heat[30:35, 10:20] = 1.0
    caption = Caption(0, "missed", ["hole", "called normal", "score 1", "rank 1 of 1"], False)
    rows = [Row(image, heat, mask if i == 0 else None, None if i == 1 else (32.5, 45.0), caption) for i in range(n)]
    title = "tiles: image AUROC 0.9 [0.8, 1.0]"
    drawn = torch.from_numpy(np.array(sheet(rows, low=0.0, high=2.0, pixel_threshold=0.5, title=title)))  # (H, W, 3)
    lines = -(-n // 2)
    assert drawn.shape == (104 + lines * 216 + 16, 1392, 3)
    blue, green = spots(drawn, TRUE_DEFECT), spots(drawn, PEAK)
    assert blue[:104].any() == green[:104].any() == (n > 0)  # the key on top
    assert blue[104:, 24:232].any() == blue[104:, 240:448].any() == (n > 0)  # on the image and on its heat map
    assert not blue[104:, 460:].any()  # rows without a mask
    if n:
        assert spots(drawn[104:138, 452:660], WRONG).any()  # the heading, red as it is wrong
        assert (drawn[104 + 2, 24 + 2] == 100).all()
        assert not green[104:312, 24:232].any()
        where = np.argwhere(green[104:312, 240:448].numpy()).mean(0)
        assert np.abs(where - [32.5 * 208 / 40, 45 * 208 / 60]).max() < 1  # the cross lies on the peak
        white = np.argwhere(spots(drawn[104:312, 240:448], ABOVE).numpy())
        box = np.array([30 * 208 / 40, 10 * 208 / 60, 35 * 208 / 40, 20 * 208 / 60])  # of the hot pixels
        assert np.abs(np.concatenate([white.min(0), white.max(0)]) - box).max() <= 4
    if n == 5:
        assert (drawn[104 + 2 * 216 + 2, 24 + 2] == 100).all()  # the fifth row starts the third line
        assert (drawn[104 + 2 * 216 + 2, 720:] == 255).all()  # and stands there alone


def test_the_sheet_says_where_the_peak_is_and_names_both_thresholds(monkeypatch):
    texts = []
    monkeypatch.setattr("plots.heatmaps.write", lambda *args, **_: texts.append(args[2]))
    monkeypatch.setattr("plots.heatmaps.legend", lambda *args, masked, **__: texts.append((args[4], masked)))
    image, mask = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.bool)
    mask[2, 3] = True
    caption = Caption(0, "correct", ["hole"], True)

    def said(mask, peak):
        texts.clear()
        sheet([Row(image, torch.rand(8, 8), mask, peak, caption)], low=0, high=1, pixel_threshold=0.25, title="t")
        return texts

    assert said(mask, (2.5, 3.5)) == ["t", (0.25, True), "hole", "peak inside the true defect"]
    assert said(mask, (3.0, 3.5)) == ["t", (0.25, True), "hole", "peak outside the true defect"]
    assert said(mask, (8.0, 3.5))[-1] == "peak outside the true defect"  # the centre of a patch that sticks out
    assert said(torch.zeros_like(mask), (2.5, 3.5)) == ["t", (0.25, True), "hole"]
    assert said(None, (2.5, 3.5)) == ["t", (0.25, False), "hole"]


CALIBRATION = {"low": 0.0, "high": 2.0, "pixel_threshold": 1.0}


def has(pixels, color):
    return (pixels == np.array(color)).all(-1).any()


@pytest.mark.parametrize("size", [(1, 1), (30, 40), (300, 500), (2000, 1500)])
def test_the_heat_map_keeps_its_pixels_and_says_everything_below(size):
    height, width = size
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    heat, peak = torch.zeros(size), (height // 2, width // 2)
    heat[height // 3 : height // 2, width // 3 : width // 2] = 1.5
    said = {"score": 3.5, "threshold": 2.0, "peak": peak}
    drawn = np.asarray(single_heatmap(image, heat, CALIBRATION, **said))
    image, below = drawn[:height, :width], drawn[height:]
    assert drawn.shape[1] == max(width, 420) and 60 < len(below) <= 160 * max(1, width / 800)
    assert (drawn[:height, width:] == 255).all()
    assert tuple(image[peak]) == PEAK
    if height > 20:
        assert has(image, ABOVE) and (image[0, 0] == 90).all()
    for color in (ALARM, ABOVE, PEAK):
        assert has(below, color)
    assert not has(drawn, TRUE_DEFECT)  # nobody knows it


def test_the_verdict_is_that_of_the_table():
    drawn = Image.new("RGB", (600, 50))
    below = {score: np.asarray(captioned(drawn, CALIBRATION, score, 2.0))[50:] for score in (1.0, 2.0, 2.1)}
    badge = [tuple(pixels[11, 11]) for pixels in below.values()]
    assert badge == [GRID, GRID, ALARM]  # at the threshold it is normal
    assert has(below[2.1], ALARM) and not has(below[2.0], ALARM)
    without = np.asarray(captioned(drawn, CALIBRATION | {"pixel_threshold": None}, 3.0, None))[50:]
    assert tuple(without[11, 11]) == (255, 255, 255) and not has(without, ALARM)
    assert has(without, PEAK)
    assert not has(np.asarray(captioned(drawn, CALIBRATION, 3.0, None, peaked=False)), PEAK)
