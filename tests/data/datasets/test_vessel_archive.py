"""An archive of all kinds of images: what is left out of it, why, and that it is reported."""

import pytest
from PIL import Image

from data import build_dataset, settled, what_is_used
from data.datasets.vessel_archive import VesselArchive
from runtime import config
from runtime.errors import UserError
from runtime.text import say_once
from tests.data.test_duplicates import encoded, resized, surface


@pytest.fixture
def archive(tmp_path):
    """Five photographs in folders of ships, and what else lies in such archives."""
    say_once.cache_clear()
    photos = [surface(i, (80, 120)) for i in range(5)]
    files = {f"ship {i % 2}/2019-0{i}/IMG_{i}.JPG": photo for i, photo in enumerate(photos)}
    files |= {"ship 0/Screenshot_1.png": surface(10, (100, 100)), "ship 1/Documents/scan.png": surface(11, (100, 100))}
    files |= {"ship 1/copy of 1.png": resized(photos[1], 0.85), "ship 0/turned.jpg": encoded(photos[2].rotate(180), 50)}
    files |= {"ship 0/icon.png": surface(12, (16, 90))}
    for name, image in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, quality=92)
    (tmp_path / "ship 0/broken.jpg").write_bytes((tmp_path / "ship 0/2019-00/IMG_0.JPG").read_bytes()[:900])
    (tmp_path / "ship 1/empty.png").write_bytes(b"")
    (tmp_path / "ship 1/report.pdf").write_bytes(b"%PDF")
    return tmp_path


def below(dataset):
    return {name.rpartition("/")[2] for name in dataset.names}


PHOTOS = {f"IMG_{i}.JPG" for i in range(5)}


def test_broken_and_tiny_files_are_left_out_and_named(archive, capsys):
    dataset = VesselArchive("train", 8, root=str(archive))
    assert below(dataset) == PHOTOS | {"Screenshot_1.png", "scan.png", "copy of 1.png", "turned.jpg"}
    assert dataset.left_out == {"not readable": 2, "smaller than data.min_side=64": 1}
    assert dataset.classes == ["unlabelled"] and dataset.labels.tolist() == [0] * 9
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "not readable" in line]
    assert "left out 2 of 12 images" in line and "ship 0/broken.jpg" in line and "ship 1/empty.png" in line
    assert any("1 of 10 images" in line and "icon.png" in line for line in lines)


def test_patterns_and_duplicates(archive):
    wanted = {"leave_out": ("*screenshot*", "*/documents/*"), "duplicates": "drop"}
    dataset = VesselArchive("train", 8, root=str(archive), **wanted)
    assert below(dataset) == PHOTOS  # of copies the one with most pixels; of equal ones the first by path
    assert dataset.left_out["matching data.leave_out"] == 2 and dataset.left_out["showing what another shows"] == 2
    assert "icon.png" in below(VesselArchive("train", 8, root=str(archive), min_side=16))


def test_a_run_says_it(archive, capsys):
    section = {"name": "vessel_archive", "root": str(archive), "size": 8, "duplicates": "drop", "leave_out": "*/doc*"}
    data = settled(config.build(__import__("data").DataConfig, section))
    dataset = build_dataset(data, "train")
    assert f"data: train of {archive}: 6 images (6 unlabelled)" in capsys.readouterr().err.splitlines()
    assert what_is_used(dataset, 6, {}) == (
        "data: 6 of 12 images are learned from, 1 matching data.leave_out, 2 not readable, "
        "1 smaller than data.min_side=64, 2 showing what another shows"
    )
    with pytest.raises(UserError, match="has no split 'test'"):
        build_dataset(data, "test")


def test_a_broken_file_is_an_error_if_asked(archive):
    with pytest.raises(UserError, match=r"cannot read image .*broken\.jpg"):
        VesselArchive("train", 8, root=str(archive), on_error="fail")
    read_nothing = VesselArchive("train", 8, root=str(archive), on_error="fail", min_side=1)
    assert len(read_nothing) == 12 and read_nothing.left_out == {}


def test_wrong_layouts(tmp_path):
    with pytest.raises(UserError, match="is not a folder: expected images at any depth"):
        VesselArchive("train", 8, root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no image"):
        VesselArchive("train", 8, root=str(tmp_path))
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"all 1 images .* smaller than data\.min_side=64; the first is .*a\.png"):
        VesselArchive("train", 8, root=str(tmp_path))
