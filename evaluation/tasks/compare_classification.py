"""Several backbones and classifiers on the same test images: metrics, intervals, differences.

    python eval.py task=compare_classification data.name=folder data.root=/images data.size=96 \\
        backbones="resnet18,mobilenet_v2 weights=mobilenet_v2.pth" checkpoints=runs/simclr,runs/dino,runs/classifier

Every backbone is measured frozen, by kNN and logistic regression that learn from the training images. A run of
train_classifier.py also has a row of its own head, as it was trained. All are compared with the first one, `backbones`
coming before `checkpoints` (evaluation/compare_classification.py). Runs of train_anomaly.py are for task=compare.
Writes results.json, comparison.md, comparison.csv and TensorBoard events to eval_compare_classification/ in
runs/<run_name>/.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data import DataConfig, settled, what_is_used
from data.dataset import Dataset
from data.loading import Loader
from data.splits import write_splits
from evaluation.classification import Average
from evaluation.collapse import constant_warning, feature_health
from evaluation.compare_classification import (
    METRICS,
    REPLICATES,
    SIGNIFICANT,
    Metric,
    compare_classification,
    comparison_table,
)
from evaluation.features import extract, stored_sections
from evaluation.frozen import MEASURES, train_and_test
from evaluation.tables import csv_table, markdown_table
from models.backbones.build import BackboneConfig, build_backbone, from_words
from models.classifier import load_trained
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.files import whole_file
from runtime.log import Log
from runtime.text import first_few
from runtime.values import PathText, PositiveInt, Seed
from runtime.version import code_version

TASK = "compare_classification"
HEAD = "own head"  # the measure of a classifier as it was trained


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    data: DataConfig  # the images, of which some train and some test
    backbones: list[str] = field(default_factory=list)  # each a name and its keys, as words: resnet50 weights=moco.pth
    checkpoints: list[PathText] = field(default_factory=list)  # of train_ssl.py and train_classifier.py, or run folders
    measures: list[Literal["knn", "linear", "logistic"]] = field(default_factory=lambda: ["knn", "logistic"])
    # as the tasks of these names
    metrics: list[Metric] = field(default_factory=lambda: list(METRICS))  # fewer ask less of each difference
    average: Average = "macro"  # of precision, recall and F1; micro: of all images, weighted: by a class's test images
    top_k: PositiveInt = 5  # classes among which the right one counts as found
    batch_size: PositiveInt = 64  # images per forward
    seed: Seed = 0  # of random weights, of what the measures draw, and of the bootstrap
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it


@dataclass
class Compared:
    """One of those that are compared."""

    name: str
    backbone: nn.Module
    about: str  # where its weights come from
    head: nn.Module | None = None  # of a classifier
    classes: list[str] = field(default_factory=list)  # of the head's logits
    learned: frozenset[str] = frozenset()  # names of the images that its run has learned from


def run(cfg: Config) -> None:
    device, began = distributed.setup(cfg.device), time.perf_counter()
    cfg.data = settled(cfg.data)
    compared = build(cfg)
    train_set, test_set = train_and_test(cfg.data, TASK)
    check(cfg, compared, test_set)
    folder = config.run_folder(cfg) / f"eval_{TASK}"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    write_splits(test_set, folder)
    log.say(f"{TASK}: {len(compared)} backbones, {len(train_set)} training and {len(test_set)} test images")
    log.say(what_is_used(train_set, len(train_set), {}))

    load = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    train_loader, test_loader = (Loader(dataset, cfg.batch_size, device, **load) for dataset in (train_set, test_set))
    if "top_k" in cfg.metrics and len(test_set.classes) <= cfg.top_k:
        log.say(f"top-{cfg.top_k} is left out, for there are only {len(test_set.classes)} classes")
    measured: dict[str, dict[str, Tensor]] = {measure: {} for measure in (*cfg.measures, HEAD)}
    for one in compared:
        log.say(f"{one.name}: {one.about}")
        if seen := one.learned & {*test_set.names}:
            log.say(f"warning: {one.name} has learned from {len(seen)} of the test images: {first_few(sorted(seen))}")
        for measure, scores in scores_of(one, cfg, log, train_loader, test_loader).items():
            measured[measure][one.name] = scores

    options = {"metrics": cfg.metrics, "average": cfg.average, "top_k": cfg.top_k, "seed": cfg.seed}
    rows = compare_classification(measured, test_set.labels, **options)
    write_tables(log, folder, rows, cfg)
    about = {"task": TASK, "n_train": len(train_set), "n_test": len(test_set), "classes": test_set.classes}
    about |= {"backbones": {one.name: one.about for one in compared}, "replicates": REPLICATES} | options
    log.results(about | {"rows": rows, "seconds": time.perf_counter() - began, "version": code_version()})
    distributed.cleanup()


def scores_of(one: Compared, cfg: Config, log: Log, train_loader: Loader, test_loader: Loader) -> dict[str, Tensor]:
    """{measure: class scores (N, C) of the test images}."""
    device, classes = test_loader.device, test_loader.dataset.classes
    backbone = one.backbone.to(device, memory_format=torch.channels_last)
    train = extract(backbone, train_loader, progress=f"{one.name}: training features")
    test = extract(backbone, test_loader, progress=f"{one.name}: test features")
    one.backbone.cpu()
    if warning := constant_warning(feature_health(train[0])):
        log.say(f"warning: {one.name}: {warning}")
    found = {}
    for measure in cfg.measures:
        seed = {} if measure == "knn" else {"seed": cfg.seed}
        found[measure], _ = MEASURES[measure](train, test, classes, log.say, **seed)
    if one.head is not None:
        columns = [one.classes.index(name) for name in classes]
        with torch.no_grad():
            found[HEAD] = one.head.to(device)(test[0])[:, columns]
    return found


def build(cfg: Config) -> list[Compared]:
    """All networks, so that a mistake in the last is found before the first is measured.

    Raises:
        UserError: fewer than two, two that are the same, or what cannot be built or loaded.
    """
    if len(cfg.backbones) + len(cfg.checkpoints) < 2:
        raise UserError(f"task={TASK} needs two or more: backbones=resnet18,resnet50 or checkpoints=runs/a,runs/b")
    if not cfg.measures or not cfg.metrics:
        raise UserError(f"task={TASK} needs measures and metrics; leave them out for all")
    for key in ("backbones", "checkpoints", "measures", "metrics"):
        given = getattr(cfg, key)
        if twice := next((text for text in given if given.count(text) > 1), None):
            raise UserError(f"{key} names {twice} twice: remove one")
    files = [checkpoint.file_of(path) for path in cfg.checkpoints]
    names = [" ".join(map(shorter, text.split())) for text in cfg.backbones]
    names += [file.parent.name if file.stem == "last" else f"{file.parent.name}/{file.stem}" for file in files]
    names = names if len({*names}) == len(names) else [*cfg.backbones, *map(str, files)]
    found = []
    for name, text in zip(names, cfg.backbones):
        torch.manual_seed(cfg.seed)
        found.append(Compared(name, *build_backbone(from_words(text, "backbones"))))
    return found + [from_checkpoint(name, file) for name, file in zip(names[len(found) :], files)]


def shorter(word: str) -> str:
    """A word of a backbone as the table has it: of the path of weights the last part."""
    key, equals, value = word.partition("=")
    return f"weights={Path(value).name}" if equals and key == "weights" else word


def from_checkpoint(name: str, file: Path) -> Compared:
    state = checkpoint.load(file)
    names = state.get("names", [])
    learned = frozenset(names[i] for i in state.get("learned", ()) if i < len(names))
    if "head" in state["config"]:
        model, state = load_trained(file)
        return Compared(name, model.backbone, f"classifier {file}", model.head, state["classes"], learned)
    section = config.build(BackboneConfig, stored_sections(file)["backbone"], "backbone.")
    backbone, about = build_backbone(section)
    return Compared(name, backbone, about, learned=learned)


def check(cfg: Config, compared: list[Compared], test_set: Dataset) -> None:
    """`UserError` for a classifier of other classes than the test images', or top-5 alone of no more classes."""
    if cfg.metrics == ["top_k"] and len(test_set.classes) <= cfg.top_k:
        raise UserError(f"metrics=top_k: the images have {len(test_set.classes)} classes; lower top_k={cfg.top_k}")
    for one in compared:
        if one.head is not None and {*one.classes} != {*test_set.classes}:
            other = sorted({*one.classes} ^ {*test_set.classes})
            raise UserError(
                f"the classes of {one.name} are not those of the images (different: {first_few(other, 4)}): "
                "compare classifiers of one data set"
            )


