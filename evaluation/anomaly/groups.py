"""Metrics of a whole test set, and of each of its groups: the categories of one detector, the lightings of MVTec AD 2.

A group's metrics are what a test of its images alone gives with the same scores, intervals included.
"""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.dataset import Dataset
from evaluation.anomaly.bootstrap import Histograms, pixel_histograms
from evaluation.anomaly.detection import alarms, anomaly_results, region_maps, region_masks, without_pixels
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS, segmentation_f1
from evaluation.anomaly.pimo import aupimo, aupimo_results
from evaluation.anomaly.spro import SPRO_LIMITS, spro_means, spro_rows
from evaluation.anomaly.unseen import crop_results
from evaluation.tables import markdown_table, with_interval
from models.anomaly.detector import Findings

AVERAGED = (*IMAGE_METRICS, *PIXEL_METRICS, "aupimo", *SPRO_LIMITS, "segmentation_f1", "segmentation_f1_3sigma")


class Examined(NamedTuple):
    """N test images and what a detector says of them."""

    dataset: Dataset
    scores: Tensor  # (N,)
    maps: list[Tensor] | None  # N times (h, w), without pixels where it is not known which are defective
    masks: list[Tensor] | None  # likewise; None: the set has none
    originals: list[Tensor] | None  # maps at the size of the files, for the sPRO; None: the set has no regions for it

    def only(self, positions: list[int]) -> "Examined":
        lists = ([own[i] for i in positions] if own is not None else None for own in self[2:])
        return Examined(self.dataset.only(positions), self.scores[positions], *lists)


class Measured(NamedTuple):
    results: dict[str, Any]
    histograms: Histograms | None  # of pixels; None where pixel metrics are undefined
    areas: np.ndarray | None  # AUPIMO of each image; None without it


def examined(found: Findings, dataset: Dataset, *, original: bool) -> Examined:
    """`original`: pixel metrics at the original files' resolution."""
    maps = None if found.maps is None else region_maps(found.maps, dataset, original=original)
    if maps is None or not dataset.has_masks:
        return Examined(dataset, found.scores, maps, None, None)
    originals = None
    if dataset.saturates:
        originals = maps if original else region_maps(found.maps, dataset, original=True)
    masks = region_masks(dataset, original=original)
    maps, masks = (without_pixels(values, dataset.mask_known) for values in (maps, masks))
    return Examined(dataset, found.scores, maps, masks, originals)


def all_results(test: Examined, calibration: dict, *, seed: int) -> Measured:
    """`measure` of the whole set. Of each kind of its groups also `per_<kind>`: {group: `measure` of it}, and of each
    metric that all of them have `<metric>_<kind>_mean`.

    A category's row has `category_threshold` and so on beside `threshold`: `at_thresholds` of its own normal images.
    The rows of `per_defect` are then against the good images of the defect's category.
    """
    rows: dict[str, dict[str, dict]] = {}
    for kind, names in test.dataset.groups.items():
        rows[kind] = {}
        for name in sorted({*names}):
            part = test.only([i for i, own in enumerate(names) if own == name])
            rows[kind][name] = measure(part, calibration, seed=seed).results
            if kind == "category" and name in calibration["per_category"]:
                own = at_thresholds(part, calibration["per_category"][name])
                rows[kind][name] |= {f"category_{key}": value for key, value in own.items()}
    defects = None
    for kind, own in rows.items():
        found = {name: row for results in own.values() for name, row in results.pop("per_defect").items()}
        defects = found if kind == "category" else defects
    whole = measure(test, calibration, seed=seed, per_defect=defects)
    for kind, own in rows.items():
        whole.results[f"per_{kind}"] = own
        for key in AVERAGED:
            values = [row.get(key) for row in own.values()]
            if None not in values:
                whole.results[f"{key}_{kind}_mean"] = sum(values) / len(values)
    return whole


def measure(test: Examined, calibration: dict, *, seed: int, per_defect: dict[str, dict] | None = None) -> Measured:
    """All metrics of a set of images. `per_defect`: its rows, if they are there already."""
    dataset, scores, maps, masks, originals = test
    shown = masks is not None and any(m.any() for m in masks) and not all(m.all() for m in masks)
    histograms = pixel_histograms(maps, masks) if shown else None
    about: dict[str, Any] = {"seed": seed, "histograms": histograms, "per_defect": per_defect}
    results = anomaly_results(scores, maps, masks, dataset, calibration["threshold"], **about)
    areas, rows = None, results["per_defect"]
    if masks is not None:
        areas = aupimo(maps, masks, dataset.labels)
        results |= aupimo_results(areas, dataset, rows if per_defect is None else {}, seed=seed)
    if originals is not None:
        if per_defect is None:
            spro_rows(originals, dataset, rows)
        results |= spro_means(rows)
    results |= at_thresholds(test, calibration)
    if dataset.geometry.fit == "crop":
        results |= crop_results(scores, maps, masks, dataset)
    return Measured(results, histograms, areas)


def at_thresholds(test: Examined, calibration: dict) -> dict[str, float | None]:
    """What the thresholds of `calibrate` do on these images: `alarms` of the image threshold, and with masks the
    segmentation F1 of the pixel threshold and of MVTec AD 2's, three standard deviations above the mean."""
    threshold = calibration["threshold"]
    results = {"threshold": threshold, **alarms(test.scores, test.dataset.labels, threshold)}
    for end in ("", "_3sigma"):
        limit = results[f"pixel_threshold{end}"] = calibration[f"pixel_threshold{end}"]
        if test.masks is not None:
            f1 = None if limit is None else segmentation_f1(test.maps, test.masks, limit)
            results[f"segmentation_f1{end}"] = f1
    return results


def group_table(results: dict, kind: str) -> str:
    """Markdown: a row per group of a kind, their mean, and all images together."""
    keys = {"image AUROC": "image_auroc", "image AP": "image_ap", "pixel AUROC": "pixel_auroc", "AU-PRO 0.3": "aupro"}
    keys |= {"AU-PRO 0.05": "aupro_005", "F1 3 sigma": "segmentation_f1_3sigma"}
    rates = ["observed_false_alarms", "observed_detections"]
    header, own = [kind, "good", "defective", *keys, "false alarms", "found"], []
    if any(f"category_{rates[0]}" in row for row in results[f"per_{kind}"].values()):
        own = [f"category_{key}" for key in (*rates, "segmentation_f1_3sigma")]
        header += ["own thresholds: false alarms", "found", "F1 3 sigma"]
    rows = []
    for name, row in [*results[f"per_{kind}"].items(), ("all together", results)]:
        counts = [str(row["n_test_normal"]), str(row["n_test_anomalous"])]
        shares = ["-" if row.get(key) is None else f"{row[key]:.1%}" for key in (*rates, *own[:2])]
        shares += [with_interval(row, key) for key in own[2:]]
        rows.append([name, *counts, *(with_interval(row, key) for key in keys.values()), *shares])
    means = [with_interval(results, f"{key}_{kind}_mean") for key in keys.values()]
    rows.insert(-1, ["mean", "", "", *means, *[""] * len(rates + own)])
    return markdown_table(header, rows)
