"""Anomaly maps as MVTec AD 2's server takes them.

Below the folder of a submission, for each private image of each object:

anomaly_images/<object>/<test_private or test_private_mixed>/000_regular.tiff: one channel of float16, not compressed.
anomaly_images_thresholded/<object>/<...>/000_regular.png: 255 where the map is above the run's pixel threshold, else 0.

Both have the size of the image. The source is MVTec's check_and_prepare_data_for_upload.py, which packs the folder.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.datasets.mvtec_ad2 import PRIVATE
from runtime.errors import UserError
from runtime.files import whole_file


def check_private(paths: list[str]) -> None:
    """UserError unless all images lie in `<object>/test_private` or `<object>/test_private_mixed`."""
    for path in paths:
        if Path(path).absolute().parent.name not in PRIVATE:
            raise UserError(f"submission: {path} lies in no folder <object>/{' or '.join(PRIVATE)} of MVTec AD 2")


def write_submission(folder: Path, path: str, heat: Tensor | None, calibration: dict) -> None:
    """Put the map (h, w) of the image `path` into both parts of a submission; into the first alone without a threshold.

    float16 has a small range, so the values are in units of the run's color scale, 0 its lower and 1 its upper end:
    the same affine function for all maps of a run, which no metric of the server depends on.
    """
    if heat is None:
        raise UserError("submission: the detector of this run has no anomaly maps, which the server takes: fit another")
    values, low, high = heat.float().numpy(), calibration["low"], calibration["high"]
    scaled = values if low is None else (values - low) / (high - low)
    limits = np.finfo(np.float16)
    half = scaled.clip(limits.min, limits.max).astype(np.float16)
    *_, name, split, file = Path(path).absolute().parts
    place = Path(name, split, Path(file).stem)
    with whole_file(folder / "anomaly_images" / f"{place}.tiff", "wb") as out:
        out.write(float16_tiff(half))
    if calibration["pixel_threshold"] is not None:
        above = (values > calibration["pixel_threshold"]).astype(np.uint8) * 255
        with whole_file(folder / "anomaly_images_thresholded" / f"{place}.png", "wb") as out:
            Image.fromarray(above).save(out, "PNG")


def float16_tiff(values: np.ndarray) -> bytes:
    """A TIFF 6.0 file of one page and one strip, little endian, of `values` (h, w) float16; Pillow cannot write it."""
    height, width = values.shape
    pixels = values.astype("<f2").tobytes()
    short, long = 3, 4  # types of the fields below
    fields = [
        (256, long, width),
        (257, long, height),
        (258, short, 16),  # bits per sample
        (259, short, 1),  # not compressed
        (262, short, 1),  # 0 is black
        (273, long, 8),  # where the strip begins
        (277, short, 1),  # samples per pixel
        (278, long, height),  # rows of the strip
        (279, long, len(pixels)),
        (339, short, 3),  # floating point
    ]
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    return header + pixels + struct.pack("<H", len(fields)) + directory + struct.pack("<I", 0)
