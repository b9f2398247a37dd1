"""Tiles: which pixel comes from which tile, stitched maps against the map of the whole image, padding, mistakes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data.geometry import FILL
from data.normalize import normalize
from data.tiles import spans
from evaluation.anomaly.tiling import check_tiling, examine_tiles
from models.anomaly.detector import Batch, Detector, Findings
from models.anomaly.patchcore import PatchCore
from models.backbones.resnet import ResNet18
from runtime.errors import UserError

CPU = torch.device("cpu")


class Brightness(Detector):
    """A pixel's map is its first channel; the score is the largest one; a memory of three images."""

    def __init__(self):
        super().__init__(nn.Identity(), (1,))
        self.seen = []

    def networks(self, images):
        self.seen.append(images)
        return images

    def measure(self, images, size, valid=None, leave_out=None):  # noqa: ARG002
        maps = images[:, 0]
        inside = torch.ones_like(maps, dtype=torch.bool) if valid is None else valid
        scores, at = maps.masked_fill(~inside, -torch.inf).flatten(1).max(1)
        peaks = torch.stack([at // size[1], at % size[1]], 1) + 0.5  # (B, 2)
        number = torch.arange(len(maps)) % 3
        return Findings(scores, maps, peaks, number, peaks + 100)


def raw_image(height, width, seed=0):
    """Smooth blobs with noise, uint8 (3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(height // 24, 2), max(width // 24, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = 0.1 * torch.randn(3, height, width, generator=generator)
    return (255 * (0.2 + 0.6 * smooth + noise)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("tile,overlap", [(32, 0), (64, 32), (96, 64), (128, 32), (160, 128)])
@pytest.mark.parametrize("more", [0, 32, 64, 160, 320])
def test_every_pixel_is_taken_once_and_from_the_tile_whose_end_is_farthest(tile, overlap, more):
    length = tile + more
    found = spans(length, tile, overlap)
    owner = np.full(length, -1)
    for k, (start, low, high) in enumerate(found):
        assert 0 <= start <= low < high <= start + tile <= length and start % 32 == 0
        assert (owner[low:high] == -1).all()
        owner[low:high] = k
    assert (owner >= 0).all() and found[-1][0] + tile == length
    for (a, *_), (b, *_) in pairwise(found):
        assert 0 < b - a <= tile - overlap
    for pixel in range(length):  # the side's own ends do not count as ends
        margins = []
        for start, *_ in found:
            before = pixel - start if start > 0 else np.inf
            after = start + tile - 1 - pixel if start + tile < length else np.inf
            margins.append(min(before, after))
        assert margins[owner[pixel]] >= max(margins) - 1e-9


@pytest.mark.parametrize("size", [(64, 64), (65, 100), (20, 300), (1, 1), (129, 64), (200, 31)])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_detector_of_single_pixels_sees_every_pixel_where_it_is(size, batch_size):
    image, detector = raw_image(*size), Brightness()
    sizes = {"tile": 64, "overlap": 32, "batch_size": batch_size}
    found = examine_tiles(detector, image, **sizes, device=CPU)
    expected = normalize(image[None])[0, 0]
    assert torch.equal(found.maps, expected[None]) and found.maps.dtype == torch.float32
    assert found.scores.shape == (1,) and found.scores[0] == expected.max()  # though padding may be brighter
    y, x = found.peaks[0].floor().long().tolist()
    assert expected[y, x] == expected.max()
    assert found.nearest_image.shape == (1,) and found.nearest_positions.shape == (1, 2)
    assert max(len(tiles) for tiles in detector.seen) <= batch_size
    fill = normalize(torch.tensor(FILL, dtype=torch.uint8)[None, :, None, None])[0]  # (3, 1, 1)
    last = detector.seen[-1][-1]
    if size == (20, 300):
        assert torch.equal(last[:, 20:], fill.expand(3, 1, 1).expand(3, 44, 64))


def test_image_and_place_are_those_of_the_tile_with_the_largest_score():
    image = torch.zeros(3, 64, 192, dtype=torch.uint8)
    image[:, 10, 150] = 255  # in the last of three tiles
    found = examine_tiles(Brightness(), image, tile=64, overlap=0, batch_size=8, device=CPU)
    assert found.peaks.tolist() == [[10.5, 150.5]] and found.nearest_image.tolist() == [2]
    assert found.nearest_positions.tolist() == [[110.5, 122.5]]  # of the training image: not moved


def test_without_maps_there_is_a_score_all_the_same():
    class Silent(Brightness):
        def measure(self, *args):
            return Findings(super().measure(*args).scores)

    found = examine_tiles(Silent(), raw_image(100, 100), tile=64, overlap=32, batch_size=2, device=CPU)
    assert found.maps is found.peaks is found.nearest_image is None
    assert found.scores[0] == normalize(raw_image(100, 100)[None])[0, 0].max()


def reach() -> int:
    """Pixels on each side that a map pixel of PatchCore on a ResNet-18's stages 2 and 3 depends on."""
    jump, field = 1, 1
    layers = [(7, 2), (3, 2)] + 4 * [(3, 1)] + [(3, 2)] + 3 * [(3, 1)] + [(3, 2)] + 3 * [(3, 1)]  # stem to layer3
    for kernel, stride in [*layers, (3, 1)]:  # and the local mean
        field += (kernel - 1) * jump
        jump *= stride
    # a layer3 patch sees field // 2 around its centre; then linear interpolation to layer2 (one step of 16), of the
    # map (one of 8), and the blur (4 sigma of 4)
    return field // 2 + 16 + 8 + 16


@pytest.fixture(scope="module")
def patchcore():
    torch.manual_seed(0)
    detector = PatchCore(ResNet18(), coreset=0.05)
    images = torch.stack([raw_image(128, 128, seed) for seed in (1, 2, 3)])
    detector.fit([Batch(normalize(images), None, torch.arange(3))], 3)
    return detector


@pytest.mark.parametrize("size", [(416, 448), (400, 430)])  # 400 x 430 is padded to 416 x 448
def test_with_enough_overlap_the_stitched_map_is_the_whole_image_s(patchcore, size):
    overlap = -(-2 * reach() // 32) * 32
    assert (reach(), overlap) == (161, 352)
    image = raw_image(*size)
    found = examine_tiles(patchcore, image, tile=384, overlap=overlap, batch_size=2, device=CPU)
    assert len(spans(416, 384, overlap)) * len(spans(448, 384, overlap)) == 6
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].expand(3, 416, 448).clone()
    canvas[:, : size[0], : size[1]] = image
    valid = torch.zeros(1, 416, 448, dtype=torch.bool)
    valid[:, : size[0], : size[1]] = True
    whole = patchcore.examine(normalize(canvas[None]), None if valid.all() else valid)
    torch.testing.assert_close(found.maps, whole.maps[:, : size[0], : size[1]], atol=1e-5, rtol=0)


def test_with_less_overlap_only_pixels_near_a_cut_differ(patchcore):
    image = raw_image(320, 576)  # two tiles of 320, cut at 288
    whole = patchcore.examine(normalize(image[None])).maps[0]
    found = examine_tiles(patchcore, image, tile=320, overlap=64, batch_size=2, device=CPU).maps[0]
    differs = ((found - whole).abs() > 1e-5).any(0)  # (576,)
    x = torch.arange(576)
    from_tile_end = torch.where(x < 288, 320 - x, x - 255)
    assert differs[from_tile_end < 64].all() and not differs[from_tile_end > reach()].any()


def test_mistakes(patchcore):
    for tile, overlap, text in (
        (48, 0, "tile=48 must be a multiple of 32"),
        (-32, 0, "tile=-32 must be"),
        (64, 16, "overlap=16 must be a multiple of 32"),
        (64, 64, "below tile=64"),
        (64, -32, "overlap=-32"),
    ):
        with pytest.raises(UserError, match=text):
            check_tiling(patchcore, tile, overlap)
    check_tiling(patchcore, 64, 32)
    detector = Brightness()
    detector.positional = True
    with pytest.raises(UserError, match="whole images only"):
        check_tiling(detector, 64, 32)
