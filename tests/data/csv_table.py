"""Images named in a CSV file: the whole file that somebody with such a layout adds to data/datasets/."""

import csv
from pathlib import Path

from data.dataset import Dataset
from data.geometry import Geometry
from data.images import OnError
from runtime.values import PathText


class CSVTable(Dataset):
    """Columns: split, file, defect ("good" of normal images) and mask, empty of images without one.

    Args:
        root: folder that files and masks lie below.
        table: name of the CSV file in it.
        on_error: of broken images, `fail` or `skip`.
    """

    def __init__(
        self, split: str, size: int | Geometry, *, root: PathText, table: str = "images.csv", on_error: OnError = "fail"
    ):
        with open(Path(root) / table, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        paths, defects = [f"{root}/{row['file']}" for row in rows], [row["defect"] for row in rows]
        masks = [f"{root}/{row['mask']}" if row["mask"] else None for row in rows]
        super().__init__(split, size, root, paths, defects=defects, masks=masks, on_error=on_error)
