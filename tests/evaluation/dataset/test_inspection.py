"""What is known of each image after one pass, against numpy and Pillow over the whole pixels."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageStat

from data import DATASETS
from data import images as images_module
from data.datasets.cifar import CIFAR10C
from evaluation.dataset.inspection import inspect, tile
from evaluation.dataset.overview import files
from evaluation.dataset.quality import brightness, information, proportion, sharpness
from evaluation.dataset.statistics import moments, statistics
from tests.data.datasets.layouts import write_dimo
from tests.processes import run_processes

CPU = torch.device("cpu")


def write(root, images):
    """Images {name: array} as one class; the dataset of them."""
    root.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(root / name)
    return DATASETS["folder"]("train", 16, root=str(root))


def pixels_of(rng, *shape, high=256, dtype=np.uint8):
    return rng.integers(0, high, shape).astype(dtype)


@pytest.fixture
def images(rng=None):
    rng = np.random.default_rng(0)
    return {f"{i}.png": pixels_of(rng, 5 + i, 40 - 3 * i, 3) for i in range(9)} | {
        "gray.png": pixels_of(rng, 31, 17),
        "one.png": pixels_of(rng, 1, 1, 3),
    }


def as_colors(pixels):
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


def test_mean_and_deviation_are_those_of_all_pixels(images, tmp_path):
    split = inspect(write(tmp_path / "set", images), CPU)
    whole = np.concatenate([as_colors(pixels).reshape(-1, 3) for pixels in images.values()]).astype(np.float64) / 255
    section = statistics({"train": split})
    about = section.numbers["train"]
    np.testing.assert_allclose(about["mean"], whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(about["std"], whole.std(0), rtol=1e-13)
    assert about["pixels"] == len(whole) and "stored" not in about


def test_16_bit_files_have_the_statistics_of_their_stored_values(tmp_path):
    rng = np.random.default_rng(1)
    deep = {f"{i}.png": pixels_of(rng, 20 + i, 30, high=65536, dtype=np.uint16) for i in range(4)}
    split = inspect(write(tmp_path / "set", deep | {"8.png": pixels_of(rng, 9, 9)}), CPU)
    whole = np.concatenate([pixels.ravel() for pixels in deep.values()]).astype(np.float64)
    about = statistics({"train": split}).numbers["train"]
    stored = about["stored"]
    np.testing.assert_allclose(stored["mean"], [whole.mean()] * 3, rtol=1e-13)
    np.testing.assert_allclose(stored["std"], [whole.std()] * 3, rtol=1e-13)
    assert (stored["min"], stored["max"], stored["images"]) == (whole.min(), whole.max(), 4)
    eight = np.concatenate([np.floor(p.ravel() * 255.0 / 65535 + 0.5) for p in deep.values()])
    eight = np.append(eight, np.array(Image.open(tmp_path / "set/8.png")))
    np.testing.assert_allclose(about["mean"], [eight.mean() / 255] * 3, rtol=1e-13)


def test_a_camera_of_12_bits_is_noticed(tmp_path):
    rng = np.random.default_rng(1)
    split = inspect(write(tmp_path / "set", {"a.png": pixels_of(rng, 9, 9, high=4096, dtype=np.uint16)}), CPU)
    (problem,) = statistics({"train": split}).problems
    assert problem.weight == "error" and "data.white" in problem.text


def test_floating_point_files(tmp_path):
    rng = np.random.default_rng(1)
    values = [rng.normal(500, 300, (20, 30 + i)).astype(np.float32) for i in range(5)]
    for i, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / f"{i}.tiff")
    geometry = DATASETS["folder"]("train", 16, root=str(tmp_path)).geometry
    split = inspect(DATASETS["folder"]("train", geometry, root=str(tmp_path)), CPU)
    assert len(split.broken) == 5 and all("no declared range" in why for why in split.broken.values())

    split = inspect(DATASETS["folder"]("train", replace(geometry, black=-80, white=2000), root=str(tmp_path)), CPU)
    whole = np.concatenate([pixels.ravel() for pixels in values]).astype(np.float64)
    stored = statistics({"train": split}).numbers["train"]["stored"]
    np.testing.assert_allclose(stored["mean"], [whole.mean()] * 3, rtol=1e-12)
    np.testing.assert_allclose(stored["std"], [whole.std()] * 3, rtol=1e-12)


def test_moments_do_not_round():
    """Of a million values of which one is lower by 1: float64 has no digit left in the difference of squares."""
    n, white = 10**6, 65535
    (mean,), (std,) = moments(np.array([[n * white - 1]]), np.array([[(n - 1) * white**2 + (white - 1) ** 2]]), [n])
    assert mean == white - 1e-6 and std == pytest.approx(math.sqrt(n - 1) / n, rel=1e-15)
    assert moments(np.array([[255 * 7]]), np.array([[255 * 255 * 7]]), [7]) == ([255.0], [0.0])


def test_scores_are_those_of_pillow(images, tmp_path):
    dataset = write(tmp_path / "set", images)
    rows = inspect(dataset, CPU).rows
    for k, path in enumerate(dataset.paths):
        image = Image.open(path)
        red, green, blue = ImageStat.Stat(image.convert("RGB")).mean
        expected = math.sqrt(0.241 * red**2 + 0.691 * green**2 + 0.068 * blue**2) / 255
        assert brightness(rows)[k] == pytest.approx(expected, rel=1e-12)
        edges = ImageStat.Stat(image.convert("L").filter(ImageFilter.FIND_EDGES)).var[0]
        assert sharpness(rows)[k] == pytest.approx(1 - math.exp(-0.001 * edges), rel=1e-9, abs=1e-12)
        assert information(rows)[k] == pytest.approx(image.entropy() / 10, rel=1e-12)
        assert proportion(rows)[k] == min(image.size) / max(image.size)
        assert (rows["width"][k], rows["height"][k]) == image.size


def test_how_a_gray_image_is_stored_does_not_matter(tmp_path):
    gray = pixels_of(np.random.default_rng(2), 30, 40)
    rows = inspect(write(tmp_path / "set", {"a.png": gray, "b.png": as_colors(gray)}), CPU).rows
    assert rows["gray"].all() and [mode.decode() for mode in rows["mode"]] == ["L", "RGB"]
    for score in (brightness, sharpness, information):
        assert score(rows)[0] == score(rows)[1]
    colored = as_colors(gray).copy()
    colored[..., 1] = colored[::-1, :, 0]  # of the same histogram
    assert not inspect(write(tmp_path / "other", {"c.png": colored}), CPU).rows["gray"].any()


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "set").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "set/a.jpg", exif=exif)
    dataset = DATASETS["folder"]("train", 8, root=str(tmp_path / "set"))
    row = inspect(dataset, CPU).rows[0]
    assert (row["height"], row["width"]) == (30, 20) and (row["height"], row["width"]) == tuple(
        dataset.sizes[0].tolist()
    )
    assert tile(dataset, 0, 12).shape == (3, 12, 8) and tile(dataset, 0, 61).shape == (3, 60, 40)


def test_rows_of_arrays_are_images_too(tmp_path):
    pixels = pixels_of(np.random.default_rng(0), 50, 32, 32, 3)
    np.save(tmp_path / "snow.npy", pixels)
    np.save(tmp_path / "labels.npy", np.zeros(50, np.uint8))
    dataset = CIFAR10C("test", 8, root=str(tmp_path), corruption="snow", severity=2)
    split = inspect(dataset, CPU)
    whole = pixels[10:20].reshape(-1, 3) / 255
    about = statistics({"test": split}).numbers["test"]
    np.testing.assert_allclose(about["mean"], whole.mean(0), rtol=1e-13)
    assert set(split.rows["format"]) == {b"array"} and (split.rows["bytes"] == 0).all()
    np.testing.assert_array_equal(tile(dataset, 3, 32), pixels[13].transpose(2, 0, 1))


def test_of_a_part_of_a_file_only_the_part_counts(tmp_path):
    write_dimo(tmp_path)
    dataset = DATASETS["dimo"]("train", 16, root=str(tmp_path), crop="object", test_fraction=0.0)
    split = inspect(dataset, CPU)
    assert len(dataset) == 36 and split.broken == {}
    for i, row in enumerate(split.rows):
        whole = dataset.original(i)
        assert (row["height"], row["width"]) == whole.shape[1:] and row["sums"].tolist() == whole.sum((1, 2)).tolist()
        assert tile(dataset, i, 16).unique().tolist() == [100 * (int(dataset.labels[i]) + 1)]
    stored = sum(os.path.getsize(path) for path in {*dataset.paths})
    assert files({"train": split}).numbers["train"]["bytes"] == stored


def test_threads_change_nothing(images, tmp_path, monkeypatch):
    dataset, rows = write(tmp_path / "set", images), []
    for threads in (1, 5):
        monkeypatch.setattr(images_module, "cpu_count", lambda threads=threads: threads)
        rows.append(inspect(dataset, CPU).rows.tobytes())
    assert rows[0] == rows[1]


def test_an_image_without_memory_for_it_is_named(images, tmp_path, monkeypatch):
    dataset = write(tmp_path / "set", images)

    def full(*_):
        raise MemoryError("it is full")

    monkeypatch.setattr("evaluation.dataset.inspection._measure", full)
    split = inspect(dataset, CPU)
    assert len(split.broken) == len(images) and all("too little memory" in why for why in split.broken.values())


def inspected(_rank, _world_size, root):
    split = inspect(DATASETS["folder"]("train", 16, root=root), CPU)
    return split.rows.tobytes(), split.broken


@pytest.mark.parametrize("count", [1, 7])
def test_two_processes_know_what_one_does(count, tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path, {f"{i}.png": pixels_of(rng, 9, 12, 3) for i in range(count)})
    if count > 1:
        for name in ("0.png", "5.png"):
            (tmp_path / name).write_bytes(b"no image")
    alone = inspected(0, 1, str(tmp_path))
    assert sorted(alone[1]) == ([0, 5] if count > 1 else [])
    assert run_processes(inspected, 2, str(tmp_path)) == [alone, alone]
