"""Measure a backbone, or compare runs.

    python eval.py task=knn checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=linear data.root=/images backbone.weights=weights.pth
    python eval.py task=compare runs=runs/patchcore_imagenet,runs/patchcore_dino
    python eval.py task=defects data.name=mvtec data.root=/mvtec data.category=tile data.size=256
    python eval.py task=describe backbones="resnet50,vit_small patch=8,convnext_tiny"

With `checkpoint`, data and backbone are what the run's config says, unless keys here say otherwise. Writes
results.json, confusion.png and TensorBoard events to eval_<task>/ in the checkpoint's folder (without one: in
runs/<run_name>/). `compare` takes folders of train_anomaly.py whose test images are the same, draws them again and
again for all runs together (paired bootstrap), and prints which differences are more than chance. `defects` draws a
sheet of synthetic defects on training images: all kinds, or one with its options (`defect=nsa defect.patches=1`).
`describe` prints what backbones cost, each a name and its options (`backbones=all`: every name): one table.
"""

import runtime.threads  # before torch

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torchvision.transforms.functional import pil_to_tensor

from data import DataConfig, DefectConfig, build_dataset, settled, what_is_used
from data.defects import DEFECTS
from data.loading import Loader
from evaluation.anomaly.compare import compare as compare_runs
from evaluation.anomaly.compare import compare_table, load_scores
from evaluation.classification import classification_report, confusion_matrix
from evaluation.collapse import constant_warning, feature_health
from evaluation.cost import describe as description
from evaluation.cost import description_table
from evaluation.features import extract
from evaluation.knn import KNN_SETTINGS, few_neighbors, knn_scores
from evaluation.linear_probe import linear_probe
from evaluation.tables import markdown_table
from models.backbones import BACKBONES
from models.backbones.build import BackboneConfig, build_backbone
from plots.confusion import confusion_image
from plots.heatmaps import save
from plots.sheets import defect_sheet
from runtime import checkpoint, config, distributed, errors, help
from runtime.log import Log
from runtime.values import PathText, Seed, coerce
from runtime.version import code_version
from training.optim import PRECISIONS


def knn(train, test, classes: list[str], say, *, k: int = 20, temperature: float = 0.07) -> tuple[torch.Tensor, dict]:
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
    train,
    test,
    classes: list[str],
    say,  # noqa: ARG001
    *,
    epochs: int = 100,
    batch_size: int = 256,
    seed: Seed = 0,
) -> tuple[torch.Tensor, dict]:
    """A linear classifier on frozen features; its learning rate is chosen on a hold-out of the training set.

    Args:
        epochs: of SGD over the features.
        batch_size: features of a step.
        seed: of the hold-out, the initial weights and the order.
    """
    return linear_probe(*train, test[0], n_classes=len(classes), epochs=epochs, batch_size=batch_size, seed=seed)


MEASURES = {"knn": knn, "linear": linear}  # of a backbone: training and test features -> class scores, metrics


@dataclass(kw_only=True)
class TaskConfig:
    name: str = config.choice(MEASURES)
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Config:
    task: TaskConfig  # what is measured
    data: DataConfig  # the images, of which some train and some test
    backbone: BackboneConfig  # what is measured
    checkpoint: PathText | None = None  # last.pt, best.pt or step_*.pt of a run; none: the backbone of these keys
    batch_size: int = 64  # images per forward
    seed: Seed = 0  # of the random weights of a backbone without others
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


@dataclass(kw_only=True)
class CompareConfig:
    task: str  # this one
    runs: list[PathText]  # folders of train_anomaly.py; the first is what the others are compared with
    seed: Seed = 0  # of the bootstrap


@dataclass(kw_only=True)
class DefectsConfig:
    task: str  # this one
    data: DataConfig  # the images
    defect: DefectConfig | None = None  # None: all kinds, as they are by default
    images: int = 6  # rows of the sheet
    seed: Seed = 0  # of the defects
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


@dataclass(kw_only=True)
class DescribeConfig:
    task: str  # this one
    backbones: list[str]  # each a name and its options, as words
    size: int = 224  # side of the images
    batch_size: int = 16  # images per forward
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward whose speed is measured
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


def main(argv: list[str]) -> None:
    layers = config.read(argv)
    task = config.chosen(layers, "task")
    if task is None and help.asked(argv):
        about = MEASURES | {name: run for name, (_, run) in TASKS.items() if name not in MEASURES}
        help.show(f"{__doc__}\nTasks; `task=NAME --help` shows the keys of one.\n\n{help.names(about)}")
    kind, run = config.pick(TASKS, task, "task")
    run(config.load(kind, argv, *(stored(layers) if kind is Config else ())))


def schema(argv: list[str]) -> type | None:
    """The dataclass of a command line's keys, for sweep.py; None of tasks with another, or with a checkpoint's keys."""
    layers = config.read(argv)
    foreign = config.chosen(layers, "task") not in MEASURES or any(layer.get("checkpoint") for layer in layers)
    return None if foreign else Config


