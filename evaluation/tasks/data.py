"""The look at a data set before training: counts, statistics, broken files, duplicates, leakage.

    python eval.py task=data data.name=folder data.root=/images

Writes report.html (one file, to be read), report.md, results.json, images.csv, sheets/ and TensorBoard events to
runs/<run_name>/eval_data/.
"""

import inspect as python
from dataclasses import dataclass, replace
from typing import Literal

import torch

from data import DATASETS, DataConfig, build_geometry, settled
from data.dataset import Dataset
from data.datasets.categories import open_set
from evaluation.dataset import (
    contact,
    copies,
    feature_space,
    ground_truth,
    overview,
    quality,
    report,
    statistics,
    tables,
)
from evaluation.dataset.feature_space import Measured
from evaluation.dataset.inspection import Inspected, inspect
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.values import PathText, Pixels, PositiveInt, Seed, WidthOrZero
from runtime.version import code_version


@dataclass(kw_only=True)
class LookConfig(DataConfig):
    size: tuple[Pixels, ...] | Literal["native"] = (224,)  # pixels of the inputs, as the other scripts take it


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    data: LookConfig  # the images, of all splits
    backbone: BackboneConfig | None = None  # whose features compare splits and find outliers; none: without these
    checkpoint: PathText | None = None  # last.pt, best.pt or step_*.pt of a run, for its backbone and data
    batch_size: PositiveInt = 64  # images per forward of the backbone
    feature_images: PositiveInt = 20000  # of each split, drawn at random, that the backbone looks at
    references: WidthOrZero = 100  # images that MuSc compares each with, the time grows with it; 0: no such score
    projector: WidthOrZero = 1000  # images in TensorBoard's projector
    seed: Seed = 0  # of what is drawn at random, and of a backbone without weights
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it


def run(cfg: Config) -> None:
    folder = config.run_folder(cfg) / "eval_data"
    device = distributed.setup(cfg.device)
    resolved = config.as_dict(cfg)
    sets, missing = open_splits(settled(cfg.data))
    checkpoint.open_run(folder, resolved)
    log = Log(folder, cfg)
    for dataset in sets.values():
        log.say(f"data: {dataset.matched}")
    splits = {name: inspect(dataset, device) for name, dataset in sets.items()}
    measured, network = look_with_backbone(cfg, splits, device)
    results: dict = {"task": "data", "images": {name: len(dataset) for name, dataset in sets.items()}}
    if distributed.is_main():
        section, pairs = copies.copies(splits)
        sections = [
            section,
            overview.broken(splits),
            overview.counts(splits, missing),
            *([ground_truth.masks(splits)] if any(dataset.has_masks for dataset in sets.values()) else []),
            overview.files(splits),
            statistics.statistics(splits),
            quality.odd_images(splits),
            *feature_space.sections(splits, measured, network, seed=cfg.seed),
            contact.contact_sheets(splits),
        ]
        where = [str(cfg.data.options[key]) for key in ("root", "category") if key in cfg.data.options]
        about = f"{cfg.data.name}: {', '.join(f'{len(d):,} images of {name}' for name, d in sets.items())}"
        report.write(sections, f"Data set {'/'.join(where) or cfg.data.name}", about, folder, log)
        tables.write(splits, pairs, folder)
        feature_space.project(log, splits, measured, images=cfg.projector, seed=cfg.seed)
        problems = report.sorted_problems(sections)
        for problem in problems:
            log.say(f"{problem.weight}: {problem.text}")
        results["problems"] = [problem._asdict() for problem in problems]
        results |= {section.key: section.numbers for section in sections}
        log.say(f"report: {folder / 'report.html'}")
    log.results(results | {"version": code_version()})
    distributed.cleanup()


def look_with_backbone(
    cfg: Config, splits: dict[str, Inspected], device: torch.device
) -> tuple[dict[str, Measured], str]:
    """What the features of the backbone say, and which one it is; nothing without one. All ranks call it."""
    if cfg.backbone is None:
        return {}, ""
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    found = feature_space.measure(
        splits,
        backbone.to(device),
        device,
        most=cfg.feature_images,
        references=cfg.references,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        cache=cfg.data.cache,
        workers=cfg.data.workers,
    )
    return found, f"{cfg.backbone.name} ({weights})"


def open_splits(data: DataConfig) -> tuple[dict[str, Dataset], dict[str, str]]:
    """The splits that there are, and for the others why not.

    Where a broken file keeps a split from being made, it is made without that file (`on_error=skip`).

    Raises:
        UserError: there is none.
    """
    sets, missing = {}, {}
    ways = [data]
    if "on_error" in python.signature(DATASETS[data.name]).parameters:
        ways.append(replace(data, options={**data.options, "on_error": "skip"}))
    for split in DATASETS[data.name].splits:
        reasons = []
        for way in ways:
            try:
                # not build_dataset, which refuses a test set that lacks a class: the report is to say so
                sets[split] = open_set(DATASETS[way.name], split, build_geometry(way), way.options)
                break
            except UserError as error:
                reasons.append(str(error))
        else:
            missing[split] = reasons[0]
    if not sets:
        raise UserError(next(iter(missing.values())))
    return sets, missing
