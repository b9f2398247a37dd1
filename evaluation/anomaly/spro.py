"""Saturated per-region overlap, the metric of MVTec LOCO AD (Bergmann et al. 2022, section 5.2)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from evaluation.anomaly.metrics import area_under, count_ranks, score_maps, to_numpy

SPRO_LIMITS = {"spro_005": 0.05, "spro_001": 0.01, "spro_010": 0.1, "spro_030": 0.3, "spro_100": 1.0}  # the first leads

Region = tuple[Tensor, int]  # bool (h, w), and how many of its pixels found are all of it


def spro(maps: Sequence[Tensor], regions: Sequence[Sequence[Region]]) -> dict[str, float | None]:
    """Area under the mean sPRO of all regions against the false-positive rate, up to each limit and divided by it.

    `maps` N arrays (h, w), and for each its regions, good images having none; regions may overlap. At a threshold the
    sPRO of a region is min(its pixels above / its saturation area, 1). The rate is over all pixels outside of all
    regions. Exact, linear between distinct scores and at the limit (the official script leaves out points of the curve
    that are closer than 0.001). All None without a region or without a pixel outside.

    Raises:
        UserError: a score is NaN.
    """
    scored = score_maps([to_numpy(scores) for scores in maps], "anomaly-map pixels")
    unions, values, gains = [], [], []
    for scores, own in zip(scored, regions):
        union = np.zeros(scores.shape, bool)
        for mask, area in own:
            inside = to_numpy(mask)
            union |= inside
            found = np.sort(scores[inside])[::-1]
            values.append(found)
            gains.append((np.arange(len(found)) < area) / area)  # the highest `area` pixels saturate the region
        unions.append(union)
    if not values or all(union.all() for union in unions):
        return dict.fromkeys(SPRO_LIMITS)
    positives = np.concatenate(values)
    order = np.argsort(positives)
    counts, gain = count_ranks(positives[order], scored, unions), np.concatenate(gains)[order]
    return {key: area_under(gain, counts, limit) / len(values) for key, limit in SPRO_LIMITS.items()}


def spro_rows(maps: Sequence[Tensor], dataset, per_defect: dict[str, dict]) -> None:
    """Put `spro` of each kind of defect against the good images into its row of `per_defect`.

    `maps` at the size of the originals. A defective image whose mask is missing is in no sPRO.
    """
    known, defects = dataset.mask_known.tolist(), dataset.defects
    for name, row in per_defect.items():
        chosen = [i for i, defect in enumerate(defects) if defect in (name, "good") and known[i]]
        row |= spro([maps[i] for i in chosen], [dataset.regions(i) for i in chosen])


def spro_means(per_defect: dict[str, dict]) -> dict[str, float | None]:
    """The means of `spro` over the kinds of defects, and `image_auroc_mean`, that of their image AUROCs."""
    means = {}
    for key in ("image_auroc", *SPRO_LIMITS):
        values = [row[key] for row in per_defect.values() if row[key] is not None]
        means[f"{key}_mean" if key == "image_auroc" else key] = sum(values) / len(values) if values else None
    return means


def spro_line(results: dict) -> str:
    """`spro_means`, among the results of the test, in one line."""
    rows = [("mean", results | {"image_auroc": results["image_auroc_mean"]}), *results["per_defect"].items()]
    texts = [
        [f"{name}:"] + ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("image_auroc", "spro_005")]
        for name, row in rows
    ]
    return "image AUROC and sPRO to a rate of 0.05, each against the good images: " + ", ".join(map(" ".join, texts))
