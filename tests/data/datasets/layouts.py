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


def write_dimo(root: Path, scenes: int = 6, views: int = 2) -> None:
    """DIMO with parts 1 and 2 and a carrier: real scenes, and one synthetic variant of each. Images have 128 x 128
    pixels of 5 mm; part p shines with 100 p where it lies, 10 mm farther right in each view."""
    lengths = {1: (200, 100), 2: (100, 300), 101: (5000, 5000)}  # x, y
    about = {}
    for part, (x, y) in lengths.items():
        about[str(part)] = {"min_x": -x / 2, "min_y": -y / 2, "min_z": 0, "size_x": x, "size_y": y, "size_z": 0}
    (root / "models").mkdir(parents=True)
    (root / "models/models_info.json").write_text(json.dumps(about))
    turn = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    for number in range(scenes):
        for subset, name in (("real_jaigo", f"{number:06d}"), ("sim_jaigo_rand_light", f"{number:06d}_07")):
            files: dict[str, dict] = {"gt": {}, "camera": {}, "info": {}}
            for view in range(views):
                parts = [(1, -100 + 10 * view, -150), (2, 100 + 10 * view, 50)][: 1 + number % 2]
                files["gt"][view] = [
                    {"obj_id": part, "cam_R_m2c": turn, "cam_t_m2c": [x, y, 1000]}
                    for part, x, y in [*parts, (101, 0, 0)]
                ]
                way = "c2w" if subset == "real_jaigo" else "w2c"
                pose = {f"cam_R_{way}": turn, f"cam_t_{way}": [0, 0, 0]}
                files["camera"][view] = {"cam_K": [200, 0, 64, 0, 200, 64, 0, 0, 1], **pose}
                keys = (
                    "light_id carrier_id composition_type viewpoint_id"
                    if way == "c2w"
                    else "light carrier parts viewpoint"
                )
                files["info"][view] = dict(zip(keys.split(), (number % 2, number % 3, number % 2, view)))
                pixels = np.zeros((128, 128), np.uint8)
                for part, x, y in parts:
                    width, height = (length // 5 for length in lengths[part])
                    left, top = 64 + x // 5 - width // 2, 64 + y // 5 - height // 2
                    pixels[top : top + height, left : left + width] = 100 * part
                write(root / subset / name / f"rgb/{view:06d}.png", pixels)
            for kind, entries in files.items():
                (root / subset / name / f"scene_{kind}.json").write_text(json.dumps(entries))
            (root / subset / name / "scene_gt_world.json").write_text("[]")


def coordinates(number, height=30, width=40):
    """Red is the row, green the column, blue the number: what is cut out says where it was."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(y, number)], -1).astype(np.uint8)


def annotation(key, image, category, bbox, **more):
    area = bbox[2] * bbox[3]
    return {"id": key, "image_id": image, "category_id": category, "bbox": bbox, "area": area, **more}


def write_fiftyone(root, boxes, count=4, classes=("buoy", "ship"), size=(30, 40)):
    """As `fiftyone.types.COCODetectionDataset`: data/, labels.json; ids from 1, categories from 0, `annotations` only
    if there are any, floating-point boxes without `iscrowd`."""
    rows = []
    for i in range(1, count + 1):
        write(root / "data" / f"{i:02}.png", coordinates(i, *size))
        rows.append(
            {
                "id": i,
                "file_name": f"{i:02}.png",
                "height": size[0],
                "width": size[1],
                "license": None,
                "coco_url": None,
            }
        )
    categories = [{"id": i, "name": name, "supercategory": None} for i, name in enumerate(classes)]
    content = {"info": {}, "licenses": [], "categories": categories, "images": rows}
    if boxes:
        content["annotations"] = [annotation(i + 1, *box) | {"score": 0.5} for i, box in enumerate(boxes)]
    (root / "labels.json").write_text(json.dumps(content))
