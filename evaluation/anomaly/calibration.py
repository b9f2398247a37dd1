"""What a detector learns from normal images that it was not fitted on: thresholds and the heat maps' color scale."""

from evaluation.anomaly.detection import region_maps
from evaluation.anomaly.display import heat_range
from evaluation.anomaly.thresholds import normal_threshold, pixel_threshold, suspicious
from models.anomaly.detector import Findings


def calibrate(normal: Findings | None, loader, false_alarm_rate: float) -> dict:
    """Plain values for the checkpoint, None where there are no findings or no maps.

    scores: of the normal images; threshold: of image scores; pixel_threshold: of map pixels; promised_false_alarm_rate:
    what so few images can promise; low, high: the color scale; suspicious: the images whose score is far above the
    others', [{path, score}], perhaps defects among the normals.

    Args:
        normal: findings of the images of `loader`, in its order, each left out or held out.
    """
    values = dict.fromkeys(("scores", "threshold", "pixel_threshold", "low", "high"))
    values |= {"promised_false_alarm_rate": None, "n_normals": 0, "suspicious": []}
    if normal is None:
        return values
    values["promised_false_alarm_rate"] = max(false_alarm_rate, 1 / (len(normal.scores) + 1))
    values |= {
        "n_normals": len(normal.scores),
        "scores": normal.scores.tolist(),
        "threshold": normal_threshold(normal.scores, false_alarm_rate=false_alarm_rate),
    }
    values["suspicious"] = suspicious(normal.scores, [loader.dataset.full_name(i) for i in loader.indices.tolist()])
    if normal.maps is not None:
        maps = region_maps(normal.maps, loader.dataset, indices=loader.indices)
        values["pixel_threshold"] = pixel_threshold(maps, false_alarm_rate)
        values["low"], values["high"] = heat_range(maps)
    return values


def promise(calibration: dict) -> str:
    """What to tell the user when the wanted rate cannot be promised."""
    n, rate = calibration["n_normals"], calibration["promised_false_alarm_rate"]
    if rate is None:
        why = "the detector was fitted on all normal images and can leave none out, as they are too few or too similar"
        return f"no threshold: {why}; add some, or set holdout=0.1"
    return f"{n} normals cannot promise false_alarm_rate: the threshold is their largest score, good for {rate:.1%}"
