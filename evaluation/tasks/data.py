"""The look at a data set before training: counts, statistics, broken files, duplicates, leakage, odd images.

    python eval.py task=data data.name=folder data.root=/images

Writes report.html (one file, to be read), report.md, results.json, images.csv, sheets/ and TensorBoard events to
runs/<run_name>/eval_data/.
"""

import inspect as python
from dataclasses import dataclass, replace
from typing import Literal

from data import DATASETS, DataConfig, build_geometry, settled
from data.dataset import Dataset
from data.datasets.categories import open_set
from evaluation.dataset import contact, copies, ground_truth, overview, quality, report, statistics, tables
from evaluation.dataset.inspection import inspect
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.values import PathText, Pixels
from runtime.version import code_version


@dataclass(kw_only=True)
class LookConfig(DataConfig):
    size: tuple[Pixels, ...] | Literal["native"] = (224,)  # pixels of the inputs, as the other scripts take it


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    data: LookConfig  # the images, of all splits
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
            contact.contact_sheets(splits),
        ]
        where = [str(cfg.data.options[key]) for key in ("root", "category") if key in cfg.data.options]
        about = f"{cfg.data.name}: {', '.join(f'{len(d):,} images of {name}' for name, d in sets.items())}"
        report.write(sections, f"Data set {'/'.join(where) or cfg.data.name}", about, folder, log)
        tables.write(splits, pairs, folder)
        problems = report.sorted_problems(sections)
        for problem in problems:
            log.say(f"{problem.weight}: {problem.text}")
        results["problems"] = [problem._asdict() for problem in problems]
        results |= {section.key: section.numbers for section in sections}
        log.say(f"report: {folder / 'report.html'}")
    log.results(results | {"version": code_version()})
    distributed.cleanup()


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
