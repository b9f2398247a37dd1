"""Dark, light, blurred and low-information images, by the measures and limits of CleanVision 0.3.

The limits are absolute, made for photographs: on plain surfaces they find many. So the worst come first, and the
histograms show whether an image stands apart or all are so.
"""

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
    """A tenth of the entropy in bits of the histogram of all channels together: (N,)."""
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
    problems, parts, charts = [], [], {}
    total = sum(len(split.readable) for split in splits.values())
    for kind, measure in MEASURES.items():
        scores = {name: measure.score(split.rows[split.readable]) for name, split in splits.items()}
        odd = {name: values < measure.limit if measure.below else values > measure.limit
               for name, values in scores.items()}  # fmt: skip
        found = sum(int(flags.sum()) for flags in odd.values())
        numbers[kind] = {name: int(flags.sum()) for name, flags in odd.items()} | {"limit": measure.limit}
        title = f"{measure.axis.capitalize()}: {kind} {'below' if measure.below else 'above'} {measure.limit:g}"
        charts[kind] = Chart(histogram_svg(title, scores, measure.limit, below=measure.below))
        if not found:
            continue
        text = f"{count(found, 'image')} ({found / total:.1%}) {'is' if found == 1 else 'are'} {kind}"
        problems.append(Problem("warning" if found / total < 0.5 else "note", text))
        worst = sorted(
            ((s if measure.below else -s), name, i)
            for name, split in splits.items()
            for i, s in zip(split.readable[odd[name]].tolist(), scores[name][odd[name]].tolist())
        )[:SHOWN]
        numbers[kind]["worst"] = [{"split": n, "image": splits[n].names[i], "score": abs(s)} for s, n, i in worst]
        tiles = [(f"{splits[n].names[i]}: {abs(s):.3f}", tile(splits[n].dataset, i, SIDE)) for s, n, i in worst]
        shown = f"the {len(worst)} worst of {found:,}" if found > len(worst) else "worst first"
        parts.append(Gallery(f"{kind.capitalize()} images", tiles, f"{shown}, with their {measure.axis}"))
    about = (
        "The limits are those of CleanVision, made for photographs. On plain surfaces many images lie beyond them: look "
        "whether an image stands apart from the others."
    )
    charts.pop("light")  # of the same scores as `dark`
    return Section("odd_images", "Dark, light, blurred and other odd images", numbers, problems,
                   [about, *charts.values(), *parts])  # fmt: skip
