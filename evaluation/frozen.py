"""How well a backbone's frozen features tell classes apart: what the tasks on frozen features have in common.

A measure takes the features and labels of a training and a test set, and gives class scores of the test images, from
which everything else is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import DataConfig, build_dataset, settled, what_is_used
from data.dataset import Dataset
from data.loading import Loader
from data.splits import write_splits
from evaluation.classification import classification_report
from evaluation.collapse import constant_warning, feature_health
from evaluation.confused import draw_confusion
from evaluation.features import extract
from evaluation.knn import KNN_SETTINGS, few_neighbors, knn_scores
from evaluation.linear_probe import linear_probe
from evaluation.logistic import logistic_probe
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.values import PathText, PositiveFloat, PositiveInt, Seed
from runtime.version import code_version

Features = tuple[Tensor, Tensor]  # (N, D) float32 and labels (N,) int64


def knn(
    train: Features,
    test: Features,
    classes: list[str],
    say: Callable,
    *,
    k: PositiveInt = 20,
    temperature: PositiveFloat = 0.07,
) -> tuple[Tensor, dict]:
    """DINO's weighted vote; the metrics of all of `KNN_SETTINGS`, the report for k and temperature.

    Args:
        k: neighbors that vote, in the report and the confusion matrix.
        temperature: a neighbor's vote weighs exp(similarity / temperature).
    """
    metrics = {}
    if few := few_neighbors(len(train[0]), k):
        say(few)
    for setting in KNN_SETTINGS:
        scores = knn_scores(*train, test[0], **setting, n_classes=len(classes))
        metrics[f"knn{setting['k']}_top1"] = float((scores.argmax(1) == test[1]).float().mean())
    scores = knn_scores(*train, test[0], k=k, temperature=temperature, n_classes=len(classes))
    return scores.masked_fill(scores == 0, -torch.inf), metrics  # a class without a vote is no hit


def linear(
    train: Features,
    test: Features,
    classes: list[str],
    say: Callable,  # noqa: ARG001
    *,
    epochs: PositiveInt = 100,
    batch_size: PositiveInt = 256,
    seed: Seed = 0,
) -> tuple[Tensor, dict]:
    """A linear classifier on frozen features; its learning rate is chosen on a hold-out of the training set.

    Args:
        epochs: of SGD over the features.
        batch_size: features per step.
        seed: of the hold-out, the initial weights and the order.
    """
    return linear_probe(*train, test[0], n_classes=len(classes), epochs=epochs, batch_size=batch_size, seed=seed)


def logistic(
    train: Features,
    test: Features,
    classes: list[str],
    say: Callable,  # noqa: ARG001
    *,
    seed: Seed = 0,
) -> tuple[Tensor, dict]:
    """Logistic regression, solved exactly; its penalty is chosen on a hold-out of the training set.

    Args:
        seed: of the hold-out.
    """
    return logistic_probe(*train, test[0], n_classes=len(classes), seed=seed)


MEASURES = {"knn": knn, "linear": linear, "logistic": logistic}  # -> class scores (N, C) of the test set, metrics


@dataclass(kw_only=True)
class FrozenConfig:
    task: str  # this one
    data: DataConfig  # the images, of which some train and some test
    backbone: BackboneConfig  # what is measured
    checkpoint: PathText | None = None  # last.pt, best.pt or step_*.pt of a run; none: the backbone of these keys
    batch_size: PositiveInt = 64  # images per forward
    seed: Seed = 0  # of the random weights of a backbone without others
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


@dataclass(kw_only=True)
class TaskConfig:
    name: str = config.choice(MEASURES)
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class MeasureConfig(FrozenConfig):
    task: TaskConfig  # how it is measured


@dataclass(frozen=True)
class OpenedBackbone:
    """The run folder of a task, and the backbone that it looks at."""

    folder: Path
    log: Log
    device: torch.device
    backbone: nn.Module
    weights: str  # where they come from, in words
    about: dict  # for results.json
    began: float

    def write(self, results: dict) -> None:
        """The end: results.json."""
        seconds = {"seconds": time.perf_counter() - self.began, "version": code_version()}
        self.log.results(self.about | results | seconds)
        distributed.cleanup()


@dataclass(frozen=True)
class Opened(OpenedBackbone):
    """And the images."""

    train_set: Dataset
    test_set: Dataset

    @property
    def classes(self) -> list[str]:
        return self.train_set.classes

    def confusion(self, scores: Tensor, labels: Tensor) -> None:
        """Draw which classes are taken for which; scores (N, C) and labels (N,) of the test images."""
        draw_confusion(self.log, scores, labels, self.test_set, self.classes)


def train_and_test(
    data: DataConfig, task: str, by_split: Callable[[DataConfig, str], DataConfig] | None = None
) -> tuple[Dataset, Dataset]:
    """The training and the test set of a settled section.

    Raises:
        UserError: the training images are of one class, so the task cannot tell anything.
    """
    sections = [by_split(data, split) if by_split else data for split in ("train", "test")]
    train_set, test_set = (build_dataset(section, split) for section, split in zip(sections, ("train", "test")))
    if len(train_set.labels.unique()) < 2:
        raise UserError(
            f"task={task} tells classes apart, but all training images of {data.options.get('root', data.name)} are of "
            "one: data.root needs a folder for each class, two at least"
        )
    return train_set, test_set


def task_folder(cfg: Any, task: str) -> Path:
    """eval_<task>/ beside the checkpoint of `cfg`, of other ones than last.pt with their name; else in the run folder.
    Settles `cfg.checkpoint`: the file itself."""
    if not cfg.checkpoint:
        return config.run_folder(cfg) / f"eval_{task}"
    cfg.checkpoint = str(checkpoint.file_of(cfg.checkpoint))
    return folder_beside(Path(cfg.checkpoint), task)


def folder_beside(file: Path, task: str) -> Path:
    return file.parent / (f"eval_{task}" if file.name == checkpoint.LAST else f"eval_{task}_{file.stem}")


def open_backbone(cfg: Any, task: str) -> OpenedBackbone:
    """Open the run folder of a task and build its backbone. Settles `cfg.data`, where there is one.

    cfg: has `data`, `backbone`, `checkpoint`, `seed`, `device`, `runs` and `run_name`, as `FrozenConfig`.
    """
    folder, device = task_folder(cfg, task), distributed.setup(cfg.device)
    cfg.data = None if cfg.data is None else settled(cfg.data)
    resolved, began = config.as_dict(cfg), time.perf_counter()
    checkpoint.open_run(folder, resolved)
    log = Log(folder, cfg)
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    backbone.to(device, memory_format=torch.channels_last)
    return OpenedBackbone(folder, log, device, backbone, weights, {"task": task, "backbone": cfg.backbone.name}, began)


def opened(cfg: FrozenConfig, task: str, by_split: Callable[[DataConfig, str], DataConfig] | None = None) -> Opened:
    """Open the run folder of a task; build backbone and data.

    Args:
        by_split: what a split's data section becomes, where training and test images differ in it.

    Raises:
        UserError: the training images are of one class.
    """
    found = open_backbone(cfg, task)
    train_set, test_set = train_and_test(cfg.data, task, by_split)
    n_train, n_test, log = len(train_set), len(test_set), found.log
    log.say(f"eval_{task}: {cfg.backbone.name} ({found.weights}), {n_train} training and {n_test} test images")
    log.say(what_is_used(train_set, n_train, {}))
    write_splits(test_set, found.folder)
    about = found.about | {"n_train": n_train, "n_test": n_test}
    return Opened(**(vars(found) | {"about": about}), train_set=train_set, test_set=test_set)


def features_of(cfg: FrozenConfig, found: Opened) -> tuple[Features, Features]:
    """The features of training and test images; adds their health to the results."""
    load = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    train, test = (
        extract(found.backbone, Loader(dataset, cfg.batch_size, found.device, **load), progress=f"{split} features")
        for dataset, split in ((found.train_set, "training"), (found.test_set, "test"))
    )
    health = feature_health(train[0])
    found.log.warn_now(0, constant_warning(health))
    found.about.update(health)
    return train, test


def measure(cfg: MeasureConfig) -> None:
    """Write the metrics of one backbone's features, by the measure that `cfg.task` names, into its run folder."""
    found = opened(cfg, cfg.task.name)
    train, test = features_of(cfg, found)
    scores, metrics = MEASURES[cfg.task.name](train, test, found.classes, found.log.say, **cfg.task.options)
    found.confusion(scores, test[1])
    found.write(metrics | classification_report(scores, test[1], found.classes))
