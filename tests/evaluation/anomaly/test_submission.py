"""MVTec AD 2's format: the files read back by a parser of its own, and what is no private image."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.anomaly.submission import check_private, float16_tiff, write_submission
from runtime.errors import UserError

CALIBRATION = {"low": 1.0, "high": 5.0, "pixel_threshold": 3.0}


def read_tiff(data: bytes) -> np.ndarray:
    """TIFF 6.0, section 2: header, directory of 12-byte entries in ascending order, one strip."""
    order, version, start = struct.unpack_from("<2sHI", data)
    assert (order, version) == (b"II", 42) and start % 2 == 0
    (count,) = struct.unpack_from("<H", data, start)
    entries = [struct.unpack_from("<HHII", data, start + 2 + 12 * i) for i in range(count)]
    assert struct.unpack_from("<I", data, start + 2 + 12 * count) == (0,)
    assert len(data) == start + 6 + 12 * count
    tags = [entry[0] for entry in entries]
    assert tags == sorted(tags) and all(entry[2] == 1 for entry in entries)
    width, height, bits, packed, black, offset, samples, rows, size, kind = (entry[3] for entry in entries)
    assert tags == [256, 257, 258, 259, 262, 273, 277, 278, 279, 339]
    assert (bits, packed, black, samples, rows, kind, size) == (16, 1, 1, 1, height, 3, 2 * width * height)
    return np.frombuffer(data[offset : offset + size], "<f2").reshape(height, width)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (64, 1)])
def test_tiff_of_half_floats(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    np.testing.assert_array_equal(read_tiff(float16_tiff(values)), values)


def test_files_of_an_image(tmp_path):
    heat = torch.tensor([[1.0, 3.0, 3.001], [5.0, -1e9, 1e9]])
    image = "/data/mvtec_ad2/sheet_metal/test_private_mixed/007_mixed.png"
    write_submission(tmp_path, image, heat, CALIBRATION)
    place = "sheet_metal/test_private_mixed/007_mixed"
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"anomaly_images/{place}.tiff", f"anomaly_images_thresholded/{place}.png"]
    stored = read_tiff((tmp_path / files[0]).read_bytes())
    expected = np.array([[0, 0.5, 0.50025], [1, -65504, 65504]], np.float16)  # no infinities
    np.testing.assert_array_equal(stored, expected)
    with Image.open(tmp_path / files[1]) as png:
        assert png.mode == "L" and png.format == "PNG"
        assert np.array(png).tolist() == [[0, 0, 255], [255, 0, 255]]  # above, and equal is not


def test_without_a_threshold_there_is_no_thresholded_part(tmp_path):
    write_submission(tmp_path, "/x/can/test_private/000_regular.png", torch.ones(2, 3), dict.fromkeys(CALIBRATION))
    assert [path.name for path in tmp_path.iterdir()] == ["anomaly_images"]
    with pytest.raises(UserError, match="has no anomaly maps"):
        write_submission(tmp_path, "/x/can/test_private/000_regular.png", None, CALIBRATION)


def test_only_private_images(tmp_path, monkeypatch):
    check_private(["/x/can/test_private/000_regular.png", "/x/can/test_private_mixed/000_mixed.png"])
    with pytest.raises(
        UserError, match=r"can/test_public/bad/000\.png lies in no folder <object>/test_private or test_p"
    ):
        check_private(["/x/can/test_private/000_regular.png", "/x/can/test_public/bad/000.png"])
    (tmp_path / "can/test_private").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "can/test_private")
    check_private(["000_regular.png"])
    write_submission(Path(tmp_path), "000_regular.png", torch.ones(2, 3), CALIBRATION)
    assert (tmp_path / "anomaly_images/can/test_private/000_regular.tiff").exists()
