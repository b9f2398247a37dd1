"""More than 8 bits a channel: files written byte by byte, against exact arithmetic; white is found, or doubted."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataConfig, build_dataset, settled
from data.depth import WHITE
from data.geometry import Geometry
from data.images import decode, decode_mask
from data.loading import _STORES, Loader
from data.white import find_range
from runtime import config
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr("data.depth._SAID", bytearray(1))


def png(values: np.ndarray, *, significant: tuple[int, ...] = (), color: int = 0) -> bytes:
    """A 16-bit PNG of grey (color 0), RGB (2), grey and alpha (4) or RGBA (6), perhaps with a chunk sBIT."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + (chunk(b"sBIT", bytes(significant)) if significant else b"")
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, *, photometric: int = 1, bits: int = 16, order: str = "<", **more: int) -> bytes:
    """An uncompressed TIFF. `more`: SampleFormat (t339) and other tags of one number."""
    height, width, *channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    count = channels[0] if channels else 1
    tags = {256: [width], 257: [height], 258: [bits] * count, 259: [1], 262: [photometric], 273: [0], 277: [count]}
    tags |= {278: [height], 279: [len(data)]} | {int(tag[1:]): [value] for tag, value in more.items()}
    tags = dict(sorted(tags.items()))
    behind = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [behind + 6]
    entries = b""
    for tag, numbers in tags.items():
        raw = struct.pack(f"{order}{len(numbers)}H", *numbers)
        long = struct.pack(order + "I", numbers[0])
        place = struct.pack(order + "I", behind) if len(numbers) == 3 else long if len(numbers) == 1 else raw
        entries += struct.pack(order + "HHI", tag, 4 if len(numbers) == 1 else 3, len(numbers)) + place.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return head + directory + struct.pack(order + "3H", *[bits] * 3) + data


def seen(path, white=WHITE) -> np.ndarray:
    """(H, W, 3) of an image read at its own size."""
    with Image.open(path) as image:
        width, height = image.size
    return decode(path, Geometry(height, width, white=white)).permute(1, 2, 0).numpy()


def scaled(values, white) -> np.ndarray:
    """To the nearest; halves up."""
    return np.floor(np.minimum(values.astype(np.float64), white) * 255 / white + 0.5).astype(np.uint8)


