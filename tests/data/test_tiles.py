"""Whole images as tiles: every pixel is there, in its place; names, decodings, images that are too small."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.folder import ClassFolder
from data.tiles import KEPT, Tiles
from runtime.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    for i, size in enumerate(((70, 100), (64, 32), (40, 41))):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return ClassFolder("train", 16, root=str(tmp_path))


@pytest.mark.parametrize("overlap", [0, 8, 31])
def test_tiles_cover_every_pixel_at_its_place(dataset, overlap):
    tiles = Tiles(dataset, [0, 2], 32, overlap)
    canvases = {}
    for i in range(len(tiles)):
        name, _, corner = tiles.names[i].partition("#")
        top, left = map(int, corner.split(","))
        whole = np.asarray(Image.open(f"{dataset.root}/{name}"))
        image, label, index = tiles[i]
        assert (label, index) == (0, i) and image.shape == (3, 32, 32)
        assert np.array_equal(image.permute(1, 2, 0), whole[top : top + 32, left : left + 32])
        canvases.setdefault(name, np.zeros(whole.shape[:2], bool))[top : top + 32, left : left + 32] = True
    assert sorted(canvases) == ["0.png", "2.png"] and all(seen.all() for seen in canvases.values())
    assert len({*tiles.names}) == len(tiles) == len(tiles.paths) and tiles.sizes.tolist() == [[32, 32]] * len(tiles)


def test_an_image_of_one_tile_and_one_too_small(dataset):
    assert Tiles(dataset, [1], 32, 0).names == ["1.png#0,0", "1.png#32,0"]
    assert len(Tiles(dataset, [2], 40, 0)) == 2
    with pytest.raises(UserError, match=r"data\.tile=64: .*1\.png has 64 x 32 pixels; lower data\.tile"):
        Tiles(dataset, [0, 1], 64, 0)


def test_an_image_is_decoded_once_for_tiles_that_follow_one_another(dataset, monkeypatch):
    decoded, original = [], dataset.original
    monkeypatch.setattr(dataset, "original", lambda index: decoded.append(index) or original(index))
    tiles = Tiles(dataset, [0, 1, 2] * 3, 32, 0)
    for i in range(len(tiles)):
        tiles.image(i)
    assert len(decoded) == 3 and len(tiles._whole) <= KEPT and torch.equal(tiles.image(0), tiles[0][0])


def test_tiles_of_images_that_are_parts_of_files(dataset):
    dataset.boxes = torch.tensor([[5, 20, 64, 40], [0, 0, 32, 32], [1, 2, 33, 32]])
    tiles = Tiles(dataset, [0, 2], 32, 0)
    whole = np.asarray(Image.open(dataset.paths[0]))
    assert tiles.names[:2] == ["0.png#5,20,64,40#0,0", "0.png#5,20,64,40#0,8"] and len(tiles) == 6
    assert np.array_equal(tiles.image(1).permute(1, 2, 0), whole[5:37, 28:60])
    assert np.array_equal(tiles.image(2).permute(1, 2, 0), whole[37:69, 20:52])
    assert dataset.sizes.tolist() == [[64, 40], [32, 32], [33, 32]]
    assert dataset.full_name(0) == f"{dataset.paths[0]}#5,20,64,40"
