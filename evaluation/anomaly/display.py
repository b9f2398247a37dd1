"""What plots/ draws of a test, computed: the images worth a look, the heat maps' color scale, and the curves."""

import numpy as np

from evaluation.anomaly.metrics import Array, real_numbers, to_numpy
from plots.curves import RankingCurves
from plots.heatmaps import Caption


def heat_range(maps: Array | list[Array]) -> tuple[float, float]:
    """(low, high) of one color scale for all images, from maps of normal images only, (N, H, W) or a list.

    low = median pixel, so that half of a normal image stays bare; high = low + 1.5 (q - low), q the 99.9 % quantile:
    the hottest spots of normal images come out at two thirds of the ramp, and only what lies beyond them glows. The
    normals should not be those the detector memorized, whose maps are too cold. Never use test defects here: a scale
    stretched per image paints an alarm on every good one.

    Raises:
        UserError: a pixel is NaN.
    """
    pixels = np.concatenate([to_numpy(m).ravel() for m in maps])
    low, q = np.quantile(real_numbers(pixels, "pixels of normal anomaly maps"), (0.5, 0.999)).tolist()
    return low, low + 1.5 * (q - low) if q > low else low + 1


def pick_images(
    scores: Array,
    labels: Array,
    defects: list[str],
    threshold: float | None,
    *,
    each: int = 3,
    kinds: list[str] | None = None,
) -> list[Caption]:
    """Choose the images that tell most about a detector; every image at most once.

    In this order: the `each` defects that scored lowest (misses, if not above the threshold), the `each` good images
    that scored highest (false alarms, if above it), then of every kind of defective images the highest and the
    median one, and the median good one of every kind. Without a threshold there is no verdict.

    Args:
        scores: (N,). labels: (N,) 0 or 1. defects: N names, "good" for the normal ones.
        kinds: N names of what is either all good or all defective; none: `defects`.

    Raises:
        UserError: a score is NaN.
    """
    scores, labels = real_numbers(to_numpy(scores), "image scores"), to_numpy(labels).astype(bool)
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    by_score = np.argsort(scores, kind="stable")
    bad, good = by_score[labels[by_score]], by_score[~labels[by_score]]
    chosen = [(i, "low for a defect") for i in bad[:each]] + [(i, "high for a good one") for i in good[::-1][:each]]
    kinds = defects if kinds is None else kinds
    is_defective = dict(zip(kinds, labels.tolist()))
    for name in sorted(is_defective, key=lambda name: (not is_defective[name], name)):
        members = [i for i in by_score if kinds[i] == name]
        if is_defective[name]:
            chosen.append((members[-1], "highest of its kind"))
        chosen.append((members[(len(members) - 1) // 2], "median of its kind"))
    captions: dict[int, Caption] = {}
    for i, reason in chosen:
        heading, correct, verdict, limit = "no threshold", None, [], ""
        if threshold is not None:
            alarm = bool(scores[i] > threshold)
            correct = alarm == bool(labels[i])
            heading = "correct" if correct else "false alarm" if alarm else "missed"
            verdict, limit = [f"called {'anomalous' if alarm else 'normal'}"], f" (threshold {threshold:.4g})"
        lines = [defects[i], *verdict, f"score {scores[i]:.4g}{limit}", f"rank {rank[i]} of {len(scores)}", reason]
        captions.setdefault(int(i), Caption(int(i), heading, lines, correct))
    return list(captions.values())


def ranking_curves(
    scores: Array, labels: Array, metrics: dict[str, float | None], threshold: float | None
) -> RankingCurves:
    """ROC and precision-recall curve of image scores (N,) with labels (N,) 0 or 1, a point at each distinct score.

    Args:
        metrics: `image_metrics` of the same scores.
        threshold: an image is called anomalous above it.

    Raises:
        UserError: a score is NaN.
    """
    scores, labels = real_numbers(to_numpy(scores), "image scores"), to_numpy(labels).astype(bool)
    n_normal, n_anomalous = int((~labels).sum()), int(labels.sum())
    order = np.argsort(-scores, kind="stable")
    last = np.diff(scores[order], append=np.nan) != 0  # (N,) the last of equal scores
    found, alarms = labels[order].cumsum()[last], np.arange(1, len(labels) + 1)[last]  # (P,) each
    above = np.zeros(len(scores), bool) if threshold is None else scores > threshold
    return RankingCurves(
        false_alarm_rate=(alarms - found) / max(1, n_normal),
        recall=found / max(1, n_anomalous),
        precision=found / alarms,
        auroc=metrics["image_auroc"],
        ap=metrics["image_ap"],
        n_normal=n_normal,
        n_anomalous=n_anomalous,
        threshold=threshold,
        hits=int((above & labels).sum()),
        false_alarms=int((above & ~labels).sum()),
    )
