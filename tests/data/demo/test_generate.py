"""The demo set: layout, determinism, exact masks, and manners towards folders that are already there."""

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from data.demo.canvas import Canvas, box, disc, hexagon, rod, stripes
from data.demo.condition import CONDITIONS, VIEW, draw, one_ring
from data.demo.generate import generate, layout, main, render
from data.demo.outliers import THINGS, VEILS, outlier
from data.demo.parts import PARTS
from data.demo.sheet import contact_sheet
from plots.style import TRUE_DEFECT
from runtime.errors import UserError

SMALL = 0.001  # two images per folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small set drawn by two processes."""
    return generate(tmp_path_factory.mktemp("demo") / "set", seed=3, scale=SMALL, workers=2)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pixels(path: str, seed: int) -> np.ndarray:
    return np.asarray(render(path, seed)[0])


def test_full_layout():
    count = {}
    for path in layout(1.0):
        folder, name = path.rsplit("/", 1)
        assert name.removesuffix(".png" if path.startswith("condition") else ".jpg") == f"{count.get(folder, 0):04d}"
        count[folder] = count.get(folder, 0) + 1
    expected = {f"scavport/train/{name}": 100 for name in PARTS} | {f"scavport/test/{name}": 40 for name in PARTS}
    expected |= {"scavport_anom/train/good": 160, "scavport_anom/test/good": 60, "scavport_anom/test/outlier": 60}
    for subset, defects in CONDITIONS.items():
        assert len(defects) == 3
        expected |= {f"condition/{subset}/train/good": 120, f"condition/{subset}/test/good": 50}
        expected |= {f"condition/{subset}/test/{defect}": 20 for defect in defects}
    assert len(PARTS) == 8 and set(CONDITIONS) == {"liner", "rings"}
    assert count == expected


def test_written_files(root):
    files = set(contents(root))
    images = layout(SMALL)
    masks = {path.replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
             for path in images if path.startswith("condition") and "/good/" not in path}  # fmt: skip
    assert files == set(images) | masks | {"demo.json"}
    assert len(images) == 2 * (2 * 8 + 3 + 2 * 5)
    sizes = set()
    for path in images:
        with Image.open(root / path) as image:
            assert image.mode == "RGB" and image.format == ("PNG" if path.endswith("png") else "JPEG")
            sizes.add(image.size)
    assert len(sizes) > 20
    assert all(128 <= width <= 160 and 96 <= height <= 144 for width, height in sizes)


def test_same_seed_same_bytes_for_any_number_of_processes(root, tmp_path):
    alone = generate(tmp_path / "alone", seed=3, scale=SMALL, workers=0)
    assert contents(alone) == contents(root)


def test_seed_and_path_decide():
    path = "scavport/train/ring_pack/0000.jpg"
    first = pixels(path, 0)
    np.testing.assert_array_equal(first, pixels(path, 0))
    for other in (
        pixels(path, 1),
        pixels("scavport/train/ring_pack/0001.jpg", 0),
        pixels(path.replace("train", "test"), 0),
    ):
        assert other.shape != first.shape or np.abs(other.astype(int) - first).mean() > 3


def test_smaller_scale_draws_the_first_images():
    assert set(layout(0.05)) < set(layout(0.3)) < set(layout(1.0))


def test_masks_match_their_images(root):
    pairs = sorted(root.glob("condition/*/ground_truth/*/*.png"))
    assert len(pairs) == 2 * 3 * 2
    for mask_path in pairs:
        image_path = root / "condition" / mask_path.parts[-4] / "test" / mask_path.parts[-2]
        with Image.open(mask_path) as mask, Image.open(image_path / mask_path.name.replace("_mask", "")) as image:
            assert mask.mode == "L" and mask.size == image.size
            values = np.asarray(mask)
        assert set(np.unique(values)) == {0, 255}
        assert 12 <= (values > 0).sum() <= 0.7 * values.size


@pytest.mark.parametrize(
    ("subset", "defect"), [(subset, defect) for subset in CONDITIONS for defect in CONDITIONS[subset]]
)
def test_a_defect_changes_its_mask_only(subset, defect):
    for seed in range(3):
        good, spoilt, mask = draw(subset, defect, np.random.default_rng(seed), (100, 130))
        changed = np.abs(spoilt - good).max(0)
        assert good.shape == (3, 100, 130) and mask.shape == (100, 130)
        assert (changed[~mask] == 0).all()
        assert (changed[mask] > 0).mean() > 0.9
        assert changed[mask].max() > 0.04  # a person can see it


def test_good_condition_images_have_an_empty_mask():
    good, spoilt, mask = draw("rings", None, np.random.default_rng(0), (96, 128))
    assert good is spoilt and not mask.any()
    assert render("condition/rings/test/good/0000.png", 0)[1] is None


