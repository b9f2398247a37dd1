"""Dark, light, blurred and low-information images, by the measures and limits of CleanVision 0.3.

The limits are absolute, made for photographs: on plain surfaces they find many. So the worst come first, and the
histograms show whether an image stands apart or all are so.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from evaluation.dataset.inspection import Inspected, tile
from evaluation.dataset.section import Chart, Gallery, Problem, Section, count
from plots.bars import histogram_svg

SHOWN, SIDE = 12, 160  # tiles of each kind, and pixels of their longer side


def brightness(rows: np.ndarray) -> np.ndarray:
    """sqrt(0.241 R^2 + 0.691 G^2 + 0.068 B^2) / 255 of the channels' means: (N,) in [0, 1]."""
    means = rows["sums"] / (rows["height"].astype(np.float64) * rows["width"])[:, None]  # (N, 3)
    return np.sqrt((means**2 * (0.241, 0.691, 0.068)).sum(1)) / 255


def sharpness(rows: np.ndarray) -> np.ndarray:
    """1 - exp(-0.001 * variance of Pillow's FIND_EDGES of the gray image): (N,) in [0, 1)."""
    pixels = rows["height"].astype(np.float64) * rows["width"]
    return 1 - np.exp(-0.001 * (rows["edges_squared"] / pixels - (rows["edges"] / pixels) ** 2))


def information(rows: np.ndarray) -> np.ndarray:
    """A tenth of the entropy in bits of the histogram of all channels together: (N,).

    As CleanVision's, but of one channel where all are equal: whether a gray image is stored as one must not matter.
    """
    return rows["entropy"] / 10


def proportion(rows: np.ndarray) -> np.ndarray:
    """The short side as a share of the long one: (N,) in (0, 1]."""
    return np.minimum(rows["height"], rows["width"]) / np.maximum(rows["height"], rows["width"])


class Measure(NamedTuple):
    score: Callable[[np.ndarray], np.ndarray]
    limit: float
    below: bool  # whether scores below the limit are odd, or those above
    axis: str  # what the score is


MEASURES = {
    "dark": Measure(brightness, 0.22, True, "brightness"),
    "light": Measure(brightness, 0.95, False, "brightness"),
    "blurred": Measure(sharpness, 0.3, True, "sharpness"),
    "low-information": Measure(information, 0.3, True, "entropy in bits / 10"),
    "elongated": Measure(proportion, 0.5, True, "short side / long side"),
}


def odd_images(splits: dict[str, Inspected]) -> Section:
    """Images beyond a limit: counts, histograms and the worst ones."""
    numbers: dict = {}
    problems, parts = [], []
    total = sum(len(split.readable) for split in splits.values())
    for kind, measure in MEASURES.items():
        scores = {name: measure.score(split.rows[split.readable]) for name, split in splits.items()}
        odd = {name: values < measure.limit if measure.below else values > measure.limit
               for name, values in scores.items()}  # fmt: skip
        found = sum(int(flags.sum()) for flags in odd.values())
        numbers[kind] = {name: int(flags.sum()) for name, flags in odd.items()} | {"limit": measure.limit}
        if not found:
            continue
        share = f"{found / total:.1%}" if found / total >= 0.0005 else "less than 0.1%"
        text = f"{count(found, 'image')} ({share}) {'is' if found == 1 else 'are'} {kind}"
        problems.append(Problem("warning" if found / total < 0.5 else "note", text))
        beyond = (
            ((s if measure.below else -s), name, i)
            for name, split in splits.items()
            for i, s in zip(split.readable[odd[name]].tolist(), scores[name][odd[name]].tolist())
        )
        worst = heapq.nsmallest(SHOWN, beyond)
        numbers[kind]["worst"] = [{"split": n, "image": splits[n].names[i], "score": abs(s)} for s, n, i in worst]
        tiles = [(f"{splits[n].names[i]}\n{abs(s):.3f}", tile(splits[n].dataset, i, SIDE)) for s, n, i in worst]
        shown = f"the {len(worst)} worst of {found:,}" if found > len(worst) else "worst first"
        parts.append(Gallery(f"{kind.capitalize()} images", tiles, f"{shown}, with their {measure.axis}"))
    about = (
        "The limits are those of CleanVision, made for photographs. On plain surfaces many images lie beyond them: see "
        "whether an image stands apart from the others."
    )
    title = "Dark, light, blurred and other odd images"
    return Section("odd_images", title, numbers, problems, [about, *_charts(splits), *parts])


def _charts(splits: dict[str, Inspected]) -> list[Chart]:
    """A histogram of each score that is not the same for all images, with its limits."""
    charts = []
    for score in dict.fromkeys(measure.score for measure in MEASURES.values()):
        groups = {name: score(split.rows[split.readable]) for name, split in splits.items()}
        if len(np.unique(np.concatenate(list(groups.values())))) < 2:
            continue
        about = {kind: measure for kind, measure in MEASURES.items() if measure.score is score}
        words = [f"{kind} {'below' if m.below else 'above'} {m.limit:g}" for kind, m in about.items()]
        axis = next(iter(about.values())).axis
        low, high = ([m.limit for m in about.values() if m.below is below] for below in (True, False))
        title = f"{axis[0].upper()}{axis[1:]}: {', '.join(words)}"
        charts.append(Chart(histogram_svg(title, groups, low=min(low, default=None), high=min(high, default=None))))
    return charts
