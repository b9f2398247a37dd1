"""Small trees of files for the tests of published layouts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (6, 8)


def write(path: Path, values=0) -> None:
    """An image of 6 x 8 pixels, or of the array given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(SIZE, values, np.uint8) if np.isscalar(values) else values).save(path)


def marked(*pixels: tuple[int, int], value: int = 255) -> np.ndarray:
    """A mask with these pixels of a value."""
    mask = np.zeros(SIZE, np.uint8)
    for y, x in pixels:
        mask[y, x] = value
    return mask


def write_visa(root: Path) -> None:
    """VisA with two tables of candle and pcb1; one mask has two defects, by number."""
    rows = [
        ("candle", "train", "normal", "Normal/0001.JPG", ""),
        ("candle", "train", "normal", "Normal/0000.JPG", ""),
        ("candle", "test", "normal", "Normal/0836.JPG", ""),
        ("candle", "test", "anomaly", "Anomaly/000.JPG", "Anomaly/000.png"),
        ("candle", "test", "anomaly", "Anomaly/001.JPG", "Anomaly/001.png"),
        ("pcb1", "train", "normal", "Normal/0001.JPG", ""),
    ]
    lines = ["object,split,label,image,mask"]
    for thing, split, label, image, mask in rows:
        image, mask = f"{thing}/Data/Images/{image}", f"{thing}/Data/Masks/{mask}" if mask else ""
        write(root / image)
        lines.append(f"{thing},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    lines[4] = lines[4].replace("test", "train")
    (root / "split_csv/2cls_fewshot.csv").write_text("\n".join(lines) + "\n")
    write(root / "candle/Data/Masks/Anomaly/000.png", marked((0, 0), (0, 1), value=1) + marked((4, 4), value=3))
    write(root / "candle/Data/Masks/Anomaly/001.png", marked((5, 5), value=2))


def found(path: str | Path) -> str:
    return Path(path).name


def write_loco(top: Path, size: int = 0) -> None:
    """A category of MVTec LOCO AD: two regions of image 000, one of the others; `size`: of larger, textured images."""
    rng = np.random.default_rng(0)

    def image():
        return rng.normal(120, 20, (size, size)).clip(0, 255).astype(np.uint8) if size else 7

    def region(y, x, value):
        mask = np.zeros((size, size) if size else SIZE, np.uint8)
        mask[y : y + 4, x : x + 4] = value
        return mask

    for place, count in (("train/good", 6), ("validation/good", 4), ("test/good", 3)):
        for i in range(count):
            write(top / f"{place}/{i:03}.png", image())
    for kind, value in (("logical_anomalies", 255), ("structural_anomalies", 254)):
        for i in range(2):
            write(top / f"test/{kind}/{i:03}.png", image())
            write(top / f"ground_truth/{kind}/{i:03}/000.png", region(0, 0, value))
        write(top / f"ground_truth/{kind}/000/001.png", region(2, 2, 253))
    kinds = [("missing_bolt", 255, 0.5, True), ("scratch", 254, 1, True), ("stain", 253, 30, False)]
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    (top / "defects_config.json").write_text(json.dumps([dict(zip(keys, kind)) for kind in kinds]))


def write_ad2(top: Path, size: int = 0) -> None:
    """An object of MVTec AD 2, with several lightings in the public test set."""
    rng = np.random.default_rng(0)

    def image():
        return rng.normal(120, 20, (size, size)).clip(0, 255).astype(np.uint8) if size else 7

    mask = np.zeros((size, size) if size else SIZE, np.uint8)
    mask[1:3, 2:5] = 255
    for place, names in {
        "train/good": [f"{i:03}_regular" for i in range(6)],
        "validation/good": [f"{i:03}_regular" for i in range(4)],
        "test_public/good": ["000_regular", "000_overexposed", "001_shift_1"],
        "test_public/bad": ["000_regular", "001_underexposed"],
        "test_private": ["000_regular", "001_regular"],
        "test_private_mixed": ["000_mixed"],
    }.items():
        for name in names:
            write(top / place / f"{name}.png", image())
    for name in ("000_regular", "001_underexposed"):
        write(top / f"test_public/ground_truth/bad/{name}_mask.png", mask)