def test_the_lost_ring_is_a_ring():
    """The defects' ring positions agree with the drawn rings: bright inside, the dark groove right outside."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        good, _, mask = draw("rings", "missing", rng, (140, 140))
        around = binary_dilation(mask, iterations=2) & ~mask
        assert good[:, mask].mean() > 1.15 * good[:, around].mean()
    canvas = Canvas(np.random.default_rng(0), (96, 128), **VIEW)
    away, half = one_ring(canvas, np.random.default_rng(0))
    assert away.min() >= -half


def test_every_kind_of_outlier_in_turn():
    kinds = len(THINGS) + len(VEILS)
    assert 6 * kinds <= 60
    drawn = []
    for which in range(kinds + 1):
        rng = np.random.default_rng(5)
        canvas = Canvas(rng, (40, 50), turn=0.3, zoom=(0.9, 1.1), shift=0.1, tilt=0.1)
        outlier(canvas, rng, which)
        assert np.isfinite(canvas.color).all() and np.isfinite(canvas.height).all() and np.isfinite(canvas.glow).all()
        drawn.append(canvas.color + canvas.glow)
    np.testing.assert_array_equal(drawn[0], drawn[kinds])
    assert all(np.abs(a - b).mean() > 0.01 for k, a in enumerate(drawn[:kinds]) for b in drawn[:k])


def test_second_run_leaves_the_set_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert generate(root, seed=3, scale=SMALL, workers=0) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_refuses_other_folders(root, tmp_path):
    with pytest.raises(UserError, match="another demo set"):
        generate(root, seed=4, scale=SMALL, workers=0)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a demo set"):
        generate(tmp_path, scale=SMALL, workers=0)
    with pytest.raises(UserError, match="not a demo set"):
        generate(tmp_path / "thesis.txt", scale=SMALL, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(path: str, seed: int):
        raise OSError(errno.ENOSPC, f"no space left for {path} of seed {seed}")

    monkeypatch.setattr("data.demo.generate.render", fail)
    with pytest.raises(
        UserError, match=r"cannot write the demo set .*/set: no space left.*; make room; nothing is left"
    ):
        generate(tmp_path / "set", scale=SMALL, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    image = Image.new("RGB", (2, 2)), Image.new("L", (2, 2))
    monkeypatch.setattr("data.demo.generate.render", lambda path, seed: image)  # noqa: ARG005
    (tmp_path / "set").mkdir()
    generate(tmp_path / "set", seed=9, scale=SMALL, workers=0)
    assert json.loads((tmp_path / "set" / "demo.json").read_text())["seed"] == 9
    assert oct((tmp_path / "set").stat().st_mode)[-3:] == "755"


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "no folder"), (["seed=1"], "no folder"), (["--help"], "no folder"),
     (["x", "sede=1"], "unknown option"), (["x", "seed=a"], "type int"),
     (["x", "seed=-1"], "at least 0"), (["x", "scale=0"], "above 0")],
)  # fmt: skip
def test_command_line_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(argv)


def test_command_line(root, capsys):
    main([str(root), "seed=3", f"scale={SMALL}"])
    assert capsys.readouterr().out == f"demo set in {root}\n"


def test_contact_sheet(root, tmp_path):
    sheet = contact_sheet(root)
    assert 900 <= sheet.width <= 1100
    assert (np.asarray(sheet) == TRUE_DEFECT).all(-1).sum() > 200  # the masks' outlines
    packed = io.BytesIO()
    sheet.save(packed, "JPEG", quality=72)
    assert packed.tell() < 200_000
    with pytest.raises(UserError, match="draw the demo set first"):
        contact_sheet(tmp_path)


def test_shapes_have_euclidean_distances():
    x, y = np.meshgrid(np.linspace(-2, 2, 41), np.linspace(-2, 2, 41))
    np.testing.assert_allclose(disc(x, y, 0.5), np.hypot(x, y) - 0.5)
    turns = np.linspace(0, 2 * np.pi, 4001)
    edges = np.stack([np.cos(turns), np.sin(turns)]) / np.max(np.abs([np.cos(turns), np.sin(turns)]), axis=0)
    nearest = np.hypot(x[..., None] - edges[0], y[..., None] - 0.5 * edges[1]).min(-1)
    np.testing.assert_allclose(np.abs(box(x, y, 1.0, 0.5)), nearest, atol=2e-3)
    stroke = np.linspace(-1, 1, 2001)
    nearest = np.hypot(x[..., None] - stroke, y[..., None] - 0.5 * stroke).min(-1)
    np.testing.assert_allclose(rod(x, y, (-1, -0.5), (1, 0.5), 0.2), nearest - 0.2, atol=2e-3)
    assert hexagon(np.array(0.0), np.array(0.0), 1.0, 0.3) == -1
    corner = 2 / np.sqrt(3)  # of a hexagon whose sides are 1 from the middle
    angle = 0.3 + np.pi / 6
    assert hexagon(corner * np.cos(angle), corner * np.sin(angle), 1.0, 0.3) == pytest.approx(0, abs=1e-12)


def test_canvas_cover_paint_and_noise():
    canvas = Canvas(np.random.default_rng(0), (100, 120), turn=0.0, zoom=(1, 1), shift=0.0, tilt=0.0)
    mask = canvas.cover(disc(canvas.x, canvas.y, 0.5))
    assert set(np.unique(mask[50, :])) >= {0.0, 1.0}
    area = (mask * canvas.pixel**2).sum()  # antialiasing keeps the area; the lens bends a little
    assert area == pytest.approx(np.pi * 0.25, rel=0.04)
    before = canvas.copy()
    canvas.paint(mask, np.float32([[[1.0, 0.5, 0.25]]]).T, 0.7, shade=0.0)
    np.testing.assert_allclose(canvas.color[:, mask == 1], [[1.0], [0.5], [0.25]] * np.ones((1, (mask == 1).sum())))
    np.testing.assert_array_equal(canvas.color[:, mask == 0], before.color[:, mask == 0])
    assert (before.shade == 1).all() and (canvas.shade[mask == 1] == 0).all()
    rng = np.random.default_rng(1)
    for noise in (canvas.noise(rng, 8), canvas.grain(rng, 10, 10), stripes(rng, np.linspace(-100, 100, 9999))):
        assert abs(noise.mean()) < 0.35 and 0.6 < noise.std() < 1.4
