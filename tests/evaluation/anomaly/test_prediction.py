"""Work ahead in threads, images at full size, p-values."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from data.geometry import Geometry
from evaluation.anomaly.prediction import ahead, decode_whole, p_value
from evaluation.anomaly.thresholds import normal_threshold


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


def test_the_p_value_is_the_share_of_normals_that_score_as_high_and_the_image_itself():
    normals = [1.0, 2.0, 2.0, 5.0]
    found = [p_value(score, normals) for score in (0.5, 1.0, 2.0, 2.1, 5.0, 9.0)]
    assert found == [1.0, 1.0, 4 / 5, 2 / 5, 2 / 5, 1 / 5]
    assert p_value(3.0, []) == 1.0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_what_is_above_the_threshold_has_a_p_value_of_at_most_the_rate(rate):
    normals = np.random.default_rng(0).normal(size=99)
    threshold = normal_threshold(normals, false_alarm_rate=rate)
    for score in np.linspace(-3, 3, 101):
        assert (p_value(score, normals.tolist()) <= rate) == (score > threshold)
