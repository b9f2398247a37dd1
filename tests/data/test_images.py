"""Decoding against plain loops and exact arithmetic, for every kind of file that people have."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data.geometry import Geometry
from data.images import decode, decode_mask, image_size, image_sizes, in_threads, readable
from runtime.errors import UserError

ORIENTATION = 0x0112

# EXIF 2.3: where the stored 0th row and 0th column are seen; "0th row is the visual left" turns rows into columns
EXIF = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(tensor):
    """(3, S, S) -> (S, S, 3)"""
    return tensor.permute(1, 2, 0).numpy()


def seen(stored, orientation):
    """The upright image, pixel by pixel from the standard's table."""
    row_side, column_side = EXIF[orientation]
    height, width = stored.shape[:2]
    upright = np.empty(stored.shape if orientation <= 4 else (width, height, *stored.shape[2:]), stored.dtype)
    tall, wide = upright.shape[:2]
    for r in range(height):
        for c in range(width):
            place = {}
            for side, at in ((row_side, r), (column_side, c)):
                if side in ("top", "bottom"):
                    place["y"] = at if side == "top" else tall - 1 - at
                else:
                    place["x"] = at if side == "left" else wide - 1 - at
            upright[place["y"], place["x"]] = stored[r, c]
    return upright


def triangle_resize(rows, size):
    """Antialiased bilinear resampling of axis 0 in float64: a triangle as wide as one output pixel, normalized."""
    scale = len(rows) / size
    support = max(scale, 1.0)
    out = np.zeros((size, *rows.shape[1:]))
    for o in range(size):
        center = (o + 0.5) * scale
        weights = np.array([max(0.0, 1 - abs(i + 0.5 - center) / support) for i in range(len(rows))])
        out[o] = np.tensordot(weights / weights.sum(), rows, 1)
    return out


@pytest.mark.parametrize("shape", [(37, 23), (5, 40), (16, 16), (9, 7), (1, 1)])
def test_squash_is_antialiased_bilinear(tmp_path, shape):
    stored = noise(*shape)
    image = decode(save(tmp_path / "a.png", stored), 16)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and image.is_contiguous()
    expected = triangle_resize(triangle_resize(stored.astype(float), 16).transpose(1, 0, 2), 16).transpose(1, 0, 2)
    assert np.abs(pixels(image) - expected).max() <= 1.01  # Pillow rounds to 8 bits after each of the two passes


def test_grey_and_bilevel_have_three_equal_channels(tmp_path):
    grey = noise(6, 6, 1)
    image = decode(save(tmp_path / "grey.png", grey), 6)
    assert (pixels(image) == grey[:, :, None]).all()
    image = decode(save(tmp_path / "bilevel.png", grey > 127), 6)
    assert (pixels(image) == (grey > 127)[:, :, None] * 255).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    levels = np.array([[0, 257, 128 * 257, 65535], [128, 129, 255, 256], [40000, 300, 65406, 65407], [1, 2, 3, 4]])
    image = decode(save(tmp_path / name, levels.astype(np.uint16)), 4)
    assert (pixels(image) == np.rint(levels / 257)[:, :, None]).all()


def test_palette(tmp_path):
    image = Image.fromarray(noise(8, 8)).quantize(5)
    image.save(tmp_path / "palette.png")
    assert (pixels(decode(tmp_path / "palette.png", 8)) == np.asarray(image.convert("RGB"))).all()


def test_transparent_palette_entry_is_black(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "palette.png", transparency=1)
    assert pixels(decode(tmp_path / "palette.png", 2)).tolist() == [
        [[10, 20, 30], [0, 0, 0]],
        [[70, 80, 90], [0, 0, 0]],
    ]


def test_alpha_lies_on_black(tmp_path):
    stored = noise(6, 6, 4)
    stored[0, :, 3], stored[1, :, 3] = 0, 255
    color = stored[:, :, :3] * (stored[:, :, 3:] / 255)
    assert np.abs(pixels(decode(save(tmp_path / "rgba.png", stored), 6)) - color).max() <= 1
    grey = stored[:, :, [0, 3]]
    image = decode(save(tmp_path / "la.png", np.ascontiguousarray(grey)), 6)
    assert np.abs(pixels(image) - color[:, :, :1]).max() <= 1


