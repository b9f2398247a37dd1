import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.heatmaps import INFERNO, OUTLINE, Caption, Row, colorize, heat_range, outline, overlay, pick, sheet
from training.errors import UserError

CYAN = torch.tensor(OUTLINE, dtype=torch.uint8)


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
    drawn = (outline(image, mask, width=1) == CYAN[:, None, None]).all(0)
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[2:5, 3:6] = expected[3:6, 4:7] = True
    assert torch.equal(drawn, expected & ~mask)
    assert torch.equal(outline(image, torch.zeros_like(mask)), image)
    assert torch.equal(outline(image, torch.ones_like(mask)), image)


def test_heat_range_comes_from_the_quantiles_of_normal_maps():
    maps = torch.arange(1001.0)[torch.randperm(1001)].reshape(1, 7, 143)
    assert heat_range(maps) == pytest.approx((500, 500 + 1.5 * 499))
    low, high = heat_range(torch.full((2, 3, 3), 4.0))
    assert low == 4 and high > low
    with pytest.raises(UserError, match="not a number"):
        heat_range(torch.full((1, 2, 2), float("nan")))


def test_pick_by_hand():
    #          0     1     2     3     4     5     6     7     8
    scores = [0.10, 0.20, 0.30, 0.60, 0.40, 0.45, 0.70, 0.90, 0.80]
    defects = ["good"] * 4 + ["hole", "hole", "hole", "crack", "crack"]
    captions = pick(torch.tensor(scores), torch.tensor([0] * 4 + [1] * 5), defects, 0.5, each=2)
    got = [(c.index, c.heading, c.correct) for c in captions]
    assert got == [
        (4, "missed", False),
        (5, "missed", False),
        (3, "false alarm", False),
        (2, "highest good score", True),
        (7, "strongest of its kind", True),
        (8, "typical", True),  # the lower of two
        (6, "strongest of its kind", True),  # the typical hole stands above as a miss
        (1, "typical", True),
    ]
    assert captions[0].lines == ["hole", "called normal", "score 0.4 (threshold 0.5)", "rank 6 of 9"]
    assert captions[4].lines == ["crack", "called anomalous", "score 0.9 (threshold 0.5)", "rank 1 of 9"]


def test_pick_shows_every_picture_once_and_lives_without_a_class():
    labels = torch.tensor([0, 1] * 20)
    defects = ["good", "hole"] * 20
    captions = pick(torch.rand(40), labels, defects, 0.5)
    assert len({c.index for c in captions}) == len(captions) <= 3 + 3 + 3
    assert all(c.correct == ((c.lines[1] == "called anomalous") == (c.lines[0] == "hole")) for c in captions)
    assert {c.heading for c in pick(torch.zeros(4), torch.zeros(4), ["good"] * 4, 0.5)} <= {
        "highest good score",
        "typical",
    }
    assert [c.heading for c in pick(torch.ones(1), torch.ones(1), ["hole"], 0.5)] == ["weakest find"]


def test_a_tie_with_the_threshold_is_no_alarm():
    assert pick([0.5], [1], ["hole"], 0.5)[0].heading == "missed"


@pytest.mark.parametrize("n", [0, 1, 5])
def test_sheet(tmp_path, n):
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:20, 20:40] = True
    caption = Caption(0, "missed", ["hole", "called normal", "score 1", "rank 1 of 1"], False)
    rows = [Row(image, torch.rand(40, 60), mask if i == 0 else None, caption) for i in range(n)]
    sheet(rows, tmp_path / "sheet.png", low=0.0, high=1.0, title="tiles: image AUROC 0.9 [0.8, 1.0]")
    drawn = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png")))  # (H, W, 3)
    lines = -(-n // 2)
    assert drawn.shape == (104 + lines * 216 + 16, 1384, 3)
    cyan = (drawn == CYAN).all(-1)
    assert cyan[:104].any()  # the key on top
    assert cyan[104:, 24:232].any() == cyan[104:, 240:448].any() == (n > 0)  # on the picture and on its heat map
    assert not cyan[104:, 460:].any()  # rows without a mask
    if n:
        assert (drawn[104:138, 452:660] == torch.tensor([190, 30, 30])).all(-1).any()  # the heading, red as it is wrong
        assert (drawn[104 + 2, 24 + 2] == 100).all()
    if n == 5:
        assert (drawn[104 + 2 * 216 + 2, 24 + 2] == 100).all()  # the fifth row starts the third line
        assert (drawn[104 + 2 * 216 + 2, 700:] == 255).all()  # and stands there alone
