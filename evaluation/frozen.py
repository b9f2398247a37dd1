"""How well a backbone's frozen features tell classes apart: what task=knn and task=linear have in common.

Both take the features and labels of a training and a test set, and give class scores of the test images, from which
everything else is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data import DataConfig, build_dataset, settled, what_is_used
from data.loading import Loader
from data.splits import write_splits
from evaluation.classification import classification_report, confusion_matrix
from evaluation.collapse import constant_warning, feature_health
from evaluation.features import extract
from evaluation.knn import KNN_SETTINGS, few_neighbors, knn_scores
from evaluation.linear_probe import linear_probe
from models.backbones.build import BackboneConfig, build_backbone
from plots.confusion import confusion_image
from plots.heatmaps import save
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


MEASURES = {"knn": knn, "linear": linear}  # training and test features -> class scores (N, C) of the test set, metrics


@dataclass(kw_only=True)
class TaskConfig:
    name: str = config.choice(MEASURES)
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class FrozenConfig:
    task: TaskConfig  # how it is measured
    data: DataConfig  # the images, of which some train and some test
    backbone: BackboneConfig  # what is measured
    checkpoint: PathText | None = None  # last.pt, best.pt or step_*.pt of a run; none: the backbone of these keys
    batch_size: PositiveInt = 64  # images per forward
    seed: Seed = 0  # of the random weights of a backbone without others
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


def measure(cfg: FrozenConfig) -> None:
    """Write the metrics of one backbone's features, by the measure that `cfg.task` names, into its run folder."""
    name = f"eval_{cfg.task.name}"
    folder = config.run_folder(cfg) / name
    device = distributed.setup(cfg.device)
    cfg.data = settled(cfg.data)
    if cfg.checkpoint:  # beside it; of other checkpoints than last.pt by their name
        cfg.checkpoint = str(checkpoint.file_of(cfg.checkpoint))
        stem = Path(cfg.checkpoint).stem
        folder = Path(cfg.checkpoint).parent / (name if stem == "last" else f"{name}_{stem}")
    resolved, began = config.as_dict(cfg), time.perf_counter()
    checkpoint.open_run(folder, resolved)
    log = Log(folder, cfg)

    torch.manual_seed(cfg.seed)
    backbone, report = build_backbone(cfg.backbone)
    backbone.to(device, memory_format=torch.channels_last)
    train_set, test_set = build_dataset(cfg.data, "train"), build_dataset(cfg.data, "test")
    if len(train_set.labels.unique()) < 2:
        raise UserError(
            f"task={cfg.task.name} tells classes apart, but all training images of {cfg.data.options['root']} are of "
            "one: data.root needs a folder for each class, two at least"
        )
    log.say(f"{name}: {cfg.backbone.name} ({report}), {len(train_set)} training and {len(test_set)} test images")
    log.say(what_is_used(train_set, len(train_set), {}))
    write_splits(test_set, folder)
    load = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    train, test = (
        extract(backbone, Loader(dataset, cfg.batch_size, device, **load), progress=f"{split} features")
        for dataset, split in ((train_set, "training"), (test_set, "test"))
    )
    health = feature_health(train[0])
    log.warn_now(0, constant_warning(health))
    scores, metrics = MEASURES[cfg.task.name](train, test, train_set.classes, log.say, **cfg.task.options)
    about = {"task": cfg.task.name, "backbone": cfg.backbone.name, "n_train": len(train_set), "n_test": len(test_set)}
    results = about | metrics | health | classification_report(scores, test[1], train_set.classes)

    if distributed.is_main():
        matrix = confusion_matrix(scores.argmax(1), test[1], len(train_set.classes))
        image = confusion_image(matrix, train_set.classes)
        save(image, folder / "confusion.png")
        log.image("confusion", pil_to_tensor(image))
    log.results(results | {"seconds": time.perf_counter() - began, "version": code_version()})
    distributed.cleanup()