def test_key_color_is_black(tmp_path):
    stored = np.array([[[9, 9, 9], [200, 100, 50]]], dtype=np.uint8).repeat(2, 0)
    Image.fromarray(stored).save(tmp_path / "key.png", transparency=(200, 100, 50))
    assert pixels(decode(tmp_path / "key.png", 2))[0].tolist() == [[9, 9, 9], [0, 0, 0]]


def test_cmyk(tmp_path):
    stored = noise(6, 6, 4)
    Image.fromarray(stored, mode="CMYK").save(tmp_path / "cmyk.tif")
    ink = 255.0 - stored
    expected = ink[:, :, :3] * ink[:, :, 3:] / 255
    assert np.abs(pixels(decode(tmp_path / "cmyk.tif", 6)) - expected).max() <= 1
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(pixels(decode(tmp_path / "red.jpg", 8)) - [255.0, 0, 0]).max() <= 3


def test_first_frame_counts(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    for name in ("two.gif", "two.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert decode(tmp_path / name, 4).unique().tolist() == [50]


@pytest.mark.parametrize("orientation", list(EXIF))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_orientation(tmp_path, name, orientation):
    stored = np.kron(noise(4, 4), np.ones((16, 32, 1), dtype=np.uint8))  # 64 x 128, in blocks that a JPEG keeps
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **({"quality": 100} if name[2:] != "png" else {}))
    upright = seen(stored, orientation)
    assert image_size(tmp_path / name) == upright.shape[:2]
    expected = pixels(decode(save(tmp_path / "plain.png", upright), 4))
    error = np.abs(pixels(decode(tmp_path / name, 4)).astype(int) - expected)
    assert error.max() <= (0 if name in ("a.png", "a.tif") else 40) and error.mean() < 10


@pytest.mark.parametrize("orientation", list(EXIF))
@pytest.mark.parametrize("deep", [False, True])
def test_a_box_is_cut_out_of_the_upright_image_before_it_is_resized(tmp_path, orientation, deep):
    stored = noise(20, 31, 1).astype(np.uint16) * 257 if deep else noise(20, 31)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    upright = seen(stored // 257 if deep else stored, orientation).astype(np.uint8)
    part = upright[3:15, 4:13]
    assert np.array_equal(pixels(decode(tmp_path / "a.png", Geometry(12, 9), [3, 4, 12, 9])), as_colors(part))
    small = np.asarray(Image.fromarray(part).resize((5, 5), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels(decode(tmp_path / "a.png", 5, [3, 4, 12, 9])), as_colors(small))


def as_colors(array):
    return array if array.ndim == 3 else np.stack([array] * 3, axis=2)


def test_damaged_exif_is_no_rotation(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    save(tmp_path / "a.jpg", noise(8, 4), exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    start = data.index(b"Exif\0\0") + 6
    (tmp_path / "b.jpg").write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert image_size(tmp_path / "a.jpg") == (4, 8) and image_size(tmp_path / "b.jpg") == (8, 4)
    assert decode(tmp_path / "b.jpg", 4).shape == (3, 4, 4)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("block", [b"Exif\0\0" + b"\xff" * 20, b"Exif\0\0II*\0", b"MM\0*\0\0\0\x08\xff\xff"])
def test_a_malformed_exif_block_is_no_rotation_in_any_format(tmp_path, name, block):
    Image.fromarray(noise(8, 4)).save(tmp_path / name, exif=block)
    assert image_size(tmp_path / name) == (8, 4) and decode(tmp_path / name, 4).shape == (3, 4, 4)


def test_size_needs_only_the_header(tmp_path):
    for name in ("a.png", "a.jpg"):
        data = save(tmp_path / name, noise(300, 200)).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 3])
        assert image_size(tmp_path / name) == (300, 200)
        with pytest.raises(UserError):
            decode(tmp_path / name, 8)


def test_sizes_of_many_and_of_none(tmp_path):
    paths = [str(save(tmp_path / f"{i}.png", noise(i + 1, 2))) for i in range(3)]
    assert image_sizes(paths).tolist() == [[1, 2], [2, 2], [3, 2]]
    assert image_sizes([]).shape == (0, 2)


def broken_files(folder):
    """{path: what its message must say}"""
    png, jpg = save(folder / "whole.png", noise(64, 64)), save(folder / "whole.jpg", noise(64, 64))
    contents = {
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"not an image", "not an image of a known format"),
        "cut.jpg": (jpg.read_bytes()[:1500], "truncated"),
        "cut.png": (png.read_bytes()[:1500], "truncated"),
        "header.png": (png.read_bytes()[:20], ""),
        "noise.png": (png.read_bytes()[:41] + struct.pack("2000B", *[7] * 2000), ""),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    save(folder / "float.tif", noise(4, 4, 1).astype(np.float32))
    save(folder / "wide.tif", np.full((4, 4), 70000, dtype=np.int32))
    reasons = {str(folder / name): reason for name, (_, reason) in contents.items()}
    reasons[str(folder / "float.tif")] = "floating-point"
    reasons[str(folder / "wide.tif")] = "70000"
    reasons[str(folder / "missing.png")] = "there is no such file"
    return reasons


def test_broken_files_are_named_with_the_reason(tmp_path):
    for path, reason in broken_files(tmp_path).items():
        with pytest.raises(UserError) as error:
            decode(path, 8)
        assert f"cannot read image {path}: " in str(error.value) and reason in str(error.value)


def test_fail_reads_nothing_and_skip_names_the_broken(tmp_path, capsys):
    paths = [*broken_files(tmp_path), str(tmp_path / "whole.png"), str(tmp_path / "whole.jpg")]
    assert readable(lambda i: decode(paths[i], 4), paths, "fail") == list(range(len(paths)))
    assert capsys.readouterr().err == ""
    assert readable(lambda i: decode(paths[i], 4), paths, "skip") == [len(paths) - 2, len(paths) - 1]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"left out {len(paths) - 2} of {len(paths)}" in warning
    assert all(path in warning for path in paths[:-2]) and "whole" not in warning
    with pytest.raises(UserError, match=r"none of the 1 images can be read.*empty\.jpg"):
        readable(lambda i: decode(paths[i], 4), paths[:1], "skip")


@pytest.mark.parametrize("shape", [(8, 8), (13, 29), (3, 5)])
def test_mask_is_nearest_and_not_zero(tmp_path, shape):
    stored = noise(*shape, 1) * (noise(*shape, 1, seed=1) > 127)
    stored[0, 0] = 1
    mask = decode_mask(save(tmp_path / "m.png", stored), 8)
    assert mask.dtype == torch.bool and mask.shape == (8, 8)
    for y in range(8):
        for x in range(8):
            row, column = int((y + 0.5) * shape[0] / 8), int((x + 0.5) * shape[1] / 8)
            assert mask[y, x] == (stored[row, column] != 0)


def test_mask_modes(tmp_path):
    expected = torch.tensor([[True, False], [False, True]])
    marked = expected.numpy().astype(np.uint8)
    rgba = np.dstack([marked * 255, marked * 0, marked * 0, np.full((2, 2), 255, dtype=np.uint8)])
    files = {"small": marked, "bilevel": marked > 0, "deep": marked.astype(np.uint16), "opaque": rgba}
    for name, array in files.items():
        assert torch.equal(decode_mask(save(tmp_path / f"{name}.png", array), 2), expected), name
    palette = Image.fromarray(1 - marked, mode="P")  # entry 0 is white here, entry 1 black
    palette.putpalette([255, 255, 255, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    assert torch.equal(decode_mask(tmp_path / "palette.png", 2), expected)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    stored = np.array([[255, 0], [0, 0]], dtype=np.uint8)
    assert decode_mask(save(tmp_path / "turned.png", stored, exif=exif), 2).tolist() == [[False, False], [False, True]]
    with pytest.raises(UserError, match="no such file"):
        decode_mask(tmp_path / "missing.png", 2)


def test_threads_keep_the_order_and_pass_errors_on():
    assert list(in_threads(lambda x: x * x, range(600), "squares")) == [x * x for x in range(600)]
    assert list(in_threads(str, [], "nothing")) == []

    def fails(x):
        if x == 300:
            raise UserError("number 300")
        return x

    with pytest.raises(UserError, match="number 300"):
        list(in_threads(fails, range(600), "failing"))