LEVELS = np.array([[0, 1, 2, 8], [1000, 1023, 2048, 4094], [4095, 4096, 16383, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("white", [255, 1000, 1023, 4095, 16383, 65535, 65536, 100000])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm", "32.tif"])
def test_white_is_255_and_more_is_white(tmp_path, name, white):
    path = tmp_path / name
    if name == "big.tif":
        path.write_bytes(tiff(LEVELS, order=">"))
    else:
        Image.fromarray(LEVELS.astype(np.int32) if name == "32.tif" else LEVELS).save(path)
    assert np.array_equal(seen(path, white), scaled(LEVELS, white)[..., None].repeat(3, 2))


def test_the_default_divides_by_257(tmp_path):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(every).save(tmp_path / "a.png")
    assert np.array_equal(seen(tmp_path / "a.png")[..., 0], np.rint(every / 257))


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian"])
def test_16_bit_colors(tmp_path, kind):
    """Pillow gives the upper byte of 16-bit colors alone, which of 10 bits leaves two."""
    colors = np.random.default_rng(0).integers(0, 1024, (5, 7, 3)).astype(np.uint16)
    colors[0, 0], colors[1, 1] = 0, (0, 1, 0)
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    order = ">" if kind.endswith("big-endian") else "<"
    path.write_bytes(png(colors, color=2) if kind == "png" else tiff(colors, photometric=2, order=order))
    assert np.array_equal(seen(path, 1023), scaled(colors, 1023))
    assert np.array_equal(seen(path), colors >> 8)
    assert find_range([str(path)])[1] == colors.max()
    assert np.array_equal(decode_mask(path, None), (colors > 0).any(2))  # a value below 256 counts, too


def test_16_bit_colors_with_alpha_lie_on_black(tmp_path):
    colors = np.random.default_rng(0).integers(0, 4096, (5, 7, 4)).astype(np.uint16)
    colors[..., 3] *= 16
    (tmp_path / "a.png").write_bytes(png(colors, color=6))
    expected = scaled(colors[..., :3], 4095) * ((colors[..., 3:] >> 8) / 255)
    assert np.abs(seen(tmp_path / "a.png", 4095) - expected).max() <= 1
    (tmp_path / "grey.png").write_bytes(png(colors[..., :2], color=4))
    assert seen(tmp_path / "grey.png").shape == (5, 7, 3)
    with pytest.raises(UserError, match=r"grey\.png: data.white knows 16-bit grey, RGB and RGBA, not LA;16B"):
        seen(tmp_path / "grey.png", 4095)


def test_files_of_8_bits_are_left_alone(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("a.png", "a.bmp", "a.tif", "a.pgm"):
        Image.fromarray(grey).save(tmp_path / name)
        assert np.array_equal(seen(tmp_path / name, 4095)[..., 0], grey)
    Image.fromarray(grey).convert("RGB").save(tmp_path / "rgb.png")
    assert np.array_equal(seen(tmp_path / "rgb.png", 4095)[..., 1], grey)


def test_a_pgm_of_12_bits_has_its_own_white(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 2048))
    for white in (4095, WHITE):
        assert seen(tmp_path / "a.pgm", white)[0, :, 0].tolist() == [255, 128]
    assert find_range([str(tmp_path / "a.pgm")])[1] == WHITE


def test_32_bit_integers(tmp_path):
    wide = np.array([[0, 70000], [100000, 2**32 - 1]], dtype=np.uint32)
    (tmp_path / "a.tif").write_bytes(tiff(wide, bits=32))
    assert np.array_equal(seen(tmp_path / "a.tif", 2**32 - 1)[..., 0], scaled(wide, 2**32 - 1))
    assert seen(tmp_path / "a.tif", 100000)[..., 0].tolist() == [[0, 179], [255, 255]]
    with pytest.raises(UserError, match=r"up to 4294967295 do not fit 16 bit: set data\.white"):
        seen(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(tiff(np.array([[-3, 5]], dtype=np.int32), bits=32, t339=2))
    with pytest.raises(UserError, match="down to -3 are below black"):
        seen(tmp_path / "b.tif")


def test_white_is_zero(tmp_path):
    """Pillow inverts such files of 8 bits; those of 16 are inverted here."""
    values = np.array([[0, 1, 255]], dtype=np.uint8)
    (tmp_path / "8.tif").write_bytes(tiff(values, photometric=0, bits=8))
    (tmp_path / "16.tif").write_bytes(tiff(values.astype(np.uint16) * 257, photometric=0))
    for name in ("8.tif", "16.tif"):
        assert seen(tmp_path / name)[0, :, 0].tolist() == [255, 254, 0], name
        assert decode_mask(tmp_path / name, None).tolist() == [[True, True, False]], name
    (tmp_path / "12.tif").write_bytes(tiff(np.array([[0, 4095]], dtype=np.uint16), photometric=0))
    assert seen(tmp_path / "12.tif", 4095)[0, :, 0].tolist() == [255, 0]


def test_clipped_values_are_told_once(tmp_path, capsys):
    Image.fromarray(np.array([[5, 4095], [4096, 5000]], dtype=np.uint16)).save(tmp_path / "a.png")
    seen(tmp_path / "a.png", 5000)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        seen(tmp_path / "a.png", 4095)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{tmp_path}/a.png: 2 of 4 values lie above data.white=4095 (up to 5000)" in line


def packed(values: np.ndarray) -> np.ndarray:
    """12-bit numbers, two in three bytes."""
    bits = "".join(f"{v:012b}" for v in values.flatten())
    return np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], dtype=np.uint8)


def test_found_white(tmp_path):
    """The largest that a file declares, unless a value lies above it; else the largest value; 8 bits do not count."""
    dark = np.array([[0, 2999]], dtype=np.uint16)
    files = {
        "plain.png": png(dark),
        "tagged.png": png(dark, significant=(12,)),
        "tagged10.png": png(dark // 4, significant=(10,)),
        "scaled_up.png": png(dark * 16, significant=(12,)),  # what the standard asks for
        "max.tif": tiff(dark, t281=16383),
        "smax.tif": tiff(dark, t341=4095),
        "white_is_zero.tif": tiff(np.array([[0, 4095]], dtype=np.uint16), photometric=0),
        "color.png": png(dark[..., None].repeat(3, 2), color=2, significant=(12, 12, 10)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    twelve = tiff(packed(dark.repeat(2, 1))[None], bits=12)
    bytes_wide, pixels_wide = (struct.pack("<HHII", 256, 4, 1, width) for width in (6, 4))
    (tmp_path / "12.tif").write_bytes(twelve.replace(bytes_wide, pixels_wide))
    Image.fromarray(np.full((2, 2), 255, dtype=np.uint8)).save(tmp_path / "8.png")
    (tmp_path / "8.jpg").write_bytes(b"is not opened")

    def found(*names):
        return find_range([str(tmp_path / name) for name in names])[1]

    assert found("plain.png") == found("plain.png", "8.png", "8.jpg") == 2999
    assert found("tagged.png") == found("smax.tif") == found("12.tif") == found("color.png") == 4095
    assert found("tagged10.png") == 1023 and found("tagged10.png", "plain.png") == 2999
    assert found("scaled_up.png") == 2999 * 16 and found("max.tif") == 16383
    assert found("white_is_zero.tif") == 4095
    assert found() == found("8.png", "8.jpg") == WHITE
    (tmp_path / "broken.png").write_bytes(files["plain.png"][:40])
    with pytest.raises(UserError, match=r"broken\.png"):
        found("broken.png")


def section(root, **more):
    return config.build(DataConfig, {"name": "folder", "root": str(root), "size": 8, **more})


def warnings_of(capsys) -> str:
    """What stderr has, without the lines on what was found."""
    return "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("data: "))


@pytest.mark.parametrize(("most", "suggested"), [(200, 255), (900, 1023), (4095, 4095), (16383, 16383)])
def test_dark_files_are_doubted_when_the_training_set_is_made(tmp_path, capsys, most, suggested):
    for i, value in enumerate((0, most, 7)):
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / f"{i}.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "8_bit.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    build_dataset(section(tmp_path, test_fraction=0), "train")
    line = warnings_of(capsys)
    assert line.count("\n") == 1 and f"first 3 images of 16 bits is above {most}," in line
    assert f"data.white={suggested} " in line
    build_dataset(section(tmp_path, test_fraction=0, white=suggested), "train")
    build_dataset(section(tmp_path, test_fraction=0, white=max(suggested, 4 * most)), "train")
    assert warnings_of(capsys) == ""


@pytest.mark.parametrize("value", [16384, 65535, 0])
def test_bright_files_and_black_ones_are_not_doubted(tmp_path, capsys, value):
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "a.png")
    build_dataset(section(tmp_path, test_fraction=0), "train")
    assert warnings_of(capsys) == ""


def test_auto_and_native_become_numbers(tmp_path):
    for i, most in enumerate((700, 3000, 12)):
        values = np.random.default_rng(i).integers(0, most, (6, 10)).astype(np.uint16)
        values[0, 0] = most
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(tmp_path / "train" / "a" / f"{i}.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.fromarray(np.full((6, 10), 6000, dtype=np.uint16)).save(tmp_path / "test" / "a" / "0.png")
    found = settled(section(tmp_path, white="auto", size="native"))
    assert (found.white, found.size) == (3000, (6, 10)) and settled(found) is found
    assert config.build(DataConfig, config.as_dict(found)) == found
    image = build_dataset(found, "train")[0][0]
    with Image.open(tmp_path / "train" / "a" / "0.png") as stored:
        assert np.array_equal(image[0], scaled(np.asarray(stored), 3000))
    assert torch.equal(build_dataset(found, "test")[0][0], torch.full((3, 6, 10), 255, dtype=torch.uint8))
    with pytest.raises(UserError, match="white='bright' is not a valid number or auto"):
        section(tmp_path, white="bright")
    with pytest.raises(UserError, match="size='big' is not a valid list of numbers or native"):
        section(tmp_path, size="big")


def test_native_names_two_images_of_different_size(tmp_path):
    for name, size in {"a": (4, 5), "b": (4, 5), "c": (5, 4)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError) as error:
        settled(section(tmp_path, size="native", test_fraction=0))
    assert f"{tmp_path}/a.png has 5 x 4, {tmp_path}/c.png has 4 x 5" in str(error.value)


def degrees(stored: np.ndarray, low=-80, high=2000) -> np.ndarray:
    return low + stored.astype(np.float64) / 65535 * (high - low)


def mapped(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """To the nearest; halves up."""
    return np.floor((values.astype(np.float64).clip(black, white) - black) * 255 / (white - black) + 0.5)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_thermal_camera_shows_ten_to_fifty_degrees(tmp_path, name, capsys):
    stored = np.arange(2500, 4500, dtype=np.uint16).reshape(40, 50)  # -0.7 to 62.8 degrees, and more
    stored[0, :3] = 0, 65535, 2836
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(stored).save(tmp_path / "train" / "a" / name)
    chosen = section(tmp_path, size="native", units="-80,2000", black=10, white=50)
    image = build_dataset(settled(chosen), "train")[0][0]
    expected = mapped(degrees(stored), 10, 50)
    assert np.abs(image[0].numpy() - expected).max() <= 1 and (image[0].numpy() != expected).mean() < 0.01  # at ties
    assert {0, 255} <= {*image[0].unique().tolist()} and len(image[0].unique()) == 256
    assert "clipped" not in capsys.readouterr().err  # it was asked for


def test_degrees_in_floating_point_need_a_range(tmp_path):
    values = np.linspace(-20, 60, 60, dtype=np.float32).reshape(6, 10)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: floating-point .* set data\.black and data\.white"):
        decode(tmp_path / "a.tif", 8)
    for black, white in ((0, 30), (-20, 60), (10, 11.5)):
        image = decode(tmp_path / "a.tif", Geometry(6, 10, black=black, white=white))
        assert np.array_equal(image[2].numpy(), mapped(values, black, white))
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=r"b\.tif: 1 of its 60 values are not finite numbers"):
        decode(tmp_path / "b.tif", Geometry(6, 10, black=0, white=30))


def test_signed_values_have_a_black_below_zero(tmp_path):
    values = np.arange(-30, 30, dtype=np.int16).reshape(6, 10)
    (tmp_path / "a.tif").write_bytes(tiff(values, t339=2))
    image = decode(tmp_path / "a.tif", Geometry(6, 10, black=-20, white=25))
    assert np.array_equal(image[0].numpy(), mapped(values, -20, 25))
    assert find_range([str(tmp_path / "a.tif")]) == (-30, 29)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_percentiles_of_all_pixels(tmp_path, kind):
    """Of images that differ in size: a pixel counts, not an image."""
    rng = np.random.default_rng(0)
    images = [rng.gamma(2, 300, size).astype(kind) for size in ((30, 40), (7, 9), (1, 1))]
    paths = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.tif")
        paths.append(str(tmp_path / f"{i}.tif"))
    every = np.concatenate([image.ravel() for image in images])
    for percentiles in ((0, 100), (2, 98), (50, 99.9), (0.01, 50)):
        exact = [np.percentile(every, p, method="inverted_cdf") for p in percentiles]
        if kind is np.uint16:
            assert find_range(paths, percentiles) == tuple(exact)
        else:
            for value, p in zip(find_range(paths, percentiles), percentiles):
                assert abs((every <= value).mean() - p / 100) < 0.002


def test_auto_finds_black_and_white_in_their_units_from_the_training_set(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    stored = np.random.default_rng(0).integers(2000, 5000, (20, 30)).astype(np.uint16)
    Image.fromarray(stored).save(tmp_path / "train" / "a" / "0.png")
    chosen = section(tmp_path, size="native", units="-80,2000", black="auto", white="auto", percentiles="1,99")
    found = settled(chosen)
    ends = degrees(np.percentile(stored, [1, 99], method="inverted_cdf"))
    assert (found.black, found.white) == pytest.approx(tuple(ends)) and settled(found) is found
    image = build_dataset(found, "train")[0][0][0].numpy()
    assert np.abs(image - mapped(degrees(stored), *ends)).max() <= 1
    assert 0 < (image == 0).mean() < 0.02 and 0 < (image == 255).mean() < 0.02
    with pytest.raises(UserError, match=r"data\.white=5 must be above data\.black=7"):
        build_dataset(settled(section(tmp_path, size=8, black=7, white=5)), "train")


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("fit", [{}, {"fit": "pad"}])
def test_a_gray_set_keeps_one_channel(tmp_path, cache, fit):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(3):
        colors = np.random.default_rng(i).integers(0, 256, (6, 10, 3)).astype(np.uint8)
        Image.fromarray(colors).save(tmp_path / "train" / "a" / f"{i}.png")
    gray, colored = (build_dataset(section(tmp_path, size=8, gray=gray, **fit), "train") for gray in (True, False))
    batch = next(Loader(gray, 3, "cpu", cache=cache).epoch(0))
    assert batch[0].shape == (3, 3, 8, 8) and batch[0].stride(1) == 0  # one in memory
    for i, image in enumerate(batch[0]):
        assert torch.equal(image, gray[i][0]) and torch.equal(image[0], image[2])
        colors = colored[i][0].float()
        luma = 0.299 * colors[0] + 0.587 * colors[1] + 0.114 * colors[2]  # Pillow's, ITU-R 601
        assert (image[0] - luma).abs().max() <= 2
    if cache == "ram":
        (store,) = _STORES[gray].values()
        assert store.columns[0].shape == (3, 1, 8, 8)
