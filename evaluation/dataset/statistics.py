"""Mean and standard deviation of each channel over all pixels of a split, exact.

Every pixel counts once, so large images count more. Sums are whole numbers of any length: the results are the true
ones, rounded once, whatever the order.
"""

import math
from collections.abc import Sequence

import numpy as np

from data.depth import WHITE
from data.normalize import MEAN, STD
from evaluation.dataset.inspection import Inspected
from evaluation.dataset.section import Problem, Section, Table


def statistics(splits: dict[str, Inspected]) -> Section:
    """Of what a network gets, in [0, 1] and before it is resized, and of deep files' values as they are stored."""
    numbers: dict = {}
    rows, deep_rows, problems = [], [], []
    for name, split in splits.items():
        seen = split.rows[split.readable]
        if not len(seen):
            continue
        pixels = _pixels(seen)
        means, stds = moments(seen["sums"], seen["squares"], pixels)
        about: dict = {"mean": [m / 255 for m in means], "std": [s / 255 for s in stds], "pixels": sum(pixels)}
        numbers[name] = about
        rows.append([name, _numbers(about["mean"]), _numbers(about["std"]), f"{sum(pixels):,}"])
        deep = seen[seen["deep"]]
        if not len(deep):
            continue
        pixels = _pixels(deep)
        is_whole = np.char.startswith(deep["mode"], b"F").sum() == 0 and not deep["real"].any()
        sums = deep["whole"] if is_whole else deep["whole"] + deep["real"]
        means, stds = moments(sums[:, 0], sums[:, 1], pixels)
        low, high = float(deep["low"].min()), float(deep["high"].max())
        stored = {"mean": means, "std": stds, "min": low, "max": high, "images": len(deep)}
        about["stored"] = stored
        deep_rows.append([name, _numbers(means, 1), _numbers(stds, 1), f"{low:,.6g} to {high:,.6g}", f"{len(deep):,}"])
        white = split.dataset.geometry.white
        if high <= white / 4 and white == WHITE:
            text = f"the deep files of {name} reach {high:,.6g} of {WHITE:,} and will be nearly black: set data.white"
            problems.append(Problem("error", f"{text} to that of the camera, or to auto"))
    imagenet = ["ImageNet, which all inputs are normalized with", _numbers(MEAN), _numbers(STD), ""]
    header = ["split", "mean of red, green, blue", "standard deviation", "pixels"]
    parts: list = ["Of all pixels, black 0 and white 1, before any resizing.", Table(header, [*rows, imagenet])]
    if deep_rows:
        header = ["split", "mean", "standard deviation", "values", "images"]
        parts.append(Table(header, deep_rows, title="Files of more than 8 bits, values as they are stored"))
    return Section("statistics", "Mean and standard deviation", numbers, problems, parts)


def moments(sums: np.ndarray, squares: np.ndarray, pixels: Sequence[int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel from each image's sums, both (N, 3).

    Whole numbers n S2 - S1^2 do not round; floating-point ones are added exactly (math.fsum).
    """
    total, means, stds = sum(pixels), [], []
    add = sum if sums.dtype.kind == "i" else math.fsum
    for first, second in zip(sums.T.tolist(), squares.T.tolist()):
        s1, s2 = add(first), add(second)
        means.append(s1 / total)
        stds.append(math.sqrt(max(total * s2 - s1 * s1, 0)) / total)
    return means, stds


def _pixels(rows: np.ndarray) -> list[int]:
    return (rows["height"].astype(np.int64) * rows["width"]).tolist()


def _numbers(values: Sequence[float], digits: int = 4) -> str:
    """`0.4850, 0.4560, 0.4060`, or one number where all are equal."""
    texts = [f"{value:.{digits}f}" for value in values]
    return texts[0] if len({*texts}) == 1 else ", ".join(texts)
