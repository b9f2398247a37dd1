"""What a backbone's features say about a data set: how far its splits lie apart, and which images are unlike the rest.

`measure` runs on all ranks; what it returns is equal on all of them, and the sections are made of it on one.

Letters: N measured images of a split, D features.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loading import Cache, Loader
from evaluation.collapse import constant_warning, feature_health
from evaluation.dataset.distance import ALARM, AT_MOST, split_distance
from evaluation.dataset.inspection import Inspected, tile
from evaluation.dataset.outliers import FENCE, NEIGHBORS, excess, leave_one_out, mutual_scoring
from evaluation.dataset.section import Gallery, Problem, Section, Table, count
from evaluation.features import extract
from evaluation.inspect import embedding
from runtime.log import Log

SHOWN = 12  # outliers of a split in the report, for each score
NAMED = 50  # in results.json
TILE = 160  # pixels of their longer side

TITLE = "Distance of the splits in feature space"
NO_BACKBONE = (
    "Not measured: the distance of the splits and the images unlike the others need the features of a backbone. Add "
    "checkpoint=runs/<a run of train_ssl.py>, or backbone.name=mobilenet_v2 backbone.weights=<file>."
)
HOW_TO_READ = (
    "The Fréchet distance (as in FID) of two finite sets is never 0, so beside it stand random splits of the same "
    "images into sets of the same sizes. The classifier is a logistic regression that tells the splits apart on images "
    "that it has not seen: AUROC 0.5 is chance, 1 means that each image gives its split away. p is the probability of "
    f"so large a value if the images had been split at random; below {ALARM} the splits count as different. At most "
    f"{AT_MOST:,} images of each split are measured; copies within a split count once."
)
ABOUT_OUTLIERS = (
    f"Nearest neighbors: how far away the {NEIGHBORS}th nearest image of the same class and split is; an image of "
    "another kind or of a wrong class is far from all. Mutual scoring (MuSc) compares patches: it looks for one that "
    "most other images of the split, of whatever class, have nothing like. Both scores are in interquartile ranges "
    f"above the upper quartile of the class; above {FENCE} an image counts as an outlier."
)


@dataclass
class Measured:
    """Of one split: `positions` (N,) in it, features (N, D), kinds N, and on the CPU both scores (N,) in interquartile
    ranges, NaN where there are too few images; mutual: None if it was not asked for."""

    positions: Tensor
    features: Tensor
    kinds: list[str]
    neighbors: Tensor
    mutual: Tensor | None


def sections(splits: dict[str, Inspected], measured: dict[str, Measured], about: str, *, seed: int) -> list[Section]:
    """Those of this file; without a backbone one that says what to add. `about` as in `distances`."""
    if not about:
        return [Section("distance", TITLE, parts=[NO_BACKBONE])]
    return [distances(splits, measured, about, seed=seed), outliers(splits, measured)] if measured else []


def measure(
    splits: dict[str, Inspected],
    backbone: nn.Module,
    device: torch.device,
    *,
    batch_size: int,
    most: int,
    references: int,
    seed: int,
    cache: Cache,
    workers: int,
) -> dict[str, Measured]:
    """Features and outlier scores of at most `most` images of each split, drawn at random; none of broken images.

    Args:
        backbone: on `device`.
        references: of `mutual_scoring`; 0: without it.
        batch_size, cache, workers: of `Loader`.
    """
    backbone.eval()
    found = {}
    for name, split in splits.items():
        if not len(split.readable):
            continue
        drawn = np.random.default_rng(seed).permutation(len(split.readable))[:most]
        positions = torch.from_numpy(split.readable[np.sort(drawn)])

        def loader(indices: Tensor, split: Inspected = split) -> Loader:
            return Loader(split.dataset, batch_size, device, indices=indices, cache=cache, workers=workers)

        features, _ = extract(backbone, loader(positions), progress=f"features of {name}")
        kinds = [split.kinds[i] for i in positions.tolist()]
        groups = torch.from_numpy(np.unique(kinds, return_inverse=True)[1])
        neighbors, mutual = excess(leave_one_out(features, groups), groups), None
        if references:
            mutual = excess(mutual_scoring(backbone, loader, positions, references=references, seed=seed), groups)
        found[name] = Measured(positions, features, kinds, neighbors, mutual)
    return found


def distances(splits: dict[str, Inspected], measured: dict[str, Measured], about: str, *, seed: int) -> Section:
    """How far each other split lies from the first, as a rule `train`; of sets with defects only their good images.

    about: the backbone and where its weights come from.
    """
    section = Section("distance", TITLE, {"backbone": about}, parts=[f"Features of {about}."])
    for name, split in measured.items():
        if warning := constant_warning(feature_health(split.features)):
            section.problems.append(Problem("warning", f"{name}: {warning}"))
    (first, base), *others = measured.items()
    rows = []
    for name, split in others:
        defects = splits[name].dataset.defects is not None
        kept = [i for i, kind in enumerate(split.kinds) if kind == "good" or not defects]
        if not kept:
            section.parts.append(f"{name} has no good images that could be compared with {first}.")
            continue
        label = f"{first} and {name}{' (good)' if defects else ''}"
        found = split_distance(base.features, split.features[kept], seed=seed)
        section.numbers[name] = found | {"only_good": defects}
        rows.append([label, *_cells(found)])
        ps = [p for p in (found["frechet"]["p"], found["classifier"]["p"]) if p is not None]
        if ps and min(ps) < ALARM:
            section.problems.append(Problem("warning", f"{label} look different: {_in_words(found)}"))
    if rows:
        header = ["splits", "images", "Fréchet distance", "of random splits", "p", "classifier's AUROC", "p", "in both"]
        section.parts += [Table(header, rows), HOW_TO_READ]
    elif not others:
        section.parts.append(f"There is only one split, {first}, so there is no distance.")
    return section


def outliers(splits: dict[str, Inspected], measured: dict[str, Measured]) -> Section:
    """The images most unlike the others, worst first, by both scores, and those beyond the fence as a warning."""
    section = Section("outliers", "Images unlike the others", parts=[ABOUT_OUTLIERS])
    for name, split in measured.items():
        inspected, numbers = splits[name], dict[str, Any](measured=len(split.positions))
        if len(split.positions) < len(inspected.readable):
            section.parts.append(f"{name}: {len(split.positions):,} of {len(inspected.readable):,} images, at random.")
        titles = {"neighbors": "nearest neighbors", "mutual": "mutual scoring"}
        for (key, title), scores in zip(titles.items(), (split.neighbors, split.mutual)):
            if scores is None or scores.isnan().all():
                continue
            order = scores.nan_to_num(nan=-math.inf, posinf=math.inf).argsort(descending=True, stable=True)
            order = order[: int((~scores.isnan()).sum())][:NAMED].tolist()
            at = split.positions[order].tolist()
            worst = [
                {"image": inspected.names[position], "class": split.kinds[i], "score": float(scores[i])}
                for position, i in zip(at, order)
            ]
            beyond = int((scores > FENCE).sum())
            numbers |= {f"{key}_beyond": beyond, key: worst}
            if beyond:
                stand = f"{count(beyond, 'image')} {'is' if beyond == 1 else 'are'} unlike the others by {title}"
                section.problems.append(Problem("warning", f"{name}: {stand}, first {worst[0]['image']}"))
            tiles = [
                (f"{line['image']}\n{line['score']:.1f}", tile(inspected.dataset, position, TILE))
                for position, line in zip(at[:SHOWN], worst)
            ]
            note = f"worst first, with their score; {beyond:,} of {len(scores):,} images are above {FENCE}"
            section.parts.append(Gallery(f"{name}, by {title}", tiles, note))
        section.numbers[name] = numbers
    return section


def project(log: Log, splits: dict[str, Inspected], measured: dict[str, Measured], *, images: int, seed: int) -> None:
    """TensorBoard's projector: `images` drawn at random from all splits, with split, class, path and a thumbnail."""
    places = [(name, row) for name, split in measured.items() for row in range(len(split.positions))]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(places))[:images])
    places = [places[i] for i in drawn]
    if len(places) < 2:
        return
    columns: dict[str, list[str]] = {"class": [], "split": [], "path": []}
    thumbnails = []
    for name, row in places:
        dataset, position = splits[name].dataset, int(measured[name].positions[row])
        columns["class"].append(measured[name].kinds[row])
        columns["split"].append(name)
        columns["path"].append(dataset.paths[position])
        thumbnails.append(embedding.thumbnail(dataset, position))
    features = torch.stack([measured[name].features[row] for name, row in places])  # (N, D)
    embedding.project(log, "images", features, columns, torch.stack(thumbnails))


def _cells(found: dict) -> list[str]:
    """What `split_distance` found, as a row of the table without its first cell."""
    frechet, classifier = found["frechet"], found["classifier"]
    auroc = "-" if classifier["auroc"] is None else f"{classifier['auroc']:.3f}"
    random = f"{frechet['random_mean']:.3g} ± {frechet['random_std']:.2g}"
    distance, sizes = f"{frechet['distance']:.3g}", f"{found['train']:,} and {found['test']:,}"
    return [sizes, distance, random, _p(frechet["p"]), auroc, _p(classifier["p"]), f"{found['shared']:,}"]


def _in_words(found: dict) -> str:
    _, distance, random, _, auroc, _, _ = _cells(found)
    told = "" if auroc == "-" else f"; a classifier tells them apart with AUROC {auroc} (0.5 is chance)"
    advice = "look for another camera, light or part, or other shares of the classes"
    return f"Fréchet distance {distance}, of random splits {random}{told}; {advice}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
