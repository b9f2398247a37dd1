"""Decoded images that outlive the process: equal batches, one decoding for all processes, nothing stale or half."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.cache_file
from data.datasets.folder import ClassFolder
from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from data.loading import Loader
from runtime.errors import UserError
from tests.images import write_mvtec
from tests.processes import run_processes


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Nine images of two classes; the cache lies in tmp_path."""
    monkeypatch.setattr(data.cache_file, "FOLDER", tmp_path / "cache")
    for i in range(9):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch):
    """The paths that are decoded, in a list."""
    paths, decode = [], data.dataset.decode
    monkeypatch.setattr("data.dataset.decode", lambda path, *how: paths.append(path) or decode(path, *how))
    return paths


def batches(dataset, cache: str) -> list[torch.Tensor]:
    columns = zip(*Loader(dataset, 4, "cpu", shuffle=True, cache=cache).epoch(0))
    return [torch.cat(column) for column in columns]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_second_start_decodes_nothing(root, tmp_path, decoded):
    expected = batches(ClassFolder("train", 8, root=str(root), test_fraction=0.0), "ram")
    first = ClassFolder("train", 8, root=str(root), test_fraction=0.0)
    decoded.clear()
    assert same(batches(first, "file"), expected) and len({*decoded}) == 9
    (made,) = (tmp_path / "cache").iterdir()
    assert made.stat().st_size == 9 + 9 * 3 * 64
    again = ClassFolder("train", 8, root=str(root), test_fraction=0.0)
    decoded.clear()
    assert same(batches(again, "file"), expected) and len(decoded) == 1  # the example of its shape


def test_what_changed_is_decoded_anew(root, tmp_path):
    def fresh(**more):
        options = {"size": 8, **more}
        return batches(ClassFolder("train", root=str(root), test_fraction=0.0, **options), "file")

    before = fresh()
    Image.new("RGB", (7, 9), (1, 2, 3)).save(root / "a" / "0.png")
    changed = fresh()
    assert not same(before, changed)
    assert (changed[0] == torch.tensor([1, 2, 3])[:, None, None]).all((1, 2, 3)).sum() == 1
    os.utime(root / "a" / "0.png", ns=(1, 1))
    fresh()
    assert fresh(size=Geometry(8, 8, "pad"))[0].shape == before[0].shape
    gray = fresh(size=Geometry(8, 8, gray=True))[0]
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert len([*(tmp_path / "cache").iterdir()]) == 5


def test_masks_are_kept_too(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cache_file, "FOLDER", tmp_path / "cache")
    root = str(write_mvtec(tmp_path / "images"))
    expected, *found = (batches(MVTec("test", 16, root=root, category="part"), c) for c in ("ram", "file", "file"))
    assert len(expected) == 4 and expected[1].any() and all(same(expected, each) for each in found)


def test_a_row_counts_once_it_is_written(root, tmp_path):
    """A broken image ends the first pass: what it decoded is there, what it did not is decoded later."""
    (root / "b" / "7.png").write_bytes((root / "b" / "7.png").read_bytes()[:60])
    dataset = ClassFolder("train", 8, root=str(root), test_fraction=0.0)
    with pytest.raises(UserError, match=r"7\.png"):
        batches(dataset, "file")
    (made,) = (tmp_path / "cache").iterdir()
    filled, rows = np.fromfile(made, np.uint8, 9), np.fromfile(made, np.uint8, offset=9).reshape(9, -1)
    for i in filled.nonzero()[0]:
        assert np.array_equal(rows[i], dataset[i][0].flatten())
    assert not filled[dataset.paths.index(str(root / "b" / "7.png"))]


def first_part(_rank, _world, root, folder):
    data.cache_file.FOLDER = Path(folder)
    dataset = ClassFolder("train", 8, root=root, test_fraction=0.0)
    count, image = [], dataset.image
    dataset.image = lambda index: count.append(index) or image(index)
    loader = Loader(dataset, 2, "cpu", cache="file")
    return [torch.cat(column) for column in zip(*loader.epoch(0))], count


def test_processes_share_one_file(root, tmp_path):
    results = run_processes(first_part, 2, str(root), str(tmp_path / "shared"))
    assert len([*(tmp_path / "shared").iterdir()]) == 1
    dataset = ClassFolder("train", 8, root=str(root), test_fraction=0.0)
    seen = []
    for (images, _, indices), decoded in results:
        assert torch.equal(images, torch.stack([dataset[i][0] for i in indices.tolist()]))
        assert {*decoded} <= {*indices.tolist(), 0}  # its own, and the example
        seen += indices.tolist()
    assert sorted(seen) == list(range(9))


def test_no_room_and_no_files_are_one_line(root, tmp_path, monkeypatch):
    dataset = ClassFolder("train", 8, root=str(root), test_fraction=0.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            UserError, match=r"data\.cache=file needs 0\.00 GiB in .*: No space left on device; make room"
        ):
            batches(dataset, "file")
    assert not [*(tmp_path / "cache").iterdir()]
    dataset.paths[3] = "batches/train#3"
    with pytest.raises(UserError, match="files of their own, and batches/train#3 is none"):
        batches(dataset, "file")
