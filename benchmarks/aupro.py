"""Seconds and memory of the pixel metrics: 115 maps of 256 x 256 (a category of MVTec AD) and 150 of 1024 x 1024.

python -m benchmarks.aupro            prints a Markdown table; `--write` also puts it in benchmarks/results/aupro.md
python -m benchmarks.aupro --peers    adds scikit-learn's AUROC and AP of the small maps' pixels

The first lines are AU-PRO of 60 maps of 256 x 256 against anomalib's way since 2.3, one sort of all pixels in torch
(written anew here, without its checks): the two take turns in one process, and the fastest turn of each counts. Each
other line is measured in a process of its own. Its peak memory is all of the process: Python with its libraries,
float32 maps and bool masks (629 + 157 MB for the large ones), and the work.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.machine import processor
from evaluation.anomaly.bootstrap import with_intervals
from evaluation.anomaly.metrics import (
    NEIGHBORS_8,
    PRO_LIMITS,
    area_under,
    count_ranks,
    pixel_metrics,
    sorted_positives,
)
from runtime.version import commit

SMALL, LARGE = (115, 256), (150, 1024)  # images, pixels a side
GOALS = {SMALL: "under 0.3 s", LARGE: "under 2 GB"}  # of AU-PRO


def maps_and_masks(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blurred noise, one to three brighter rectangles in four images of five: (N, S, S) float32 and bool."""
    rng = np.random.default_rng(0)
    maps, masks = np.empty((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        for _ in range(rng.integers(1, 4) if i < n * 4 // 5 else 0):
            (y, x), (h, w) = rng.integers(0, size * 3 // 4, 2), rng.integers(size // 25, size // 6, 2)
            masks[i, y : y + h, x : x + w] = True
        noise = rng.standard_normal((size, size), np.float32)
        maps[i] = ndimage.gaussian_filter(noise * 14 + 4 * masks[i], size / 64)
    return maps, masks


def aupro_alone(maps: np.ndarray, masks: np.ndarray) -> list[float]:
    positives, shares = sorted_positives(maps, masks)
    counts = count_ranks(positives, maps, masks)
    return [area_under(shares, counts, limit) / shares.sum() for limit in PRO_LIMITS]


def intervals(maps: np.ndarray, masks: np.ndarray) -> dict:
    return with_intervals(maps.max((1, 2)), masks.any((1, 2)), maps, masks)


def one_sort(maps: np.ndarray, masks: np.ndarray) -> list[float]:
    """AU-PRO at PRO_LIMITS by one torch sort of all pixels, and running sums of regions' shares and of background."""
    numbered, n_regions = np.zeros(masks.shape, np.int64), 0
    for mask, numbers in zip(masks, numbered):
        found, count = ndimage.label(mask, NEIGHBORS_8)
        numbers[mask] = found[mask] + n_regions
        n_regions += count
    regions = torch.from_numpy(numbered).flatten()
    share = 1 / (n_regions * regions.bincount())
    share[0] = 0
    scores, order = torch.from_numpy(maps).flatten().sort(descending=True)
    regions = regions[order]
    last = torch.cat([scores.diff() != 0, torch.tensor([True])])  # of its ties
    rate = (regions == 0).cumsum(0)[last].double() / (regions == 0).sum()
    overlap = share[regions].double().cumsum(0)[last]
    rate, overlap = (np.concatenate([[0], x.numpy()]) for x in (rate, overlap))
    areas = []
    for limit in PRO_LIMITS:
        inside = rate < limit
        x, y = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
        areas.append(float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / limit))
    return areas


def side_by_side(n: int, size: int, turns: int) -> tuple[float, float]:
    """Seconds of AU-PRO, ours and by `one_sort`, the fastest turn of each."""
    maps, masks = maps_and_masks(n, size)
    seconds = {aupro_alone: [], one_sort: []}
    np.testing.assert_allclose(aupro_alone(maps, masks), one_sort(maps, masks), rtol=1e-5)
    for _ in range(turns):
        for way, taken in seconds.items():
            start = time.perf_counter()
            way(maps, masks)
            taken.append(time.perf_counter() - start)
    return tuple(map(min, seconds.values()))


def scikit_auroc(maps: np.ndarray, masks: np.ndarray) -> float:
    return roc_auc_score(masks.ravel(), maps.ravel())


def scikit_ap(maps: np.ndarray, masks: np.ndarray) -> float:
    return average_precision_score(masks.ravel(), maps.ravel())


OURS = {
    "AU-PRO, limits 0.3, 0.05 and 0.01": aupro_alone,
    "all six (`pixel_metrics`)": pixel_metrics,
    "image and pixel metrics with intervals, 1000 replicates": intervals,
}
PEERS = {"scikit-learn `roc_auc_score`": scikit_auroc, "scikit-learn `average_precision_score`": scikit_ap}


def measure(name: str, n: int, size: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of the fastest run, peak memory of this process in GB, share of defect pixels."""
    maps, masks = maps_and_masks(n, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (OURS | PEERS)[name](maps, masks)
        seconds.append(time.perf_counter() - start)
    return min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, masks.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/aupro.md")
    parser.add_argument("--peers", action="store_true", help="time scikit-learn too, about 20 s")
    options = parser.parse_args()
    lines = [
        "# Pixel metrics: seconds and peak memory of the process",
        "",
        f"`python -m benchmarks.aupro --peers --write` on {processor()}, {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, NumPy {np.__version__}; commit {commit()}. Fastest of 5 runs for the small maps, "
        "one run for the large ones; float32 maps and bool masks, which the memory includes.",
        "",
        "| maps | defect pixels | metric | seconds | peak memory, GB | goal |",
        "|---|---|---|---|---|---|",
    ]
    ours, theirs = side_by_side(60, 256, 7)
    for name, seconds, goal in (
        ("AU-PRO", ours, "ten times one sort's"),
        (f"by one sort of all pixels: {theirs / ours:.1f} times ours", theirs, ""),
    ):
        lines.append(f"| 60 x 256² | | {name} | {seconds:.3f} | | {goal} |")
    print("\n".join(lines), flush=True)
    for case in (SMALL, LARGE):
        peers = PEERS if options.peers and case == SMALL else {}
        for name in [*OURS, *peers]:
            repeats = 5 if case == SMALL and name not in PEERS else 1
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, memory, share = pool.submit(measure, name, *case, repeats).result()
            goal = GOALS[case] if name in OURS and OURS[name] is not intervals else ""
            lines.append(f"| {case[0]} x {case[1]}² | {share:.1%} | {name} | {seconds:.2f} | {memory:.2f} | {goal} |")
            print(lines[-1], flush=True)
    if options.write:
        (Path(__file__).parent / "results" / "aupro.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
