"""How large the marked defects of an anomaly set are, and which masks are missing or blank."""

from functools import partial

import numpy as np

from data.dataset import Dataset
from data.images import in_threads
from evaluation.dataset.inspection import Inspected
from evaluation.dataset.section import Problem, Section, Table, count
from runtime.text import first_few


def masks(splits: dict[str, Inspected]) -> Section:
    """Of each defect with masks: how many images have one, and what share of their pixels it marks."""
    numbers: dict = {}
    rows, problems = [], []
    for name, split in splits.items():
        dataset = split.dataset
        if not dataset.has_masks or dataset.defects is None:
            continue
        numbers[name] = {}
        wanted = [i for i in split.readable.tolist() if dataset.defects[i] != "good"]
        marked = [i for i in wanted if dataset.mask_paths[i] is not None]
        shares = dict(zip(marked, in_threads(partial(_share, dataset), marked, "measuring masks")))
        for defect in sorted({dataset.defects[i] for i in wanted}):
            images = [i for i in wanted if dataset.defects[i] == defect]
            values = np.array([shares[i] for i in images if i in shares])
            about = {"images": len(images), "masks": len(values), "blank": int((values == 0).sum())}
            spread = [float(f(values)) for f in (np.min, np.median, np.max)] if len(values) else []
            numbers[name][defect] = about | {"share": spread}  # smallest, median, largest
            cells = [f"{value:.2%}" for value in spread] or ["-"] * 3
            rows.append([f"{name}: {defect}", f"{len(images):,}", f"{len(values):,}", f"{about['blank']:,}", *cells])
        if blank := [split.names[i] for i, share in shares.items() if share == 0]:
            problems.append(
                Problem("error", f"{count(len(blank), 'mask')} of {name} without a marked pixel: {first_few(blank)}")
            )
        if len(marked) < len(wanted):
            text = f"{count(len(wanted) - len(marked), 'defective image')} of {name} without a mask"
            problems.append(Problem("note", text))
    header = ["defect", "images", "masks", "blank", "smallest", "median", "largest"]
    parts: list = ["Shares of an image's pixels that its mask marks.", Table(header, rows)]
    return Section("masks", "Masks", numbers, problems, parts)


def _share(dataset: Dataset, index: int) -> float:
    return float(dataset.mask(index, original=True).float().mean())
