"""A fitted detector on a test set: scores in data set order, figures in all and for each defect, the picture sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data.augment import normalize
from evaluation.bootstrap import with_intervals
from evaluation.heatmaps import Row, heat_range, pick, sheet
from training import distributed


def score_set(detector: nn.Module, loader, text: str) -> tuple[Tensor | None, Tensor]:
    """Maps (N, S, S) float32, or None when the method has none, and scores (N,) of a Loader's pictures on the CPU.

    In ascending order of their index in the data set, equal on all ranks; each rank scores its share. `text` labels the
    progress bar.
    """
    maps, scores, indices = [], [], []
    bar = tqdm(loader.epoch(0), text, len(loader), unit="batch", leave=False, disable=not distributed.is_main())
    for images, *_, index in bar:
        batch_maps, batch_scores = detector.score(normalize(images))
        maps.append(batch_maps)
        scores.append(batch_scores.float())
        indices.append(index.to(images.device))
    nothing, size = torch.empty(0, device=loader.device), loader.dataset.size  # a rank may have had no picture
    order = distributed.gather_rows(torch.cat([nothing.long(), *indices])).argsort()
    scores = distributed.gather_rows(torch.cat([nothing, *scores]))[order].cpu()  # (N,)
    without = torch.tensor(float(any(m is None for m in maps)), device=loader.device)
    if distributed.all_reduce_sum(without) > 0:
        return None, scores
    maps = torch.cat([nothing.reshape(0, size, size), *maps])
    return distributed.gather_rows(maps)[order].cpu(), scores  # (N, S, S)


def anomaly_results(scores: Tensor, maps: Tensor | None, dataset, threshold: float | None, *, seed: int) -> dict:
    """Figures with intervals over the whole test set, and `per_defect`: each one's image AUROC against all good.

    Pixel figures are None without maps or masks. `observed_false_alarms` and `observed_detections` are the shares of
    good and of defective test pictures above the threshold, which came from normal pictures alone.
    """
    labels = dataset.labels
    masks = None if maps is None or not dataset.has_masks else torch.stack([item[1] for item in dataset])
    results = with_intervals(scores, labels, maps, masks, seed=seed)
    defects = np.array(dataset.defects)
    per_defect = {}
    for name in sorted(set(dataset.defects) - {"good"}):
        chosen = torch.from_numpy((defects == name) | (defects == "good"))
        figures = with_intervals(scores[chosen], labels[chosen], None, None, seed=seed)
        per_defect[name] = {k: figures[k] for k in ("image_auroc", "image_auroc_interval")}
        per_defect[name]["n"] = int((defects == name).sum())
    results |= {"threshold": threshold, "observed_false_alarms": None, "observed_detections": None}
    for key, group in (("observed_false_alarms", labels == 0), ("observed_detections", labels == 1)):
        if threshold is not None and group.any():
            results[key] = float((scores[group] > threshold).float().mean())
    counts = {"n_test_normal": int((labels == 0).sum()), "n_test_anomalous": int((labels == 1).sum())}
    return results | counts | {"per_defect": per_defect}


def draw_sheet(path: Path, title: str, dataset, scores: Tensor, maps: Tensor, normal_maps: Tensor, threshold: float):
    """Write the sheet of telling test pictures to `path`; the color scale comes from `normal_maps` (M, S, S), maps of
    normal pictures that the detector was not fitted on. Returns it as a uint8 (3, H, W) tensor for TensorBoard."""
    low, high = heat_range(normal_maps)
    rows = []
    for caption in pick(scores, dataset.labels, dataset.defects, threshold):
        image, mask, *_ = dataset[caption.index]
        rows.append(Row(image, maps[caption.index], mask if dataset.has_masks else None, caption))
    sheet(rows, path, low=low, high=high, title=title)
    return pil_to_tensor(Image.open(path).convert("RGB"))
