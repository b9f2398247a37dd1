"""Pixel metrics of a test set of which some defects have no mask: as if those images were not there."""

import numpy as np
import torch

from evaluation.anomaly.bootstrap import pixel_histograms, pixel_replicates
from evaluation.anomaly.detection import anomaly_results, without_pixels
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_metrics


class Set:
    labels = torch.tensor([1, 0, 1, 0, 1, 1])
    defects = ("dent", "good", "hole", "good", "dent", "hole")


def random_maps(sizes):
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randint(0, 9, size, generator=generator).float() for size in sizes]  # with many ties
    masks = [torch.rand(size, generator=generator) > 0.7 for size in sizes]
    return maps, [mask & bool(label) for mask, label in zip(masks, Set.labels)]


def test_images_without_a_mask_count_in_no_pixel_metric():
    maps, masks = random_maps([(5, 7), (5, 7), (3, 4), (8, 2), (6, 6), (1, 9)])
    known = torch.tensor([False, True, True, True, True, True])  # the first: an empty array may stand at the front
    kept = [i for i, is_known in enumerate(known) if is_known]
    scores = torch.tensor([0.9, 0.3, 0.2, 0.1, 0.8, 0.4])
    cut = [without_pixels(values, known) for values in (maps, masks)]
    results = anomaly_results(scores, *cut, Set, 0.35, seed=0)
    expected = pixel_metrics([maps[i] for i in kept], [masks[i] for i in kept])
    assert {key: results[key] for key in PIXEL_METRICS} == expected
    assert {key: results[key] for key in IMAGE_METRICS} == image_metrics(scores, Set.labels)  # of all six
    dent = pixel_metrics([maps[i] for i in (1, 3, 4)], [masks[i] for i in (1, 3, 4)])
    assert {key: results["per_defect"]["dent"][key] for key in PIXEL_METRICS} == dent
    assert results["per_defect"]["dent"]["n"] == 2 and results["observed_detections"] == 0.75


def test_a_defect_without_any_mask_has_no_pixel_metric():
    maps, masks = random_maps([(5, 7)] * 6)
    known = torch.tensor([True, True, False, True, True, False])
    cut = [without_pixels(values, known) for values in (maps, masks)]
    results = anomaly_results(torch.arange(6.0), *cut, Set, None, seed=0)
    assert all(results["per_defect"]["hole"][key] is None for key in PIXEL_METRICS)
    assert results["per_defect"]["hole"]["image_auroc"] is not None and results["aupro"] is not None


def test_intervals_leave_them_out_too():
    maps, masks = random_maps([(6, 6)] * 6)
    known = torch.tensor([True, True, True, True, False, True])
    histograms = pixel_histograms(*(without_pixels(values, known) for values in (maps, masks)))
    kept = known.nonzero().flatten().tolist()
    alone = pixel_histograms([maps[i] for i in kept], [masks[i] for i in kept])
    assert all(h.shape[0] == 6 and not h[4].any() for h in histograms)
    draws = np.ones((1, 6))
    whole, part = pixel_replicates(histograms, draws), pixel_replicates(alone, draws[:, kept])
    for key in PIXEL_METRICS:
        np.testing.assert_allclose(whole[key], part[key], atol=1e-12)
