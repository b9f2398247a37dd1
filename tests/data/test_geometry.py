"""Fitting images into inputs against torchvision and plain loops, and the way back to the original pixels."""

import resource
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

from data import DataConfig, build_dataset, build_geometry
from data.geometry import FILL, Geometry, as_geometry
from data.normalize import normalize
from runtime import config
from runtime.errors import UserError

NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
SIZES = [(37, 23), (23, 37), (64, 64), (9, 100), (101, 64), (33, 48), (1, 5), (48, 33), (300, 299), (20, 21), (1, 200)]
FITS = [
    Geometry(24, 24),
    Geometry(20, 33),
    Geometry(24, 24, "crop", 31),
    Geometry(21, 16, "crop", 30),
    Geometry(24, 24, "pad"),
    Geometry(20, 33, "pad"),
    Geometry(33, 20, "pad"),
]


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8))


def region(size, geometry):
    """Top, left, height and width of a padded image, by exact fractions; halves go to the even number."""
    scale = min(Fraction(geometry.height, size[0]), Fraction(geometry.width, size[1]))
    height, width = (max(1, int(side * scale + Fraction(1, 2))) for side in size)
    return [round(Fraction(geometry.height - height, 2)), round(Fraction(geometry.width - width, 2)), height, width]


@pytest.mark.parametrize("size", SIZES)
def test_squash_is_pillows_resize(size):
    for resample in (NEAREST, BILINEAR):
        ours = Geometry(20, 33).apply(noise(*size), resample)
        assert np.array_equal(ours, noise(*size).resize((33, 20), resample))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("shape", "resize"), [((24, 24), 24), ((24, 24), 31), ((21, 16), 30), ((16, 23), 27)])
def test_crop_is_torchvisions_resize_and_center_crop(size, shape, resize):
    geometry = Geometry(*shape, "crop", resize)
    for channels, resample, mode in [(3, BILINEAR, "bilinear"), (1, BILINEAR, "bilinear"), (1, NEAREST, "nearest")]:
        image = noise(*size, channels)
        theirs = TF.center_crop(TF.resize(image, [resize], TF.InterpolationMode(mode)), list(shape))
        assert np.array_equal(geometry.apply(image, resample), theirs)


