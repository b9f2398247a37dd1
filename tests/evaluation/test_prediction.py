"""Work ahead in threads, pictures at full size."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from data.geometry import Geometry
from evaluation.prediction import ahead, decode_whole


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


def test_a_whole_picture_is_upright_and_not_resampled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    whole = decode_whole(str(tmp_path / "a.png"))
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))
