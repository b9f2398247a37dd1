"""Against loops over every distinct threshold in float64 with a flood fill of its own, and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from evaluation.anomaly import metrics as anomaly_metrics
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_metrics
from runtime.errors import UserError


def flood_fill(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions of one mask, by a plain stack."""
    left, regions = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        region, stack = [], [left.pop()]
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for neighbor in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbor in left:
                    left.remove(neighbor)
                    stack.append(neighbor)
        regions.append(region)
    return regions


def area(rates: list[float], heights: list[float], limit: float) -> float:
    total = 0.0
    for x0, y0, x1, y1 in zip(rates, heights, rates[1:], heights[1:]):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        total += (x1 - x0) * (y0 + y1) / 2
    return total / limit


def brute_force(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    regions = [(n, region) for n, mask in enumerate(masks) for region in flood_fill(mask)]
    values, truth = (np.concatenate([image.ravel() for image in images]) for images in (maps, masks))
    values, masked = values.astype(np.float64), int(truth.sum())
    rates, recalls, pros, ap, f1 = [0.0], [0.0], [0.0], 0.0, 0.0
    for threshold in np.unique(values)[::-1]:
        true, false = int((values[truth] >= threshold).sum()), int((values[~truth] >= threshold).sum())
        rates.append(false / (len(values) - masked))
        recalls.append(true / masked)
        shares = [sum(maps[n][p] >= threshold for p in region) / len(region) for n, region in regions]
        pros.append(sum(shares) / len(regions))
        ap += (recalls[-1] - recalls[-2]) * true / (true + false)
        f1 = max(f1, 2 * true / (true + false + masked))
    pro = {key: area(rates, pros, limit) for key, limit in (("aupro", 0.3), ("aupro_005", 0.05), ("aupro_001", 0.01))}
    return {"pixel_auroc": area(rates, recalls, 1.0), "pixel_ap": ap, "pixel_f1_max": f1} | pro


def random_case(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 9, 11)) < 0.15
    masks[0] = False  # a good image
    maps = rng.normal(size=masks.shape) + masks * rng.uniform(0, 3)
    if kind == "integers":
        maps = np.round(maps * 2)
    if kind == "two values":
        maps = maps > 1
    return maps.astype(np.float32), masks


@pytest.mark.parametrize("kind", ["continuous", "integers", "two values"])
@pytest.mark.parametrize("seed", range(4))
def test_pixel_metrics_equal_every_threshold_in_turn(seed, kind):
    maps, masks = random_case(seed, kind)
    assert pixel_metrics(maps, masks) == pytest.approx(brute_force(maps, masks), abs=1e-12)


