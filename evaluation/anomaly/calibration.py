"""What a detector learns from normal images that it was not fitted on: thresholds and the heat maps' color scale."""

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset
from evaluation.anomaly.detection import region_maps
from evaluation.anomaly.display import heat_range
from evaluation.anomaly.thresholds import normal_threshold, pixel_threshold, suspicious, three_sigma
from models.anomaly.detector import Findings

_NONE = dict.fromkeys(("scores", "threshold", "pixel_threshold", "pixel_threshold_3sigma", "low", "high"))
_NONE |= {"promised_false_alarm_rate": None, "n_normals": 0}


def calibrate(normal: Findings | None, loader, false_alarm_rate: float) -> dict:
    """Plain values for the checkpoint, None where there are no findings or no maps.

    scores: of the normal images; threshold: of image scores; pixel_threshold: of map pixels, and pixel_threshold_3sigma
    by MVTec AD 2's rule; promised_false_alarm_rate: what so few images can promise; low, high: the color scale;
    suspicious: the images whose score is far above the others', [{path, score}], perhaps defects among the normals;
    per_category: of a set of several the same of each one's normal images, {} of others. With several an image is
    suspicious among those of its category.

    Args:
        normal: findings of the images of `loader`, in its order, each left out or held out.
    """
    if normal is None:
        return _NONE | {"suspicious": [], "per_category": {}}
    values, each = _calibrated(normal, loader.dataset, loader.indices, false_alarm_rate), {}
    if categories := loader.dataset.groups.get("category"):
        own = np.array([categories[i] for i in loader.indices.tolist()])
        for name in sorted({*own.tolist()}):
            rows = torch.from_numpy(np.flatnonzero(own == name))
            part = Findings(*(None if value is None else value[rows] for value in normal))
            each[name] = _calibrated(part, loader.dataset, loader.indices[rows], false_alarm_rate)
        suspects = [line for one in each.values() for line in one["suspicious"]]
        values["suspicious"] = sorted(suspects, key=lambda line: -line["score"])
    return values | {"per_category": each}


def _calibrated(normal: Findings, dataset: Dataset, indices: Tensor, false_alarm_rate: float) -> dict:
    values = dict(_NONE)
    values["promised_false_alarm_rate"] = max(false_alarm_rate, 1 / (len(normal.scores) + 1))
    values |= {
        "n_normals": len(normal.scores),
        "scores": normal.scores.tolist(),
        "threshold": normal_threshold(normal.scores, false_alarm_rate=false_alarm_rate),
    }
    values["suspicious"] = suspicious(normal.scores, [dataset.full_name(i) for i in indices.tolist()])
    if normal.maps is not None:
        maps = region_maps(normal.maps, dataset, indices=indices)
        values["pixel_threshold"] = pixel_threshold(maps, false_alarm_rate)
        values["pixel_threshold_3sigma"] = three_sigma(maps)
        values["low"], values["high"] = heat_range(maps)
    return values


def promise(calibration: dict) -> str:
    """What to tell the user when the wanted rate cannot be promised."""
    n, rate = calibration["n_normals"], calibration["promised_false_alarm_rate"]
    if rate is None:
        why = "the detector was fitted on all normal images and can leave none out, as they are too few or too similar"
        return f"no threshold: {why}; add some, or set holdout=0.1"
    return f"{n} normals cannot promise false_alarm_rate: the threshold is their largest score, good for {rate:.1%}"
