"""Colors of segments over an image, and lines between two images."""

import numpy as np
import torch

from plots.correspondence import BETWEEN, SIDE, TOP, Likeness, likeness_image, match_image
from plots.heatmaps import MARGIN
from plots.segments import segments_over
from plots.style import TRUE_DEFECT, category


def test_segments_are_colored_and_the_bare_one_is_not():
    image, labels = torch.full((3, 30, 60), 100, dtype=torch.uint8), torch.zeros(30, 60, dtype=torch.int64)
    labels[:, 20:40], labels[:, 40:] = 1, 2
    mask = torch.zeros(30, 60, dtype=torch.bool)
    mask[10:20, 4:10] = True
    drawn = segments_over(image, labels, 0, mask)
    assert drawn.shape == (3, 75, 150)
    assert (drawn[:, 5, 5] == 100).all()
    for x, label in ((75, 1), (130, 2)):
        expected = 100 + 0.55 * (torch.tensor(category(label)) - 100)
        assert (drawn[:, 40, x].float() - expected).abs().max() <= 1
    assert (torch.tensor(TRUE_DEFECT) == drawn.flatten(1).T).all(1).any()
    assert torch.equal(segments_over(image, None, None, None), torch.full((3, 75, 150), 100, dtype=torch.uint8))


def test_lines_end_at_their_places():
    images = torch.full((2, 3, 50, 100), 90, dtype=torch.uint8)
    lines = torch.tensor([[10.0, 20.0, 40.0, 80.0]])
    sheet = np.asarray(match_image(*images, lines, names=["a", "b"], title="t", note="n"))
    scale, right = SIDE / 100, MARGIN + SIDE + BETWEEN
    for x, y in ((MARGIN + 20 * scale, TOP + 10 * scale), (right + 80 * scale, TOP + 40 * scale)):
        assert (sheet[round(y), round(x)] == category(0)).all()
    heat = torch.zeros(5, 10)
    heat[4, 8] = 1
    sheet = likeness_image(*images, Likeness((10.0, 20.0), heat, (45.0, 85.0)), names=["a", "b"], title="t")
    pixels = np.asarray(sheet).astype(int)
    assert (pixels[round(TOP + 10 * scale), round(MARGIN + 20 * scale)] == (0, 255, 0)).all()
    assert (pixels[round(TOP + 45 * scale), round(right + 85 * scale)] == (0, 255, 0)).all()
    assert pixels[TOP + 5, right + 5].tolist() == [90, 90, 90]  # lowest cosine: bare