@pytest.mark.parametrize("size", [(9, 100), (1, 200), (300, 20), (3, 6000), (9000, 30)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_crop_of_a_long_image_makes_only_the_crop(size, resample, monkeypatch):
    """Levels differ where rounding decides (often at 1.5 times, bilinear); on a tie a mask may take either pixel."""
    monkeypatch.setattr("data.geometry.LONG", 0)
    geometry = Geometry(16, 21, "crop", 30, resample)
    theirs = TF.center_crop(TF.resize(noise(*size), [30], TF.InterpolationMode(resample)), [16, 21])
    error = np.abs(np.asarray(geometry.apply(noise(*size))).astype(int) - theirs)
    assert error.max() <= 2 and error.mean() < 0.3
    mask = Image.fromarray(np.arange(size[1], dtype=np.uint8)[None].repeat(size[0], 0))
    theirs = TF.center_crop(TF.resize(mask, [30], TF.InterpolationMode.NEAREST), [16, 21])
    error = np.abs(np.asarray(geometry.apply(mask, NEAREST)).astype(int) - theirs)
    assert np.minimum(error, 256 - error).max() <= 1


def test_crop_of_a_very_long_image_takes_little_memory():
    """Whole, the resized image of 256 x 5,120,000 pixels took 4 GB and 28 seconds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut = Geometry(224, 224, "crop", 256).apply(noise(2, 40000))
    assert cut.size == (224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_the_filter_is_pillows(fit, resample):
    """What PaDiM, CFlow, RegAD and NSA call Image.ANTIALIAS is Lanczos."""
    whole = noise(40, 60).resize((30, 20), Image.Resampling[resample.upper()])
    assert np.array_equal(Geometry(20, 30, fit, resample=resample).apply(noise(40, 60)), whole)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", FITS[4:])
def test_pad_keeps_the_proportions_and_fills_the_rest(size, geometry):
    top, left, height, width = region(size, geometry)
    assert geometry.regions(torch.tensor([size])).tolist() == [[top, left, height, width]]
    for channels, resample, fill in [(3, BILINEAR, FILL), (1, BILINEAR, FILL), (1, NEAREST, 0)]:
        image = noise(*size, channels)
        result = np.array(geometry.apply(image, resample))
        inside = image.resize((width, height), resample)
        expected = np.full(result.shape, fill, dtype=np.uint8)
        expected[top : top + height, left : left + width] = inside.convert("RGB") if fill else inside
        assert np.array_equal(result, expected) and result.shape[:2] == (geometry.height, geometry.width)


def test_padding_is_about_zero_when_normalized():
    fill = torch.tensor(FILL, dtype=torch.uint8)[None, :, None, None]
    assert FILL == (124, 116, 104) and normalize(fill).abs().max() < 0.01


@pytest.mark.parametrize("geometry", FITS)
def test_regions_and_valid(geometry):
    regions = geometry.regions(torch.tensor(SIZES))
    valid = geometry.valid(regions)
    assert regions.dtype == torch.int64 and valid.dtype == torch.bool
    assert valid.shape == (len(SIZES), geometry.height, geometry.width)
    for (top, left, height, width), mask in zip(regions.tolist(), valid):
        expected = torch.zeros(geometry.height, geometry.width, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(mask, expected)
    if geometry.fit != "pad":
        assert valid.all()
    nothing = geometry.regions(torch.empty(0, 2, dtype=torch.int64))
    assert nothing.shape == (0, 4) and len(geometry.valid(nothing)) == 0


@pytest.mark.parametrize("size", [(37, 23), (9, 100), (10, 7), (24, 24), (1, 5), (101, 64)])
@pytest.mark.parametrize("geometry", FITS)
def test_maps_on_original_pixels_against_interpolate(size, geometry):
    heat = torch.rand(geometry.height, geometry.width)
    top, left, height, width = geometry.regions(torch.tensor([size]))[0].tolist()
    heat[~geometry.valid(torch.tensor([[top, left, height, width]]))[0]] = 1e6  # padding has no influence
    smooth, blocky = geometry.to_original(heat, size), geometry.to_original(heat, size, mode="nearest")
    assert smooth.shape == blocky.shape == size and smooth.max() <= 1
    if geometry.fit != "crop":
        part = heat[None, None, top : top + height, left : left + width]
        torch.testing.assert_close(smooth, F.interpolate(part, size, mode="bilinear", antialias=True)[0, 0])
        for y in range(size[0]):
            for x in range(size[1]):
                places = Fraction(2 * y + 1, 2 * size[0]) * height, Fraction(2 * x + 1, 2 * size[1]) * width
                # a centre on the border of two pixels may get either of them
                rows, columns = ({int(place), int(place) - (place == int(place))} for place in places)
                assert blocky[y, x] in part[0, 0, sorted(rows)][:, sorted(columns)]


@pytest.mark.parametrize("size", [(37, 23), (23, 37), (100, 101), (40, 90)])
@pytest.mark.parametrize("geometry", FITS[2:4])
def test_maps_of_a_crop_against_a_plain_loop(size, geometry):
    """Originals larger than the resized image: every pixel inside is a plain bilinear sample, outside it is 0."""
    enlarged = tuple(2 * side for side in size)
    height, width = geometry.height, geometry.width
    heat = torch.rand(height, width) + 1
    result = geometry.to_original(heat, enlarged)
    short = min(enlarged)
    rows, columns = (geometry.resize * side // short for side in enlarged)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    expected = torch.zeros(enlarged, dtype=torch.float64)
    for y in range(enlarged[0]):
        for x in range(enlarged[1]):
            v = (y + 0.5) * rows / enlarged[0] - top
            u = (x + 0.5) * columns / enlarged[1] - left
            if 0 < v < height and 0 < u < width:
                v, u = min(max(v - 0.5, 0), height - 1), min(max(u - 0.5, 0), width - 1)
                i, j = min(int(v), height - 2), min(int(u), width - 2)
                above = heat[i, j] * (1 - u + j) + heat[i, j + 1] * (u - j)
                below = heat[i + 1, j] * (1 - u + j) + heat[i + 1, j + 1] * (u - j)
                expected[y, x] = above * (1 - v + i) + below * (v - i)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
    first, across, high, wide = geometry.window(enlarged)
    seen = (result > 0).nonzero() + 0.5
    assert (seen.min(0).values > torch.tensor([first, across])).all()
    assert (seen.max(0).values < torch.tensor([first + high, across + wide])).all()
    assert abs(len(seen) - high * wide) <= high + wide  # a pixel around the border


@pytest.mark.parametrize("size", [(37, 23), (23, 37), (100, 101), (40, 900), (9, 100)])
@pytest.mark.parametrize("geometry", FITS[2:4])
def test_maps_of_a_crop_of_a_long_image(size, geometry, monkeypatch):
    """The same, but at the crop's edge, without making a map of the whole image."""
    heat = F.avg_pool2d(torch.rand(1, geometry.height + 8, geometry.width + 8), 9, 1)[0]
    expected = [geometry.to_original(heat, size, mode=mode) for mode in ("bilinear", "nearest")]
    monkeypatch.setattr(Geometry, "_is_long", lambda *_: True)
    smooth, blocky = (geometry.to_original(heat, size, mode=mode) for mode in ("bilinear", "nearest"))
    assert torch.equal(smooth > 0, expected[0] > 0) and (smooth - expected[0]).abs().max() < 0.05
    assert (blocky == expected[1]).float().mean() > 0.95  # a centre between two pixels may get either


def test_maps_of_a_crop_of_a_very_long_image_take_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heat = Geometry(224, 224, "crop", 256).to_original(torch.ones(224, 224), (2, 40000))
    assert heat.shape == (2, 40000) and (heat > 0).sum() == 4  # 224 of 5,120,000 pixels, where an original has 128
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("size", [(160, 120), (120, 250), (97, 131)])
@pytest.mark.parametrize("geometry", [Geometry(96, 96), Geometry(96, 96, "crop", 108), Geometry(80, 128, "pad")])
def test_a_mask_comes_back(size, geometry):
    top, left, height, width = (int(edge) for edge in geometry.window(size))
    mask = np.zeros(size, dtype=np.uint8)
    y, x = np.ogrid[: size[0], : size[1]]
    middle = top + 0.6 * height, left + 0.3 * width
    mask[(y - middle[0]) ** 2 / 400 + (x - middle[1]) ** 2 / 180 < 1] = 255
    small = torch.from_numpy(np.array(geometry.apply(Image.fromarray(mask), NEAREST))).float()
    for mode in ("nearest", "bilinear"):
        back = geometry.to_original(small, size, mode=mode).numpy() > 127
        overlap = (back & (mask > 0)).sum() / (back | (mask > 0)).sum()
        assert overlap > 0.9
    blob = small.nonzero().float().mean(0) + 0.5  # its centre of mass, in the input
    point = geometry.to_original_point(blob[None], torch.tensor([size]))[0]
    assert (point - torch.tensor(middle)).abs().max() < 1.5


def test_points():
    sizes = torch.tensor([[480, 640], [640, 480]])
    corners = torch.tensor([[0.0, 0.0], [224.0, 224.0]])
    assert Geometry(224, 224).to_original_point(corners, sizes).tolist() == [[0, 0], [640, 480]]
    # 480 x 640 -> 256 x 341, of which rows 16 to 240 and columns 58 to 282 are kept
    points = Geometry(224, 224, "crop", 256).to_original_point(corners, sizes[:1].expand(2, 2))
    expected = [[16 * 480 / 256, 58 * 640 / 341], [240 * 480 / 256, 282 * 640 / 341]]
    torch.testing.assert_close(points, torch.tensor(expected))
    # 480 x 640 -> 168 x 224 with 28 rows above
    points = Geometry(224, 224, "pad").to_original_point(torch.tensor([[28.0, 0.0], [112.0, 112.0]]), sizes)
    torch.testing.assert_close(points, torch.tensor([[0.0, 0.0], [320.0, 240.0]]))


def test_window():
    assert Geometry(20, 33).window((7, 9)) == Geometry(20, 33, "pad").window((7, 9)) == (0, 0, 7, 9)
    expected = (16 * 480 / 256, 58 * 640 / 341, 224 * 480 / 256, 224 * 640 / 341)
    assert Geometry(224, 224, "crop", 256).window((480, 640)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("size: 0", "size[0]=0 must be at least 1 and at most 65536"),
        ("size: [2, 3, 4]", "data.size=2,3,4 must be one number for a square, or two: height,width"),
        ("size: ''", "must be one number"),
        ("size: 8\nfit: crop", "needs the short side before the crop, at least 8, not data.resize=None"),
        ("size: 8,12\nfit: crop\nresize: 11", "at least 12, not data.resize=11"),
        ("size: 8\nresize: 9", "data.resize=9 is for data.fit=crop"),
        ("size: 8\nresample: nearest", "one of: bilinear, bicubic, lanczos"),
        ("size: 8\nwhite: 0", "data.white=0 must be above data.black=0"),
        ("size: 8\nfit: stretch", "one of: squash, crop, pad"),
    ],
)
def test_mistakes_in_the_config(tmp_path, keys, message):
    (tmp_path / "a.yaml").write_text(f"name: folder\nroot: nowhere\n{keys}\n")
    with pytest.raises(UserError) as error:
        build_geometry(config.build(DataConfig, config.read_yaml(tmp_path / "a.yaml")))
    assert message in str(error.value)
    with pytest.raises(UserError, match="choose squash, crop or pad"):
        Geometry(8, 8, "stretch")


@pytest.mark.parametrize("size", [224, "224", [224], (224,), "224,224"])
def test_one_number_is_a_square(size):
    section = config.build(DataConfig, {"name": "folder", "root": "x", "size": size})
    assert build_geometry(section) == Geometry(224, 224) == as_geometry(224) == as_geometry(Geometry(224, 224))
    assert config.build(DataConfig, config.as_dict(section)) == section


def test_a_data_section_end_to_end(tmp_path):
    """A tall padded input from wide images; mask and image stay together."""
    marked = np.zeros((10, 20), dtype=np.uint8)
    marked[:5, 10:] = 200
    for place in ("train/good/0.png", "test/dent/0.png", "ground_truth/dent/0_mask.png"):
        (tmp_path / "bolt" / place).parent.mkdir(parents=True)
        Image.fromarray(marked).save(tmp_path / "bolt" / place)
    raw = {"name": "mvtec", "root": str(tmp_path), "category": "bolt", "size": "40,24", "fit": "pad"}
    dataset = build_dataset(config.build(DataConfig, raw), "test")
    image, mask, label, _ = dataset[0]
    assert image.shape == (3, 40, 24) and mask.shape == (40, 24) and label == 1
    assert dataset.geometry.regions(dataset.sizes).tolist() == [[14, 0, 12, 24]]
    expected = torch.zeros(40, 24, dtype=torch.bool)
    expected[14:20, 12:] = True
    assert torch.equal(mask, expected) and image[0][:14].unique().tolist() == [FILL[0]]
    assert (image[0][14:19, 13:] == 200).all() and (image[0][21:26] == 0).all()


def test_what_is_inside_is_what_is_not_padded():
    sizes = torch.tensor([[37, 23], [9, 100]])
    assert Geometry(24, 24).inside(sizes, "cpu") is None and Geometry(24, 24, "crop", 31).inside(sizes, "cpu") is None
    inside = Geometry(24, 24, "pad").inside(sizes, "cpu")
    for seen, (height, width) in zip(inside, sizes.tolist()):
        fitted = Geometry(24, 24, "pad").apply(Image.new("RGB", (width, height), (250, 1, 2)))
        assert np.array_equal(seen.numpy(), np.array(fitted)[..., 0] == 250)
