"""What `data.fit=crop` hides: the rim of every image, and the defects there, which no detector can find."""

import numpy as np
import torch
from torch import Tensor

from evaluation.anomaly.metrics import image_metrics, pixel_metrics


def hidden_shares(dataset) -> Tensor:
    """Share of each mask's pixels, by their centres, that lies outside of the crop: float64 (N,), 0 for empty masks."""
    shares = torch.zeros(len(dataset), dtype=torch.float64)
    for i in (dataset.labels == 1).nonzero()[:, 0].tolist():
        mask = dataset.mask(i, original=True)  # (h, w)
        top, left, height, width = dataset.geometry.window(tuple(mask.shape))
        y, x = (torch.arange(length) + 0.5 for length in mask.shape)
        inside = ((y > top) & (y < top + height))[:, None] & ((x > left) & (x < left + width))
        shares[i] = (mask & ~inside).sum() / mask.sum().clamp(min=1)
    return shares


def seen_share(dataset) -> float:
    """The share of its area that the input shows of an image, the median over the data set."""
    windows = {tuple(size): dataset.geometry.window(tuple(size)) for size in dataset.sizes.unique(dim=0).tolist()}
    return float(np.median([np.prod(windows[tuple(s)][2:]) / np.prod(s) for s in dataset.sizes.tolist()]))


def crop_results(scores: Tensor, maps: list[Tensor] | None, masks: list[Tensor] | None, dataset) -> dict:
    """What results.json gets of a run with `data.fit=crop`.

    `crop_share_seen`: of an image, at the median. With masks `n_defects_cut` and `n_defects_hidden`: defective test
    images of which part or all of the mask lies outside; if there are any, `<metric>_seen`: the metrics without them.
    """
    results = {"crop_share_seen": seen_share(dataset)}
    if not dataset.has_masks:
        return results
    hidden = hidden_shares(dataset)
    results["n_defects_cut"] = int(((hidden > 0) & (hidden < 1)).sum())
    results["n_defects_hidden"] = int((hidden == 1).sum())
    if (hidden > 0).any():
        kept = (hidden == 0).nonzero()[:, 0].tolist()
        seen = image_metrics(scores[kept], dataset.labels[kept])
        if maps is not None and masks is not None:
            seen |= pixel_metrics([maps[i] for i in kept], [masks[i] for i in kept])
        results |= {f"{name}_seen": value for name, value in seen.items()}
    return results


def crop_line(results: dict) -> str:
    """The results of `crop_results`, among those of the whole test set, in one line."""
    line = f"data.fit=crop shows {results['crop_share_seen']:.0%} of an image (median)"
    cut, hidden = results.get("n_defects_cut"), results.get("n_defects_hidden")
    if cut is None:
        return f"{line}; without masks it is unknown which defects lie outside"
    line += f"; of {results['n_test_anomalous']} defective test images {cut} have part of their mask outside"
    line += f", {hidden} all of it"
    if cut or hidden:
        whole, seen = (
            "-" if results[key] is None else f"{results[key]:.3f}" for key in ("image_auroc", "image_auroc_seen")
        )
        line += f": image AUROC {whole}, without them {seen}; data.fit=squash data.resize=none sees all"
    return line
