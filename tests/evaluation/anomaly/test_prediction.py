"""Work ahead in threads, images at full size."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from data.geometry import Geometry
from evaluation.anomaly.prediction import ahead, captioned, decode_whole, write_heatmap
from plots.style import ABOVE, ALARM, GRID, PEAK, TRUE_DEFECT


def test_work_is_done_ahead_but_only_so_far():
    done, taken, lock = [], 0, threading.Lock()

    def work(i):
        with lock:
            done.append(i)
            assert len(done) - taken <= 4
        return -i

    with ThreadPoolExecutor(2) as pool:
        for i, result in enumerate(ahead(work, iter(range(50)), pool, 4)):
            assert result == -i
            with lock:
                taken += 1
        assert list(ahead(work, [], pool, 4)) == []
    assert sorted(done) == list(range(50))


def test_a_map_of_the_original_s_size_stays_as_it_is():
    heat = torch.rand(37, 53)
    assert torch.equal(Geometry(37, 53).to_original(heat, (37, 53)), heat)


def test_a_whole_image_is_upright_and_not_resampled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    whole = decode_whole(str(tmp_path / "a.png"))
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


CALIBRATION = {"low": 0.0, "high": 2.0, "pixel_threshold": 1.0}


def has(pixels, color):
    return (pixels == np.array(color)).all(-1).any()


@pytest.mark.parametrize("size", [(1, 1), (30, 40), (300, 500), (2000, 1500)])
def test_the_heat_map_keeps_its_pixels_and_says_everything_below(tmp_path, size):
    height, width = size
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(tmp_path / "a.png")
    heat, peak = torch.zeros(size), (height // 2, width // 2)
    heat[height // 3 : height // 2, width // 3 : width // 2] = 1.5
    said = {"score": 3.5, "threshold": 2.0, "peak": peak}
    write_heatmap(str(tmp_path / "a.png"), heat, tmp_path / "b.png", CALIBRATION, **said)
    drawn = np.asarray(Image.open(tmp_path / "b.png"))
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
