"""VisA as it is published: folders by object, and tables that say which image belongs to which split."""

import csv
import os
from pathlib import Path
from typing import Literal

from data.dataset import Dataset
from data.geometry import Geometry
from data.images import OnError
from runtime.errors import UserError
from runtime.values import PathText

COLUMNS = ["object", "split", "label", "image", "mask"]


class VisA(Dataset):
    """One object of VisA (Zou et al. 2022), split by one of the published tables.

    `<root>/split_csv/<table>.csv` names the images `<object>/Data/Images/<Normal or Anomaly>/*.JPG` and the masks
    `<object>/Data/Masks/Anomaly/*.png`, whose values are numbers of defects. The tables `2cls_...` put anomalous
    images into training; they are left out, for detectors learn from normal images alone.

    The tree that other code makes of it (visa_pytorch/1cls) is in MVTec's layout: data.name=mvtec.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder VisA_20220922, which holds `split_csv` and the objects.
        category: the object, for example candle; several as candle,pcb1, or all.
        table: which split: `1cls` is the usual one for detectors.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: no such table or one without its columns, an object that it does not name, a file that is not there.
    """

    numbered = True

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        table: Literal["1cls", "2cls_fewshot", "2cls_highshot"] = "1cls",
        on_error: OnError = "fail",
    ):
        rows = _rows(Path(root), table)
        objects = _objects(rows)
        if category not in objects:
            raise UserError(f"data.category={category} is not in {table}.csv of {root}; objects: {', '.join(objects)}")
        rows = [row for row in rows if row["object"] == category and row["split"] == split]
        for row in rows:
            if row["label"] not in ("normal", "anomaly") or (row["label"] == "anomaly") != bool(row["mask"]):
                raise UserError(
                    f"{root}/split_csv/{table}.csv says of {row['image']} label={row['label']!r} mask={row['mask']!r}: "
                    "expected normal and no mask, or anomaly and its mask"
                )
        named = [name for row in rows for name in (row["image"], row["mask"]) if name]
        if missing := [name for name in named if not os.path.isfile(os.path.join(root, name))]:
            raise UserError(
                f"{len(missing)} of {len(named)} files of {category} {split} in {table}.csv are not in {root}; "
                f"the first is {missing[0]}: unpack VisA again"
            )
        defects = ["good" if row["label"] == "normal" else "anomaly" for row in rows]
        masks = [os.path.join(root, row["mask"]) if row["mask"] else None for row in rows]
        paths = [os.path.join(root, row["image"]) for row in rows]
        kept = [i for i, defect in enumerate(defects) if defect == "good" or split == "test"]
        paths, defects = ([column[i] for i in kept] for column in (paths, defects))
        tested = [masks[i] for i in kept] if split == "test" else None
        super().__init__(split, size, root, paths, defects=defects, masks=tested, on_error=on_error)
        if len(kept) < len(rows):
            self.left_out["anomalous"] = len(rows) - len(kept)

    @classmethod
    def categories(cls, **options) -> list[str]:
        return _objects(_rows(Path(options["root"]), options["table"]))


def _objects(rows: list[dict[str, str]]) -> list[str]:
    return sorted({row["object"] for row in rows})


def _rows(root: Path, table: str) -> list[dict[str, str]]:
    path = root / "split_csv" / f"{table}.csv"
    if not path.is_file():
        found = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
        raise UserError(
            f"there is no {path}: expected <root>/split_csv/{table}.csv and <root>/<object>/Data/Images of VisA, "
            f"found {', '.join(found[:8]) or 'nothing'}"
        )
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if (reader.fieldnames or [])[:5] != COLUMNS:
            raise UserError(f"{path} has the columns {reader.fieldnames}: expected {','.join(COLUMNS)}")
        return list(reader)
