"""images.csv and copies.csv, for spreadsheets and programs: all that the report only shows a part of."""

import csv
from pathlib import Path

from evaluation.dataset.inspection import Inspected
from evaluation.dataset.quality import MEASURES, brightness, information, proportion, sharpness
from runtime.files import whole_file

FIELDS = ("height", "width", "mode", "format", "bytes")
PAIR = ("split", "image", "class", "other_split", "other_image", "other_class", "how", "distance")
SCORES = {"brightness": brightness, "sharpness": sharpness, "information": information, "proportion": proportion}


def write(splits: dict[str, Inspected], pairs: list[dict], folder: Path) -> None:
    """images.csv: a row per image, and what is odd about it; copies.csv: a row per pair."""
    with whole_file(folder / "copies.csv") as file:
        copies = csv.DictWriter(file, PAIR, lineterminator="\n")
        copies.writeheader()
        copies.writerows(pairs)
    with whole_file(folder / "images.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["split", "image", "class", *FIELDS, *SCORES, "odd", "cannot_be_read"])
        for name, split in splits.items():
            rows = split.rows[split.readable]
            scores = [score(rows).tolist() for score in SCORES.values()]
            odd = [(kind, m.score(rows) < m.limit if m.below else m.score(rows) > m.limit)
                   for kind, m in MEASURES.items()]  # fmt: skip
            at = {position: k for k, position in enumerate(split.readable.tolist())}
            for position, (image, kind) in enumerate(zip(split.names, split.kinds)):
                cells = [name, image, kind]
                if position in split.broken:
                    table.writerow([*cells, *[""] * (len(FIELDS) + len(SCORES) + 1), split.broken[position]])
                    continue
                k = at[position]
                fields = [rows[field][k] for field in FIELDS]
                cells += [value.decode() if isinstance(value, bytes) else str(value) for value in fields]
                flags = " ".join(flag for flag, is_odd in odd if is_odd[k])
                table.writerow([*cells, *(f"{column[k]:.4f}" for column in scores), flags, ""])
