"""What a run of train_anomaly.py shows of its test: metrics, tables, curves, images, in its folder and TensorBoard.

test_scores.csv (a line per image, with its category or lighting where the set has those), test_scores.pt (for eval.py
task=compare), heatmaps.png (the best, the worst and the most mistaken; where no normal was spared for thresholds, the
scale of the colors is that of the good test images), neighbors.png (what they were compared with), curves.png,
scores.png.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from evaluation.anomaly.compare import save_scores
from evaluation.anomaly.display import heat_range, pick_images, ranking_curves
from evaluation.anomaly.groups import all_results, examined, group_table
from evaluation.anomaly.pimo import BOUNDS
from evaluation.anomaly.spro import spro_line
from evaluation.anomaly.unseen import crop_line
from evaluation.tables import csv_table, markdown_table, with_interval
from models.anomaly.detector import Findings
from plots.curves import histogram_image, roc_pr_image
from plots.heatmaps import Caption, Row, save, sheet
from plots.neighbors import Pair, neighbor_sheet
from runtime.files import whole_file
from runtime.log import Log
from runtime.text import printable

ROWS = 4  # of a sheet in TensorBoard; the files in the run folder have all


def report(
    log: Log, found: Findings, test_set, learned_set, normal: Findings | None, calibration: dict, *, original: bool
) -> dict:
    """Write and log everything on the test images; returns what results.json gets of it.

    Args:
        found: findings of `test_set`. learned_set: the images that its `nearest_image` counts.
        normal: findings of the images that the thresholds are from.
        original: pixel metrics at the original files' resolution.
    """
    threshold, folder, seed = calibration["threshold"], log.folder, log.config["seed"]
    has_masks = found.maps is not None and test_set.has_masks
    test = examined(found, test_set, original=original)
    results, histograms, areas = all_results(test, calibration, seed=seed)
    maps = test.maps
    if has_masks and areas is None:
        log.say(f"AUPIMO: none, for the good test images have fewer than {1 / BOUNDS[0]:,.0f} pixels")
    if has_masks and test_set.saturates:
        log.say(spro_line(results))
    results |= {key: calibration[key] for key in ("promised_false_alarm_rate", "n_normals", "suspicious")}
    if test_set.geometry.fit == "crop":
        log.say(crop_line(results))
    for line in calibration["suspicious"]:
        log.say(f"suspicious normal, look at it: {line['path']} (score {line['score']:.4g})")
    write_scores(folder, found, test_set, learned_set, threshold, areas)
    save_scores(folder / "test_scores.pt", test_set.names, test_set.labels, found.scores, results, histograms)

    tables = {"per defect": defect_table(results)}
    tables |= {f"per {kind}": group_table(results, kind) for kind in test_set.groups}
    for name, table in tables.items():
        log.text(name, table)
        print(printable(table), file=sys.stderr)
    defects = np.array(test_set.defects)
    kinds = np.array(kinds_of(test_set))
    groups = {"training normals": normal.scores} if normal is not None else {}
    groups |= {name: found.scores[kinds == name] for name in sorted({*kinds.tolist()}, key=good_first)}
    for name, scores in groups.items():
        log.histogram(f"scores/{name}", scores)
    show(log, "scores", histogram_image(groups, threshold))
    if results["image_auroc"] is not None:
        curves = ranking_curves(found.scores, test_set.labels, results, threshold)
        show(log, "curves", roc_pr_image(curves, log.config["run_name"]))
        least, most = found.scores.min(), found.scores.max()
        share = (found.scores - least) / (most - least).clamp(min=1e-12)
        log.precision_recall("precision_recall", test_set.labels, share)

    chosen = pick_images(found.scores, test_set.labels, test_set.defects, threshold, kinds=kinds.tolist())
    title = f"{log.config['detector']['name']}, {log.config['backbone']['name']}, {log.config['run_name']}"
    low, high = calibration["low"], calibration["high"]
    if maps is not None and low is None and (defects == "good").any():  # no normals to spare
        low, high = heat_range([maps[i] for i in np.flatnonzero(defects == "good")])
    if maps is not None and low is not None:
        rows = [image_row(found, test_set, caption) for caption in chosen]
        scale = {"low": low, "high": high, "pixel_threshold": calibration["pixel_threshold"]}
        drawn = partial(sheet, **scale)
        save(drawn(rows, title=title), folder / "heatmaps.png")
        show_pages(log, "heatmaps", partial(drawn, columns=1), rows, title)
    if found.nearest_image is not None:
        pairs = [neighbor_pair(found, test_set, learned_set, caption) for caption in chosen]
        title += ": what comes nearest"
        save(neighbor_sheet(pairs, title=title), folder / "neighbors.png")
        show_pages(log, "neighbors", neighbor_sheet, pairs, title)
    return results


def kinds_of(test_set) -> list[str]:
    """What images are shown by: their defects; of several categories "<category>: good" and "<category>: defective"."""
    if "category" not in test_set.groups:
        return test_set.defects
    pairs = zip(test_set.groups["category"], test_set.defects)
    return [f"{category}: {'good' if defect == 'good' else 'defective'}" for category, defect in pairs]


def good_first(name: str) -> tuple:
    """Sorts the values of `kinds_of`."""
    return name != "good", name.rpartition(": ")[0], not name.endswith(": good"), name


def show(log: Log, name: str, image: Image.Image) -> None:
    """Put <name>.png into the run folder, and into TensorBoard."""
    save(image, log.folder / f"{name}.png")
    log.image(name, pil_to_tensor(image))


def show_pages(log: Log, name: str, draw: Callable, rows: list, title: str) -> None:
    """Put sheets of a few rows each, readable at once, into TensorBoard; `draw(rows, title=...)` makes one."""
    pages = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    for number, page in enumerate(pages, 1):
        which = f"{number} of {len(pages)}"
        log.image(f"{name}/{which}", pil_to_tensor(draw(page, title=f"{which}: {title}")))


def image_row(found: Findings, dataset, caption: Caption) -> Row:
    image, mask, *_ = dataset[caption.index]
    mask = mask if dataset.has_masks and dataset.mask_known[caption.index] else None
    peak = None if found.peaks is None else tuple(found.peaks[caption.index].tolist())
    return Row(image, found.maps[caption.index], mask, peak, caption)


def neighbor_pair(found: Findings, test_set, train_set, caption: Caption) -> Pair:
    """The image of a caption beside the training image that its most anomalous patch is nearest to."""
    number = int(found.nearest_image[caption.index])
    places = [None if p is None else tuple(p[caption.index].tolist()) for p in (found.peaks, found.nearest_positions)]
    lines = [caption.heading, *caption.lines, "nearest:", os.path.basename(train_set.full_name(number))]
    return Pair(test_set[caption.index][0], places[0], train_set[number][0], places[1], lines, caption.correct)


def write_scores(
    folder: Path, found: Findings, test_set, train_set, threshold: float | None, areas: np.ndarray | None
) -> None:
    """test_scores.csv: path, the set's groups, defect, label, score, is_anomalous, nearest_training_image, aupimo
    (`areas`)."""
    groups = test_set.groups
    rows = []
    for i, (defect, score) in enumerate(zip(test_set.defects, found.scores.tolist())):
        row = {"path": test_set.full_name(i), **{kind: names[i] for kind, names in groups.items()}, "defect": defect}
        row |= {"label": int(test_set.labels[i]), "score": score}
        row["is_anomalous"] = None if threshold is None else int(score > threshold)
        row["nearest_training_image"] = (
            None if found.nearest_image is None else train_set.full_name(int(found.nearest_image[i]))
        )
        row["aupimo"] = None if areas is None or np.isnan(areas[i]) else float(areas[i])
        rows.append(row)
    with whole_file(folder / "test_scores.csv", durable=True) as file:
        file.write(csv_table(rows))


def defect_table(results: dict) -> str:
    """Markdown: each defect against all good images, and all of them together with intervals."""
    header = ["defect", "images", "image AUROC", "pixel AUROC", "AU-PRO 0.3", "AU-PRO 0.05", "AU-PRO 0.01", "AUPIMO"]
    keys = ("image_auroc", "pixel_auroc", "aupro", "aupro_005", "aupro_001", "aupimo")
    rows = [[name, str(f["n"]), *(with_interval(f, key) for key in keys)] for name, f in results["per_defect"].items()]
    rows.append(["all", str(results["n_test_anomalous"]), *(with_interval(results, key) for key in keys)])
    return markdown_table(header, rows)
