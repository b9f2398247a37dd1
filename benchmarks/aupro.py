"""Seconds of the pixel metrics of 115 maps of 256 x 256 (7.5 million pixels), the size of a category of MVTec AD.

python -m benchmarks.aupro            prints a Markdown table; `--write` also puts it in benchmarks/results/aupro.md
python -m benchmarks.aupro --peers    adds scikit-learn's AUROC and AP of the same pixels
"""

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.anomaly_metrics import area_to_limit, count_ranks, pixel_metrics, ranking_metrics, region_shares
from evaluation.bootstrap import with_intervals

N, SIZE, REPEATS = 115, 256, 5


def maps_and_masks() -> tuple[np.ndarray, np.ndarray]:
    """Blurred noise, one to three brighter rectangles in four pictures of five: (N, SIZE, SIZE) float32 and bool."""
    rng = np.random.default_rng(0)
    masks = np.zeros((N, SIZE, SIZE), dtype=bool)
    for i in range(N * 4 // 5):
        for _ in range(rng.integers(1, 4)):
            (y, x), (h, w) = rng.integers(0, SIZE * 3 // 4, 2), rng.integers(SIZE // 25, SIZE // 6, 2)
            masks[i, y : y + h, x : x + w] = True
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 4, 4)) * 14
    return (noise + 4 * gaussian_filter(masks.astype(np.float32), (0, 4, 4))).astype(np.float32), masks


def aupro_alone(maps: np.ndarray, masks: np.ndarray) -> list[np.ndarray]:
    positives, shares = maps[masks], region_shares(masks)
    order = np.argsort(positives)
    rates = count_ranks(positives[order], maps[~masks]).false_positive_rates
    return [area_to_limit(shares[order] / shares.sum(), *rates, limit=limit) for limit in (0.3, 0.05)]


def fastest(call: Callable[[], object], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/aupro.md")
    parser.add_argument("--peers", action="store_true", help="time scikit-learn too, about 20 s")
    options = parser.parse_args()
    maps, masks = maps_and_masks()
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    seconds = {
        "AU-PRO, limits 0.3 and 0.05": fastest(lambda: aupro_alone(maps, masks)),
        "pixel AUROC, AP and F1-max": fastest(
            lambda: ranking_metrics(count_ranks(np.sort(maps[masks]), maps[~masks])),
        ),
        "all five (`pixel_metrics`)": fastest(lambda: pixel_metrics(maps, masks)),
        "image and pixel figures with intervals, 1000 replicates": fastest(
            lambda: with_intervals(scores, labels, maps, masks), repeats=2
        ),
    }
    if options.peers:
        truth, flat = masks.ravel(), maps.ravel()
        seconds["scikit-learn `roc_auc_score`"] = fastest(lambda: roc_auc_score(truth, flat), repeats=1)
        seconds["scikit-learn `average_precision_score`"] = fastest(
            lambda: average_precision_score(truth, flat), repeats=1
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = f"{processor()}, {torch.get_num_threads()} threads | {torch.__version__} / {np.__version__} | {commit}"
    lines = [
        f"# Pixel metrics: {N} maps of {SIZE} x {SIZE}, {masks.mean():.1%} defect pixels",
        "",
        f"Fastest of {REPEATS} runs, by `python -m benchmarks.aupro --peers --write`.",
        "",
        "| figure | seconds | machine | torch / numpy | commit |",
        "|---|---|---|---|---|",
        *(f"| {name} | {value:.2f} | {where} |" for name, value in seconds.items()),
        "",
    ]
    print("\n".join(lines))
    if options.write:
        (Path(__file__).parent / "results" / "aupro.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
