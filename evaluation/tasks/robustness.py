"""What corruptions, shifts and neighboring frames do to a kNN, a classifier or a detector.

    python eval.py task=robustness checkpoint=runs/classifier_own
    python eval.py task=robustness checkpoint=runs/patchcore_own severities=1,3,5 corruptions=fog,defocus_blur
    python eval.py configs/eval_folder.yaml task=robustness data.root=/images backbone.weights=weights.pth

A run of train_classifier.py is tested with its own head, one of train_anomaly.py by its image AUROC and by the rates of
alarms at its stored threshold, any other backbone by kNN (k=20) with the training images. The test images are corrupted
as those of CIFAR-10-C or ImageNet-C, on the device (data/corruptions/); over- and underexposure are beyond these. Also
measured: how far embeddings move, and how many decisions change, under corruptions, when the camera moves by a few
pixels, and between neighboring frames. Writes results.json, robustness.csv (a row per corruption and severity),
robustness.md, robustness.png (curves), corrupted.png (one image under all corruptions) and TensorBoard events to
eval_robustness/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from data import build_dataset, build_geometry, settled
from data.corruptions import CORRUPTIONS, EXPOSURES, Constants, constants_for
from data.datasets.cifar import Severity
from data.loading import Loader
from data.splits import write_splits
from evaluation.anomaly.prediction import load_run
from evaluation.features import extract, stored_sections
from evaluation.frozen import FrozenConfig, folder_beside, opened
from evaluation.inspect.corruption_error import find_reference, mean_errors, summary
from evaluation.inspect.robustness_report import write_report
from evaluation.inspect.stability import between_frames, under_shifts
from evaluation.inspect.subjects import SUBJECTS, Detecting, Neighbors, Subject, Trained
from evaluation.inspect.under_corruption import examples, numbers, require_files, under_corruptions
from models.backbones.build import BackboneConfig
from models.classifier import load_trained
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.text import first_few
from runtime.values import PathText, PositiveInt
from runtime.version import code_version
from training.optim import mixed_precision

TASK = "robustness"
PUBLISHED = [name for name in CORRUPTIONS if name not in EXPOSURES]  # as CIFAR-10-C


@dataclass(kw_only=True)
class Config(FrozenConfig):
    corruptions: list[str] | None = None  # fewer take less time; none: all, with cifar10_c those that it has
    severities: list[Severity] = field(default_factory=lambda: [1, 2, 3, 4, 5])  # 1 mild, 5 strong
    constants: Literal["auto", "32", "224"] = "auto"  # CIFAR-10-C's, ImageNet-C's; auto: CIFAR's up to 64 pixels
    cifar10_c: PathText | None = None  # folder of CIFAR-10-C's published files, taken in place of images made here
    reference: PathText | None = None  # whose errors the mCE divides by: alexnet, or a run measured before
    shifts: list[PositiveInt] = field(default_factory=lambda: [1, 4])  # pixels that the camera moves by
    frames: bool = False  # the images of a group, or folder, are frames of a video, in the order of their names


@dataclass(frozen=True)
class Studied:
    """What is measured, on which images, and where the results go."""

    subject: Subject
    log: Log
    test: Loader
    about: dict  # for results.json


def run(cfg: Config) -> None:
    began, kind, severities = time.perf_counter(), check(cfg), sorted({*cfg.severities})
    assert cfg.corruptions is not None
    if cfg.cifar10_c is not None:
        require_files(cfg.cifar10_c, cfg.corruptions)
    reference = find_reference(cfg.reference, cfg.corruptions, severities, SUBJECTS[kind].measure)
    studied = open_detector(cfg) if kind == "detector" else open_classes(cfg, kind)
    subject, log, test = studied.subject, studied.log, studied.test
    geometry = test.dataset.geometry
    fitting = constants_for(geometry.height, geometry.width)
    constants: Constants = {"auto": fitting, "32": 32, "224": 224}[cfg.constants]
    clean = subject.look(test, "images as they are")
    own = {"corruption": "none", "severity": 0, **numbers(subject, clean, clean)}
    made: dict[str, Any] = {"seed": cfg.seed, "constants": constants}
    how = made | {"published": cfg.cifar10_c}
    rows = under_corruptions(subject, test, clean, cfg.corruptions, severities, **how, say=log.say)
    results: dict[str, Any] = {"task": TASK, "kind": subject.kind, "measure": subject.measure} | studied.about | made
    results |= {"severities": severities, "reference": cfg.reference} | summary(own["error"], rows, reference)
    results |= {"errors": mean_errors(rows), "clean": own, "rows": rows}
    results["shifts"] = under_shifts(subject, test, clean, cfg.shifts)
    results["frames"] = between_frames(subject, test.dataset, clean) if cfg.frames else None
    if cfg.frames and results["frames"] is None:
        log.say("note: frames=true, but no two test images are of one group or folder")
    if log.writer:
        write_report(log, results, examples(test, cfg.corruptions, severities, **how))
    log.results(results | {"seconds": time.perf_counter() - began, "version": code_version()})
    distributed.cleanup()


def check(cfg: Config) -> str:
    """The kind of the subject: knn, classifier or detector. Settles `cfg.corruptions`.

    Raises:
        UserError: unknown corruptions, and what a trained network cannot have otherwise than its run.
    """
    if cfg.corruptions is None:
        cfg.corruptions = list(CORRUPTIONS if cfg.cifar10_c is None else PUBLISHED)
    for name in cfg.corruptions:
        config.pick(CORRUPTIONS, name, "corruptions")
    for key in ("corruptions", "severities"):
        if not getattr(cfg, key):
            raise UserError(f"{key} is empty: leave it out for all")
    if twice := next((name for name in cfg.corruptions if cfg.corruptions.count(name) > 1), None):
        raise UserError(f"corruptions names {twice} twice: remove one")
    if cfg.checkpoint is None:
        return "knn"
    stored = checkpoint.load(cfg.checkpoint)["config"]
    kind = "detector" if "detector" in stored else "classifier" if "head" in stored else "knn"
    of_run = config.build(BackboneConfig, stored_sections(cfg.checkpoint)["backbone"], "backbone.")
    if kind != "knn" and cfg.backbone != of_run:
        raise UserError(f"the {kind} in {cfg.checkpoint} has a backbone of its own: remove the keys backbone.*")
    if kind == "detector" and cfg.cifar10_c is not None:
        raise UserError("cifar10_c has images to classify, and the run is of a detector: remove it")
    return kind


def open_classes(cfg: Config, kind: str) -> Studied:
    """The kNN of a backbone, or a classifier."""
    found = opened(cfg, TASK)
    load: dict[str, Any] = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    test = Loader(found.test_set, cfg.batch_size, found.device, **load)
    about = {key: value for key, value in found.about.items() if key != "task"}
    if kind == "knn":
        bank = extract(found.backbone, Loader(found.train_set, cfg.batch_size, found.device, **load), progress="bank")
        return Studied(Neighbors(found.backbone, bank, len(found.classes)), found.log, test, about)
    assert cfg.checkpoint is not None
    network, state = load_trained(cfg.checkpoint)
    if {*state["classes"]} != {*found.classes}:
        other = sorted({*state["classes"]} ^ {*found.classes})
        raise UserError(f"the classes of {cfg.checkpoint} are not those of the images: {first_few(other, 4)}")
    network.to(found.device, memory_format=torch.channels_last)
    context, _ = mixed_precision(state["config"]["precision"], found.device)
    columns = [state["classes"].index(name) for name in found.classes]
    return Studied(Trained(network, columns, context), found.log, test, about)


def open_detector(cfg: Config) -> Studied:
    """The detector of a run, its threshold, and the test images."""
    assert cfg.checkpoint is not None
    device = distributed.setup(cfg.device)
    file = checkpoint.file_of(cfg.checkpoint)
    cfg.data, cfg.checkpoint = settled(cfg.data), str(file)
    detector, geometry, state = load_run(file)
    if build_geometry(cfg.data) != geometry:
        raise UserError(f"the detector in {file} takes images as its run did: remove the keys data.size, data.fit, ...")
    if cfg.data.tile:
        raise UserError(f"the detector in {file} takes tiles of whole images, which this task does not corrupt")
    test_set = build_dataset(cfg.data, "test")
    if test_set.defects is None:
        raise UserError(f"data.name={cfg.data.name} has no defects to find: use that of the run")
    folder = folder_beside(file, TASK)
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    write_splits(test_set, folder)
    name, threshold = state["config"]["detector"]["name"], state["calibration"]["threshold"]
    limit = "no threshold" if threshold is None else f"threshold {threshold:.6g}"
    log.say(f"eval_{TASK}: {name}, {cfg.backbone.name}, {limit}, {len(test_set)} test images")
    context, _ = mixed_precision(state["config"]["precision"], device)
    test = Loader(test_set, cfg.batch_size, device, cache=cfg.data.cache, workers=cfg.data.workers)
    about = {"detector": name, "backbone": cfg.backbone.name, "n_test": len(test_set), "threshold": threshold}
    return Studied(Detecting(detector.to(device), threshold, context, cfg.seed), log, test, about)