def images_of_all_sizes(seed: int, levels: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Among them a single pixel, a good image, one that is all defect, and float64 beside float32."""
    rng = np.random.default_rng(seed)
    shapes = [(1, 1), (5, 7), (3, 2), *rng.integers(1, 14, (6, 2)).tolist()]
    masks = [rng.random(shape) < rng.uniform(0, 0.6) for shape in shapes]
    masks[1][:], masks[2][:] = False, True
    maps = [rng.normal(size=mask.shape) + mask for mask in masks]
    maps = maps if levels is None else [np.round(image * levels / 4) for image in maps]
    return [image.astype((np.float32, np.float64)[i % 2]) for i, image in enumerate(maps)], masks


@pytest.mark.parametrize("levels", [None, 8, 1])
@pytest.mark.parametrize("seed", range(4))
def test_images_of_different_sizes(seed, levels):
    maps, masks = images_of_all_sizes(seed, levels)
    expected = brute_force(maps, masks)
    assert pixel_metrics(maps, masks) == pytest.approx(expected, abs=1e-9)
    tensors = tuple(torch.from_numpy(image) for image in maps), [torch.from_numpy(mask) for mask in masks]
    assert pixel_metrics(*tensors) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 40, 150])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_blocks_change_nothing(monkeypatch, chunk, threads):
    """Small chunks of negatives and blocks of positives, sorted in threads, as millions of pixels are."""
    maps, masks = images_of_all_sizes(0, 8)
    expected = pixel_metrics(maps, masks)
    monkeypatch.setattr(anomaly_metrics, "CHUNK", chunk)
    monkeypatch.setattr(anomaly_metrics, "BLOCK", 17)
    monkeypatch.setattr(anomaly_metrics, "ONE_THREAD", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert pixel_metrics(maps, masks) == pytest.approx(expected, abs=1e-14)


def test_one_size_is_the_same_as_a_list_and_the_inputs_stay_as_they_were():
    maps, masks = random_case(2, "integers")
    copies = maps.copy(), masks.copy()
    assert pixel_metrics(maps, masks) == pixel_metrics(list(maps), list(masks)) == pixel_metrics(maps, list(masks))
    assert (maps == copies[0]).all() and (masks == copies[1]).all()


@pytest.mark.parametrize("levels", [2, 5, 30, None])
def test_image_metrics_equal_scikit_learn(levels):
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.3
    scores = rng.normal(size=400) + labels
    scores = scores if levels is None else np.round(scores * levels / 4)
    got = image_metrics(scores, labels)
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert got["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert got["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert got["image_f1_max"] == pytest.approx(f1.max(), abs=1e-12)


def test_large_pixel_metrics_equal_scikit_learn():
    """Enough pixels for the threaded sort, in two halves that hold different scores."""
    rng = np.random.default_rng(0)
    masks = rng.random((6, 200, 200)) < 0.02
    maps = (rng.normal(size=masks.shape) + masks + np.arange(6)[:, None, None]).astype(np.float32)
    got = pixel_metrics(maps, masks)
    assert got["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert got["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_aupro_by_hand():
    """Regions {5} and {3, 1}, normal pixels 4, 2, 0, 0: PRO is 1/2 from rate 0, 3/4 from 1/4, 1 from 1/2."""
    maps = torch.tensor([[[5.0, 4, 3, 1, 2, 0, 0]]])
    masks = torch.tensor([[[1, 0, 1, 1, 0, 0, 0]]]).bool()
    got = pixel_metrics(maps, masks)
    assert got["aupro"] == pytest.approx((0.25 * 0.5 + 0.05 * 0.75) / 0.3)
    assert got["aupro_005"] == pytest.approx(0.5)
    assert got["pixel_auroc"] == pytest.approx((4 + 3 + 2) / 12)
    assert got["pixel_ap"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert got["pixel_f1_max"] == pytest.approx(0.75)  # three found, two false alarms


def test_the_limit_cuts_a_tie_in_a_straight_line():
    """One pixel of 10 of either kind above, the others tied: the curve goes straight from (0.1, 0.5) to (1, 1)."""
    maps = torch.zeros(1, 1, 12)
    masks = torch.zeros(1, 1, 12, dtype=torch.bool)
    masks[0, 0, [0, 2]] = True
    maps[0, 0, 0], maps[0, 0, 1] = 2, 1  # 2 is a defect pixel, then a normal one, the other defect pixel ties with nine
    at_limit = 0.5 + 0.5 * 0.2 / 0.9
    assert pixel_metrics(maps, masks)["aupro"] == pytest.approx((0.1 * 0.5 + 0.2 * (0.5 + at_limit) / 2) / 0.3)


def test_diagonal_neighbors_are_one_region():
    maps = torch.zeros(1, 5, 5)
    masks = torch.zeros(1, 5, 5, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 4, 0] = True  # two regions: a diagonal pair and a single pixel
    maps[0, 0, 0] = 1  # half of the first region: PRO 1/4 in 8-connectivity, 1/3 in 4-connectivity
    rate = 0.25 + 0.75 * 0.3
    assert pixel_metrics(maps, masks)["aupro"] == pytest.approx((0.25 + rate) / 2)


def test_regions_do_not_join_over_images():
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    masks[0, 1, 1] = masks[1, 1, 1] = masks[1, 1, 2] = True  # regions of one and of two pixels
    maps = torch.zeros(2, 3, 3)
    maps[0, 1, 1] = 1  # found: the whole first region, so PRO starts at 1/2, not at 1/3
    assert pixel_metrics(maps, masks)["aupro"] == pytest.approx(0.5 + 0.15 / 2)


def test_equal_scores_say_nothing():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    got = pixel_metrics(torch.full((2, 4, 4), 7.0), masks)
    assert got == pytest.approx(
        {
            "pixel_auroc": 0.5,
            "pixel_ap": 0.25,
            "pixel_f1_max": 0.4,
            "aupro": 0.15,
            "aupro_005": 0.025,
            "aupro_001": 0.005,
        }
    )
    assert image_metrics([3, 3, 3, 3], [0, 1, 0, 0]) == pytest.approx(
        {"image_auroc": 0.5, "image_ap": 0.25, "image_f1_max": 0.4}
    )


def test_perfect_and_reversed_scores():
    assert image_metrics([1, 2, 3, 4], [0, 0, 1, 1]) == dict.fromkeys(IMAGE_METRICS, 1.0)
    assert image_metrics([1, 2, 3, 4], [1, 1, 0, 0])["image_auroc"] == 0
    masks = random_case(0, "continuous")[1]
    assert pixel_metrics(masks.astype(np.float32), masks) == pytest.approx(dict.fromkeys(PIXEL_METRICS, 1.0))
    assert pixel_metrics(-masks.astype(np.float32), masks)["aupro"] == 0


def test_only_ranks_count_and_the_order_of_images_does_not():
    maps, masks = random_case(3, "integers")
    reference = pixel_metrics(maps, masks)
    assert pixel_metrics(np.exp(maps.astype(np.float64)), masks) == reference
    shuffle = np.random.default_rng(0).permutation(len(maps))
    assert pixel_metrics(maps[shuffle], masks[shuffle]) == pytest.approx(reference, abs=1e-14)
    assert pixel_metrics(maps.transpose(0, 2, 1), masks.transpose(0, 2, 1)) == pytest.approx(reference, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])
def test_any_number_type_and_torch_like_numpy(dtype):
    maps, masks = random_case(1, "integers")
    maps = maps - maps.min()
    reference = pixel_metrics(maps, masks)
    tensor = torch.from_numpy(maps).to(dtype).requires_grad_(dtype.is_floating_point)
    assert pixel_metrics(tensor, torch.from_numpy(masks)) == reference
    assert image_metrics(tensor[:, 0, 0], torch.tensor([0, 1, 1, 0])) == image_metrics(maps[:, 0, 0], [0, 1, 1, 0])


def test_infinite_scores_rank_as_the_largest_and_smallest():
    assert image_metrics([-np.inf, 0, np.inf, np.inf], [0, 0, 1, 0]) == image_metrics([0, 1, 2, 2], [0, 0, 1, 0])


def test_one_image_with_one_defect_pixel():
    maps, masks = torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), torch.tensor([[[False, False], [True, False]]])
    assert pixel_metrics(maps, masks) == pytest.approx(brute_force(maps.numpy(), masks.numpy()))


def test_undefined_figures_are_none():
    assert image_metrics([0.1, 0.2], [0, 0]) == dict.fromkeys(IMAGE_METRICS)
    assert image_metrics([0.1, 0.2], [1, 1]) == dict.fromkeys(IMAGE_METRICS)
    assert image_metrics([], []) == dict.fromkeys(IMAGE_METRICS)
    maps = torch.rand(2, 3, 3)
    assert pixel_metrics(maps, torch.zeros(2, 3, 3, dtype=torch.bool)) == dict.fromkeys(PIXEL_METRICS)
    assert pixel_metrics(maps, torch.ones(2, 3, 3, dtype=torch.bool)) == dict.fromkeys(PIXEL_METRICS)
    assert pixel_metrics([], []) == dict.fromkeys(PIXEL_METRICS)


def test_more_pixels_than_float32_can_count():
    """17.6 million pixels, each row one score, one column of defects: 4200 ties of 1 to 4199, exactly chance."""
    maps = np.repeat(np.arange(4200, dtype=np.float32)[:, None], 4200, axis=1)[None]
    masks = np.zeros(maps.shape, dtype=bool)
    masks[:, :, 0] = True
    got = pixel_metrics(maps, masks)
    assert got["pixel_auroc"] == pytest.approx(0.5, abs=1e-12)
    assert got["pixel_ap"] == pytest.approx(1 / 4200, abs=1e-12)
    assert got["aupro"] == pytest.approx(0.15, abs=1e-12)


def test_nan_is_named():
    with pytest.raises(UserError, match=r"2 of 4 image scores are not a number, the first at index \[1\]"):
        image_metrics([0, np.nan, 1, np.nan], [0, 1, 0, 1])
    maps = torch.zeros(2, 3, 4)
    maps[1, 2, 3] = float("nan")
    with pytest.raises(UserError, match=r"1 of 24 .* at index \[1, 2, 3\]"):
        pixel_metrics(maps, maps > 0)
    with pytest.raises(UserError, match=r"1 of 12 .* of image 1 .* at index \[2, 3\]"):
        pixel_metrics(list(maps), list(maps > 0))


def test_wrong_shapes_and_labels():
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        image_metrics([1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="must be 0"):
        image_metrics([1, 2, 3], [0, 1, 2])
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 4\)"):
        pixel_metrics(torch.zeros(2, 3, 3), torch.zeros(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 maps, 1 masks"):
        pixel_metrics(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not N times \(3,\)"):
        pixel_metrics(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="uint8"):
        pixel_metrics(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.uint8))