def measure(cfg: Config) -> None:
    """Metrics of one backbone's features."""
    check_options(cfg.task.options)
    device = distributed.setup(cfg.device)
    cfg.data = settled(cfg.data)
    name = f"eval_{cfg.task.name}"
    folder = config.run_folder(cfg) / name
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
        raise errors.UserError(
            f"task={cfg.task.name} tells classes apart, but all training images of {cfg.data.options['root']} are of "
            "one: data.root needs a folder for each class, two at least"
        )
    log.say(f"{name}: {cfg.backbone.name} ({report}), {len(train_set)} training and {len(test_set)} test images")
    log.say(what_is_used(train_set, len(train_set), {}))
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


def check_options(options: dict) -> None:
    """Refuse what would only fail once all features are there."""
    for key, value in options.items():
        if (key in ("k", "epochs", "batch_size") and value < 1) or (key == "temperature" and not value > 0):
            raise errors.UserError(f"task.{key}={value} must be {'positive' if key == 'temperature' else 'at least 1'}")


def compare(cfg: CompareConfig) -> None:
    """Paired bootstrap between runs, as a table and in <first run>/eval_compare/."""
    distributed.setup("cpu")
    if len(cfg.runs) < 2:
        raise errors.UserError(f"task=compare needs two run folders or more, not {len(cfg.runs)}: runs=runs/a,runs/b")
    cfg.runs = [str(checkpoint.folder_of(run)) for run in cfg.runs]
    result = compare_runs([load_scores(Path(run) / "test_scores.pt") for run in cfg.runs], cfg.runs, seed=cfg.seed)
    folder = Path(cfg.runs[0]) / "eval_compare"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    table = markdown_table(*compare_table(result))
    log.text("compare", table)
    log.say(table)
    log.results({"task": "compare"} | result | {"version": code_version()})


def defects(cfg: DefectsConfig) -> None:
    """A sheet of synthetic defects on training images, spread evenly over the set."""
    config.at_least_one(cfg, "images")
    device = distributed.setup(cfg.device)
    cfg.data = settled(cfg.data)
    dataset = build_dataset(cfg.data, "train")
    ids = torch.linspace(0, len(dataset) - 1, min(cfg.images, len(dataset))).round().long()
    images = torch.stack([dataset[i][0] for i in ids.tolist()]).to(device)
    chosen = {cfg.defect.name: cfg.defect.options} if cfg.defect else {name: {} for name in DEFECTS}
    made = {name: DEFECTS[name](**options)(images, ids, 0, seed=cfg.seed) for name, options in chosen.items()}

    folder = config.run_folder(cfg) / "eval_defects"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    image = defect_sheet(images, made, f"Synthetic defects on training images, seed {cfg.seed}")
    save(image, folder / "defects.png")
    log.image("defects", pil_to_tensor(image))
    shares = {name: {"masked": float(masks.float().mean())} for name, (_, masks) in made.items()}
    log.results({"task": "defects", "sheet": str(folder / "defects.png"), "kinds": shares})
    distributed.cleanup()


def describe(cfg: DescribeConfig) -> None:
    """Parameters, operations, maps and speed of a list of backbones, in a table."""
    config.at_least_one(cfg, "size", "batch_size")
    if not cfg.backbones:
        raise errors.UserError("task=describe needs backbones: names with their options, or all")
    device = distributed.setup(cfg.device)
    asked = list(BACKBONES) if cfg.backbones == ["all"] else cfg.backbones
    sections = [config.read([f"name={name}", *options])[-1] for name, *options in map(str.split, asked)]
    backbones = [config.build(BackboneConfig, section, "backbones.") for section in sections]
    folder = config.run_folder(cfg) / "eval_describe"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log, described = Log(folder, cfg), {}
    for name, settings in zip(asked, backbones):
        backbone, _ = build_backbone(settings)
        described[name] = description(
            backbone, cfg.size, batch_size=cfg.batch_size, device=device, dtype=PRECISIONS[cfg.precision]
        )
    table = markdown_table(*description_table(described))
    log.text("describe", table)
    log.say(table)
    log.results({"task": "describe", "backbones": described, "version": code_version()})
    distributed.cleanup()


TASKS = {  # what each needs to know, and does
    **dict.fromkeys(MEASURES, (Config, measure)),
    "compare": (CompareConfig, compare),
    "defects": (DefectsConfig, defects),
    "describe": (DescribeConfig, describe),
}


def stored(layers: list[dict]) -> list[dict]:
    """The data and backbone sections of the config of the checkpoint that `layers` name, and its weights."""
    named = [layer["checkpoint"] for layer in layers if "checkpoint" in layer]
    if not named or (path := coerce(named[-1], PathText | None, "checkpoint")) is None:
        return []
    sections, path = checkpoint.load(path)["config"], str(checkpoint.file_of(path))
    return [{"data": sections["data"], "backbone": sections["backbone"] | {"weights": path, "part": "auto"}}]


if __name__ == "__main__":
    errors.run(main)
