"""What decoding takes, measured, against what the header made expect."""

import ctypes
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.geometry import Geometry
from data.images import decode, decode_mask, image_size
from data.opening import bytes_to_decode, opened
from plots.heatmaps import bytes_to_draw, save, single_heatmap
from tests.attacks.hostile_images import chunk
from tests.attacks.limited import memory
from tests.processes import run_processes

WIDTH, HEIGHT = 2000, 1500
TURNED = Image.Exif()
TURNED[0x0112] = 6


def files(folder: Path):
    """Images of each format and mode whose decoding differs, of 3 million pixels, that compress well."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 4), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    grey, rgb = np.asarray(base.convert("L")), base.convert("RGB")
    images = {mode: base.convert(mode) for mode in ("L", "1", "RGB", "RGBA", "LA", "CMYK")}
    images |= {"P": rgb.quantize(50), "I;16": Image.fromarray(grey.astype(np.uint16) * 257)}
    images |= {"I": Image.fromarray(grey.astype(np.int32)), "key": rgb}
    kinds = [("jpg", mode, {}) for mode in ("RGB", "L", "CMYK")]
    kinds += [("jpg", "RGB", {"progressive": True, "subsampling": 0}), ("jpg", "RGB", {"exif": TURNED})]
    kinds += [("png", mode, {"exif": TURNED}) for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")]
    kinds += [("png", "key", {"transparency": (1, 2, 3)}), ("png", "P", {"transparency": 1})]
    kinds += [("tif", mode, {"compression": "tiff_lzw"}) for mode in ("RGB", "RGBA", "L", "CMYK", "P", "I;16", "I")]
    kinds += [
        ("bmp", "RGB", {}),
        ("gif", "P", {}),
        ("webp", "RGB", {"method": 0}),
        ("webp", "RGBA", {"lossless": True}),
    ]
    kinds += [("jp2", mode, {}) for mode in ("RGB", "RGBA", "L")] + [("ppm", "RGB", {})]
    for number, (extension, mode, options) in enumerate(kinds):
        path = folder / f"{number}_{mode.replace(';', '')}.{extension}"
        images[mode].save(path, **options)
        yield path
    deep = np.asarray(rgb).astype(">u2") * 257  # Pillow writes no 16-bit colors
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep), 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0))
    path = folder / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    yield path


def in_a_process(function, *args) -> int:
    """Bytes of RAM that it takes at most, in a process of its own, so that nothing freed before is taken again."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = memory("VmRSS")
        function(*args)
        os.write(writing, str(memory("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as file:
        return int(file.read())


def peaks(_rank: int, _size: int, folder: str) -> list[tuple[str, str, int, int]]:
    """(file, what was done, bytes it took, bytes expected) of what is done with each file."""
    in_a_process(lambda: list(files(Path(folder))))
    rows, small = [], Geometry(224, 224, white=4095)
    for path in sorted(Path(folder).iterdir()):
        whole = Geometry(*image_size(path))
        done = {
            "input": (small, lambda path: decode(path, small)),
            "whole": (whole, lambda path, geometry=whole: decode(path, geometry)),
            "mask": (small, lambda path: decode_mask(path, small)),
        }
        for name, (geometry, function) in done.items():
            with opened(path) as stored:
                expected = bytes_to_decode(stored, geometry)
            rows.append((path.name, name, in_a_process(function, path), expected))
    for size in ((HEIGHT, WIDTH), (200_000, 2), (1000, 3000)):
        image, heat = torch.zeros(3, *size, dtype=torch.uint8), torch.rand(size)
        calibration = {"low": 0.1, "high": 0.9, "pixel_threshold": 0.5}
        rows.append((f"{size}", "drawing", in_a_process(draw, image, heat, calibration, folder), bytes_to_draw(*size)))
    return rows


def draw(image: torch.Tensor, heat: torch.Tensor, calibration: dict, folder: str) -> None:
    save(single_heatmap(image, heat, calibration, score=1.0, threshold=0.5, peak=(1, 1)), Path(folder) / "drawn.png")


@pytest.mark.slow
def test_no_decoding_takes_more_than_the_header_made_expect(tmp_path):
    [rows] = run_processes(peaks, 1, str(tmp_path))
    for row in rows:
        print(*row[:2], *(f"{value / WIDTH / HEIGHT:.1f}" for value in row[2:]), "bytes per pixel")
    assert len(rows) == 3 * 30 + 3
    beyond = {row[:2]: row[2:] for row in rows if row[2] > row[3] + 2**24}  # what Pillow loads the first time
    assert beyond == {}
    largest = {name: (0, 1) for name, *_ in rows}
    for name, _, took, expected in rows:
        largest[name] = max(largest[name], (took, expected), key=lambda pair: pair[0] / pair[1])
    assert {name: pair for name, pair in largest.items() if pair[1] > 4 * pair[0] + 2**24} == {}  # nor far less
