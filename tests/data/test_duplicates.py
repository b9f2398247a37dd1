"""Copies are found, however they were saved, flipped or turned, and what only resembles them is not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from data import duplicates
from data.duplicates import Fingerprints, distinct, fingerprint, nearest
from data.geometry import Geometry
from data.image_files import find_images
from runtime.errors import UserError


def surface(number, size=(60, 90), grain=2.0):
    """An image of its own, (h, w, 3) as a Pillow image."""
    rng = np.random.default_rng(number)
    pixels = gaussian_filter(rng.normal(0, 1, (*size, 3)), (grain, grain, 0))
    pixels = 128 + 40 * pixels / pixels.std() + rng.normal(0, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, quality):
    """Through JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def prints_of(folder, images):
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images):
        image.save(path)
    return Fingerprints.of([fingerprint(path, 8) for path in paths])


TURNS = list(Image.Transpose)
COPIES = [
    lambda image: image,
    lambda image: resized(image, 0.5),
    lambda image: resized(image, 1.7),
    lambda image: encoded(image, 40),
    lambda image: encoded(resized(image, 0.7), 60).transpose(Image.Transpose.TRANSVERSE),
    *(lambda image, turn=turn: image.transpose(turn) for turn in TURNS),
]


def test_every_copy_is_found_and_nothing_else(tmp_path):
    originals = [surface(i) for i in range(24)]
    base = prints_of(tmp_path, originals)
    copies = prints_of(tmp_path, [COPIES[i % len(COPIES)](image) for i, image in enumerate(originals)])
    position, distance = nearest(copies, base)
    assert position.tolist() == list(range(24)) and (distance < 1.7).all()
    position, distance = nearest(base)
    assert (position == -1).all() and distance.isinf().all()
    strangers = prints_of(tmp_path, [surface(100 + i) for i in range(24)])
    assert (nearest(strangers, base)[0] == -1).all()


def slow_distance(a, b, i, j):
    """Of two prints by the definition, one orientation after the other; inf unless they match."""
    upright = np.unpackbits(b.hashes[j, 0].numpy())
    best = np.inf
    cells = a.cells[i].numpy().astype(np.float64)
    turned = [
        side for quarters in range(4) for side in (np.rot90(cells, quarters), np.fliplr(np.rot90(cells, quarters)))
    ]
    for orientation, one in enumerate(turned):
        bits = (np.unpackbits(a.hashes[i, orientation].numpy()) != upright).sum()
        levels = np.sqrt(((one - b.cells[j].numpy()) ** 2).mean())
        if bits <= duplicates.MOST_BITS and levels <= duplicates.MOST_LEVELS:
            best = min(best, levels)
    return best


def crowd(count, seed, noise):
    """Prints near and far from one another: shades of few images, in random orientations."""
    rng = np.random.default_rng(seed)
    prints = []
    for _ in range(count):
        gray = np.asarray(surface(rng.integers(4), (144, 144), 20).convert("L")).astype(np.float32)
        gray = np.rot90(gray, rng.integers(4)) + rng.normal(0, noise, (16, 16)).repeat(9, 0).repeat(9, 1)
        means = [duplicates._means(gray, *grid) for grid in ((8, 9), (9, 8), (16, 16))]
        prints.append(duplicates.Print(*means[:2], np.rint(means[2]).clip(0, 255).astype(np.uint8)))
    return Fingerprints.of(prints)


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("alone", [True, False])
def test_nearest_is_that_of_a_plain_loop(monkeypatch, block, alone):
    monkeypatch.setattr(duplicates, "ROWS", block)
    monkeypatch.setattr(duplicates, "COLUMNS", block + 1)
    monkeypatch.setattr(duplicates, "MOST_BITS", 50)
    monkeypatch.setattr(duplicates, "MOST_LEVELS", 1.45)
    queries = crowd(14, 0, 1.0)
    others = queries if alone else crowd(11, 1, 1.0)
    table = [
        [np.inf if alone and i == j else slow_distance(queries, others, i, j) for j in range(len(others))]
        for i in range(len(queries))
    ]
    table = torch.tensor(np.array(table))
    assert 0 < table.isfinite().sum() < table.numel() / 2
    position, distance = nearest(queries) if alone else nearest(queries, others)
    torch.testing.assert_close(distance, table.min(1).values)
    found = position >= 0
    assert found.equal(table.isfinite().any(1))
    torch.testing.assert_close(table[found, position[found]], distance[found])


