"""A fitted detector on a set of images: findings in data set order, metrics in all and for each defect."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Batch, Findings
from data.normalize import Normalization, normalization_of, normalize
from evaluation.anomaly.bootstrap import Histograms, with_intervals
from evaluation.anomaly.metrics import PIXEL_METRICS, pixel_metrics
from runtime import distributed


def batches_of(loader, text: str, normalization: Normalization) -> Iterator[Batch]:
    """An epoch of a Loader as a detector of this normalization takes it; `text` labels the progress bar."""
    dataset, bar = loader.dataset, {"unit": "batch", "leave": False, "disable": not distributed.is_main()}
    for images, *_, indices in tqdm(loader.epoch(0), text, len(loader), **bar):
        valid = dataset.inside(indices, loader.device)
        yield Batch(normalize(images, normalization), valid, indices.to(loader.device))


def examine_set(detector: nn.Module, loader, text: str, *, leave_out: bool = False) -> Findings:
    """`Findings` of all images of a Loader on the CPU, in ascending order of their index, equal on all processes.

    Each process examines its share. `leave_out`: the images are the training images, numbered as in `fit`, and
    each is examined as if it had not been fitted.
    """
    device, size = loader.device, (loader.dataset.geometry.height, loader.dataset.geometry.width)
    parts, numbers = [], []
    most = int(distributed.gather_rows(torch.tensor([len(loader)], device=device)).max())
    for images, valid, indices in batches_of(loader, text, normalization_of(detector)):
        parts.append(detector.examine(images, valid, indices if leave_out else None))
        numbers.append(indices)
    while len(parts) < max(most, 1):  # a detector that is spread over processes needs all of them at every batch
        none = torch.empty(0, dtype=torch.int64, device=device)
        parts.append(detector.examine(torch.empty(0, 3, *size, device=device), None, none if leave_out else None))
        numbers.append(none)
    return gathered(parts, numbers, device)


def gathered(parts: list[Findings], numbers: list[Tensor], device: torch.device) -> Findings:
    """The findings of all processes on the CPU, in ascending order of the images' numbers."""
    order = distributed.gather_rows(torch.cat(numbers)).argsort()

    def joined(values: tuple) -> Tensor | None:
        if values[0] is None:
            return None
        return distributed.gather_rows(torch.cat([value.to(device) for value in values]))[order].cpu()

    return Findings(*(joined(values) for values in zip(*parts)))


def region_maps(maps: Tensor, dataset, *, original: bool = False, indices: Tensor | None = None) -> list[Tensor]:
    """Maps (N, H, W) as one map per image, without padding: of input pixels, or at the size of the original file.

    `indices` (N,): the images' positions in the data set; none: all of it.
    """
    geometry = dataset.geometry
    if not original and geometry.fit != "pad":
        return list(maps)
    sizes = dataset.sizes if indices is None else dataset.sizes[indices]
    if original:
        return [geometry.to_original(m, tuple(size)) for m, size in zip(maps, sizes.tolist())]
    return [m[top : top + h, left : left + w] for m, (top, left, h, w) in zip(maps, geometry.regions(sizes).tolist())]


def region_masks(dataset, *, original: bool = False) -> list[Tensor]:
    """The true masks (h, w) bool, cut or sized as `region_maps`."""
    if original:
        return [dataset.mask(i, original=True) for i in range(len(dataset))]
    return region_maps(torch.stack([dataset.mask(i) for i in range(len(dataset))]), dataset)


def without_pixels(maps: list[Tensor], known: Tensor) -> list[Tensor]:
    """`maps` or masks (h, w), cut to none of their pixels where not `known` (N,): they count in no pixel metric."""
    return [m if is_known else m[:0] for m, is_known in zip(maps, known.tolist())]


def anomaly_results(
    scores: Tensor,
    maps: list[Tensor] | None,
    masks: list[Tensor] | None,
    dataset,
    threshold: float | None,
    *,
    seed: int,
    histograms: Histograms | None = None,
    per_defect: dict[str, dict] | None = None,
) -> dict:
    """Metrics with intervals and `alarms` of the whole test set, and `per_defect`: each one's against all good images.

    Pixel metrics are None without maps or masks; `histograms` are their `pixel_histograms`. `per_defect`: its rows, if
    they are there already.
    """
    labels, defects = dataset.labels, np.array(dataset.defects)
    results = with_intervals(scores, labels, maps, masks, seed=seed, histograms=histograms)
    names = sorted(set(dataset.defects) - {"good"}) if per_defect is None else []
    per_defect = per_defect or {}
    for name in names:
        chosen = np.flatnonzero((defects == name) | (defects == "good"))
        metrics = with_intervals(scores[chosen], labels[chosen], None, None, seed=seed)
        if maps is not None and masks is not None:
            metrics |= pixel_metrics([maps[i] for i in chosen], [masks[i] for i in chosen])
        kept = ("image_auroc", "image_auroc_interval", *PIXEL_METRICS)
        per_defect[name] = {key: metrics[key] for key in kept} | {"n": int((defects == name).sum())}
    results |= {"threshold": threshold, **alarms(scores, labels, threshold)}
    counts = {"n_test_normal": int((labels == 0).sum()), "n_test_anomalous": int((labels == 1).sum())}
    return results | counts | {"per_defect": per_defect}


def alarms(scores: Tensor, labels: Tensor, threshold: float | None) -> dict[str, float | None]:
    """`observed_false_alarms` and `observed_detections`: the shares of good and of defective test images above the
    threshold, which came from normal images alone; None without such images or without a threshold."""
    shares: dict[str, float | None] = {}
    for key, group in (("observed_false_alarms", labels == 0), ("observed_detections", labels == 1)):
        known = threshold is not None and bool(group.any())
        shares[key] = float((scores[group] > threshold).float().mean()) if known else None
    return shares