def write_tables(log: Log, folder: Path, rows: list[dict], cfg: Config) -> None:
    """comparison.md, comparison.csv, TensorBoard's text, and the terminal's."""
    table = markdown_table(*comparison_table(rows, cfg.top_k))
    first = {row["measure"]: row["name"] for row in rows if row["verdict"] is None}
    note = (
        f"Precision, recall and F1: {cfg.average} average. In brackets: 95 % intervals of {REPLICATES:,} bootstrap "
        "replicates, the same test images for all. The first: "
        + ", ".join(f"{name} ({measure})" for measure, name in first.items())
        + ". p: two-sided, of the paired bootstrap, corrected by Holm for all differences in the table. "
        f"better, worse: p below {SIGNIFICANT}.\n"
    )
    log.text(TASK, f"{table}\n{note}")
    log.say(f"{table}\n{note}")
    if distributed.is_main():
        with whole_file(folder / "comparison.md") as file:
            file.write(f"{table}\n{note}")
        with whole_file(folder / "comparison.csv") as file:
            file.write(csv_table([flat(row) for row in rows]))


def flat(row: dict) -> dict:
    """The row with each interval as two columns, `..._low` and `..._high`."""
    cells = {}
    for key, value in row.items():
        if key.endswith("interval"):
            low, high = value or (None, None)
            key = key.removesuffix("interval")
            cells |= {f"{key}low": low, f"{key}high": high}
        else:
            cells[key] = value
    return cells