def test_what_no_orientation_changes():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    turned = [side for q in range(4) for side in (np.rot90(cells, q), np.fliplr(np.rot90(cells, q)))]
    both = Fingerprints(
        torch.zeros(9, 8, 16, dtype=torch.uint8), torch.from_numpy(np.stack([*turned, cells[::-1] // 2]))
    )
    invariants = both.invariants()
    assert invariants.shape == (9, 36)
    torch.testing.assert_close(invariants[:8], invariants[:1].expand(8, -1))
    apart = (both.cells[0].double() - both.cells[8].double()).norm()
    assert (invariants[0] - invariants[8]).norm() <= apart


def test_of_those_that_show_the_same_the_largest_is_kept(tmp_path):
    originals = [surface(i) for i in range(4)]
    images = [resized(originals[0], 0.5), originals[1], originals[0], originals[2], originals[0], originals[3]]
    images += [originals[0].transpose(TURNS[0]), encoded(originals[2], 60)]
    prints = prints_of(tmp_path, images)
    worth = torch.tensor([image.width * image.height for image in images])
    assert distinct(prints, worth).tolist() == [1, 2, 3, 5]
    assert distinct(prints, torch.arange(8)).tolist() == [1, 5, 6, 7]
    one = prints[torch.tensor([3])]
    assert distinct(one, torch.ones(1)).tolist() == [0] and nearest(one)[0].tolist() == [-1]


def test_two_kept_ones_never_match_and_dropped_ones_do():
    prints = crowd(60, 5, 1.77)
    kept = distinct(prints, torch.zeros(60))
    assert 4 <= len(kept) < 60 and (nearest(prints[kept])[0] == -1).all()
    dropped = torch.tensor(sorted({*range(60)} - {*kept.tolist()}))
    assert (nearest(prints[dropped], prints)[0] >= 0).all()


def test_flat_images_of_different_brightness_differ(tmp_path):
    flat = prints_of(tmp_path, [Image.new("RGB", (20, 30), (v,) * 3) for v in (0, 0, 3, 128, 255)])
    assert nearest(flat)[0].tolist() == [1, 0, -1, -1, -1]


def test_a_large_jpeg_file_and_its_small_copy(tmp_path):
    photo = surface(1, (700, 1100), 25)
    photo.save(tmp_path / "large.jpg", quality=90)
    resized(photo, 0.2).save(tmp_path / "small.png")
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 16
    Image.fromarray(deep).save(tmp_path / "deep.png")
    prints = [
        fingerprint(tmp_path / name, Geometry(8, 8, white=4080)) for name in ("large.jpg", "small.png", "deep.png")
    ]
    assert (nearest(Fingerprints.of(prints))[0] >= 0).all()


def test_a_broken_file_is_named(tmp_path):
    photo = surface(1, (700, 1100), 25)
    photo.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"cannot read image .*cut\.jpg"):
        fingerprint(tmp_path / "cut.jpg", 8)


@pytest.mark.slow
def test_neu_steel(real_data, tmp_path):
    """None of 200 planted copies is missed; among the originals one pair is found, which is the same file twice."""
    paths = find_images(real_data / "neu_steel")
    base = Fingerprints.of([fingerprint(path, 8) for path in paths])
    chosen = np.random.default_rng(1).permutation(len(paths))[:200]
    copies = [COPIES[n % len(COPIES)](Image.open(paths[i]).convert("RGB")) for n, i in enumerate(chosen)]
    position, _ = nearest(prints_of(tmp_path, copies), base)
    assert (position >= 0).all()
    shown = [paths[i].rpartition("/")[2] for i in position.tolist()]
    twin = {"patches_105.jpg": "patches_101.jpg"}
    names = [paths[i].rpartition("/")[2] for i in chosen]
    assert [twin.get(name, name) for name in shown] == [twin.get(name, name) for name in names]
    found = (nearest(base)[0] >= 0).nonzero()[:, 0].tolist()
    assert [paths[i].rpartition("/")[2] for i in found] == ["patches_101.jpg", "patches_105.jpg"]
