"""Fit an anomaly detector on normal images and test it.

    python train_anomaly.py configs/patchcore_own.yaml data.root=/own data.category=bolt
    torchrun --nproc_per_node=2 train_anomaly.py configs/rd4ad_mvtec.yaml backbone.weights=runs/dino_scavport/last.pt
    python train_anomaly.py configs/patchcore_own.yaml data.root=/own data.category=bolt update=runs/old/last.pt

Writes runs/<run_name>/: last.pt, results.json, test_scores.csv, images, TensorBoard events. The detector is tested
once, after its last epoch. Thresholds come from normal images that it was not fitted on: the set's split `validation`,
where it has one, or training images, each left out in turn where the detector can do that, else held out. `main` calls
`train` for detectors with gradients, `fit` for those fitted in one pass, both for some, then `calibrate_and_test`; what
it prepares before is below them in that order.
"""

import runtime.threads  # before torch

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from data import DataConfig, build_dataset, settled, what_is_used
from data.loading import Loader
from data.masks import names_with_sizes
from data.splits import holdout, write_splits
from data.tiles import Tiles
from evaluation.anomaly.bank_updates import load_memory, update_memory, with_range_of
from evaluation.anomaly.calibration import calibrate, promise
from evaluation.anomaly.detection import batches_of, examine_set
from evaluation.anomaly.report import report
from evaluation.anomaly.thresholds import FalseAlarmRate
from evaluation.anomaly.tiling import check_tiling, examine_set_in_tiles
from models.anomaly import DETECTORS, DetectorConfig, build_detector
from models.anomaly.detector import Detector, TrainingBatch
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config, distributed, errors
from runtime.errors import UserError
from runtime.run import Run
from runtime.values import BelowOne, NonNegativeInt, PathText, PositiveInt, Seed
from training.optim import OptimConfig, apply_gradients, build_optimizer, mixed_precision, set_rates
from training.schedule import check_lengths


@dataclass(kw_only=True)
class Config:
    data: DataConfig  # the images
    backbone: BackboneConfig  # what the detector sees them with
    detector: DetectorConfig  # the method
    optim: OptimConfig | None = None  # for detectors trained by gradients; the others are fitted in one pass
    epochs: NonNegativeInt = 1  # passes over the training set, for detectors trained by gradients
    batch_size: PositiveInt = 16  # images per step, over all processes
    update: PathText | None = None  # last.pt of a fitted run: only learn what was added to its images or taken away
    holdout: BelowOne | None = None  # share kept for thresholds; none: 0.1; 0 if few, each left out, or of `validation`
    false_alarm_rate: FalseAlarmRate = 0.01  # what the thresholds promise; below 1 / (normals + 1) nothing can
    pixels: Literal["input", "original"] = "input"  # resolution of the pixel metrics
    log_every: PositiveInt = 10  # steps between points of the curves
    save_every: PositiveInt = 500  # steps between checkpoints
    seed: Seed = 0  # of the weights, the order and the hold-out
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the networks
    compile: bool = False  # the training by gradients
    sync_bn: bool = False  # BatchNorm over all processes; CUDA only
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


def main(argv: list[str]) -> None:
    cfg = config.load(Config, argv)
    run = Run(cfg)
    check(cfg, run)
    detector, weights = build_networks(cfg, run)
    data = prepare_data(cfg, run, detector)
    old = load_memory(cfg.update, config.as_dict(cfg), detector) if cfg.update else None
    autocast, scaler = mixed_precision(cfg.precision, run.device)
    parts: dict[str, Any] = {"model": detector}
    total = 1  # a detector without gradients is fitted in one step
    if data.lessons is not None:
        optimizer = build_optimizer(cfg.optim, detector)
        parts |= {"optimizer": optimizer, "scaler": scaler}
        total = cfg.epochs * len(data.lessons) if cfg.epochs else 0
    with autocast():
        image = data.learned.dataset[data.names["learned"][0]][0].to(run.device)
        training = detector.by_gradient and total > 0
        detector.rehearse(image, batch_size=data.learned.batch_size, training=training, seed=cfg.seed)

    state: dict = run.open(parts, total, data.names, {"fitted": False, "seconds_fit": 0.0})
    run.log.say(f"{cfg.run_name}: {cfg.detector.name}{weights}, {len(data.learned.indices)} normals to learn from")
    run.log.say(data.note)
    write_splits(data.tested.dataset, run.folder)
    if state["fitted"] and run.is_finished():  # results without a fitted checkpoint are of an earlier run
        return

    if not state["fitted"]:
        if detector.by_gradient and total:
            train(cfg, run, data, detector, optimizer, scaler, autocast)
        if detector.fits:
            fit(cfg, run, data, detector, old, autocast)
        state = {"fitted": True, "seconds_fit": run.seconds}
        run.save(total, **state)
    else:
        detector.try_out(run.folder / checkpoint.LAST, tuple(image.shape[1:]))
    calibrate_and_test(cfg, run, data, detector, state, autocast)


def train(
    cfg: Config,
    run: Run,
    data: "Data",
    detector: Detector,
    optimizer: Optimizer,
    scaler: GradScaler,
    autocast: Callable,
) -> None:
    """Train the detector by gradients: the loop."""
    assert cfg.optim is not None and data.lessons is not None  # every detector by gradient has both
    model = torch.compile(detector) if cfg.compile else detector
    model = DistributedDataParallel(model, find_unused_parameters=detector.partial) if run.world > 1 else model
    epoch_steps = len(data.lessons)
    for step in run.steps():
        epoch, first = divmod(step, epoch_steps)
        detector.train()
        lr = cfg.optim.lr_at(step, run.total, epoch_steps, cfg.batch_size)
        set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, run.total), cfg.optim.peak_lr(cfg.batch_size))

        if first == 0 or step == run.start:
            batches = data.lessons.epoch(epoch, first_batch=first)
        images, labels, ids = run.window.next(batches)
        torch.manual_seed(seed_of(cfg, step))
        with autocast():
            steps, stats = detector.steps(TrainingBatch(images, labels, ids, epoch, cfg.seed)), {}
        for inputs in steps:  # most detectors make one step of a batch
            with autocast():
                loss, seen = model(*inputs)
            stats |= seen
            scaler.scale(loss).backward()
            run.window.add(loss)
            grad_norm = apply_gradients(optimizer, scaler, detector.parameters(), cfg.optim)

        done = step + 1
        save_due, stops = run.due(done, cfg.save_every), run.stops(done)
        log_due = save_due or run.due(done, cfg.log_every)
        if log_due or stops:
            run.check(done, lr, grad_norm, scaler)
        if log_due:
            rates = {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps}
            run.curves(done, rates | {f"stats/{name}": value for name, value in stats.items()})
        if stops or (save_due and (done < run.total or detector.fits)):
            run.save(done, fitted=False)
    distributed.share_buffers(detector)


def fit(cfg: Config, run: Run, data: "Data", detector: Detector, old: dict | None, autocast: Callable) -> None:
    """Fit the detector in one pass over the normal images, or bring `old`, the checkpoint to update, to them."""
    torch.manual_seed(seed_of(cfg, run.total))
    try:
        with autocast():
            if old is not None:
                run.log.say(update_memory(detector, old, data.names["names"], data.learned))
            else:
                source = data.learned if detector.fitted_on == "train" else data.tested
                detector.fit(batches_of(source, "features", detector.normalization), len(source.indices))
    except UserError as error:
        if not (detector.by_gradient and run.total):
            raise
        again = f"detector.weights={run.folder / checkpoint.LAST} epochs=0 fits it again with other options"
        raise UserError(f"{error}; the training is kept: {again}") from None


def calibrate_and_test(
    cfg: Config, run: Run, data: "Data", detector: Detector, state: dict, autocast: Callable
) -> None:
    """Thresholds from normal images that the detector does not know, then the test, once."""
    began, normal, n_learned = time.perf_counter(), None, len(data.learned.indices)
    examine: Callable = examine_set
    if cfg.data.tile:
        examine = partial(examine_set_in_tiles, tile=cfg.data.tile, overlap=cfg.data.overlap)
    with autocast():
        if data.held_out or detector.can_leave_out(n_learned):
            left_out = {} if data.held_out else {"leave_out": True}
            normal = examine(detector, data.normals, "normal images", **left_out)
        calibration = calibrate(normal, data.normals, cfg.false_alarm_rate)
        if calibration["promised_false_alarm_rate"] != cfg.false_alarm_rate:
            run.log.say(promise(calibration))
        run.save(run.total, **state, calibration=calibration)
        calibrated = time.perf_counter()
        found = examine(detector, data.tested, "test images")
    seconds = {"seconds_fit": state["seconds_fit"], "seconds_threshold": calibrated - began}
    seconds["images_per_second"] = len(found.scores) / (time.perf_counter() - calibrated)
    results = {}
    if distributed.is_main():
        results = {"detector": cfg.detector.name, "backbone": cfg.backbone.name, "n_train": n_learned}
        results |= detector.facts() | seconds
        about = {"original": cfg.pixels == "original"}
        sets = data.tested.dataset, data.learned.dataset
        results |= report(run.log, found, *sets, normal, calibration, **about)
    run.finish(results)


def check(cfg: Config, run: Run) -> None:
    """Refuse what cannot work, as far as the config alone tells."""
    kind, name = DETECTORS[cfg.detector.name], cfg.detector.name
    if cfg.batch_size % run.world:
        raise UserError(f"batch_size={cfg.batch_size} is no multiple of {run.world} processes")
    if cfg.sync_bn and run.world > 1 and run.device.type != "cuda":
        raise UserError("sync_bn=true needs CUDA devices; set sync_bn=false on a CPU")
    if kind.by_gradient and cfg.optim is None:
        raise UserError(f"detector {name} is trained by gradients: the config needs an optim section")
    if cfg.optim is not None and kind.by_gradient and cfg.epochs:
        check_lengths(cfg.epochs, {"optim.warmup_epochs": cfg.optim.warmup_epochs})
    if not cfg.epochs and cfg.detector.weights is None:
        raise UserError(f"epochs={cfg.epochs}: at least 1, or 0 to test detector.weights as they are")
    if cfg.data.tile and (kind.learns_from, kind.fitted_on, cfg.data.fit) != ("train", "train", "squash"):
        raise UserError(f"data.tile={cfg.data.tile}: {name} takes whole images, or data.fit is not squash: remove it")
    if cfg.update and not kind.updates:
        raise UserError(f"detector {name} cannot be updated, only fitted anew: remove update")


def build_networks(cfg: Config, run: Run) -> tuple[Detector, str]:
    """The detector on its backbone, and in words where the weights of both come from."""
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    detector, trained = build_detector(cfg.detector, backbone)
    detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector) if cfg.sync_bn else detector
    detector.to(run.device).to(memory_format=torch.channels_last)
    return detector, f"{trained}, {cfg.backbone.name} ({weights})"


class Data(NamedTuple):
    """The images of a run, as `prepare_data` makes them ready."""

    learned: Loader  # normal images to learn from, each once
    lessons: Loader | None  # shuffled batches for a training by gradients: the same images, or those of another split
    normals: Loader  # normal images that the thresholds come from
    held_out: bool  # whether these are none of the learned ones
    tested: Loader
    names: dict[str, list]  # for the checkpoint
    note: str  # for the user


def prepare_data(cfg: Config, run: Run, detector: Detector) -> Data:
    """Read the training and test set, and hold normal images out for the thresholds. Settles `cfg.data`."""
    cfg.data = with_range_of(cfg.update, cfg.data) if cfg.update else cfg.data
    cfg.data = settled(cfg.data)
    train_set, test_set = (build_dataset(cfg.data, split, tiled=True) for split in ("train", "test"))
    elsewhere = cfg.epochs and detector.learns_from != "train"
    if test_set.defects is None:
        raise UserError(
            f"data.name={cfg.data.name} has no defects to find; use mvtec (MVTec layout) or one_against_all"
        )
    share, validation = cfg.holdout, None
    if share is None:
        if "validation" in train_set.splits:
            validation = build_dataset(cfg.data, "validation", tiled=True)
        spared = validation is not None or train_set.few or (detector.leaves_out and not cfg.data.tile)
        share = 0.0 if spared else 0.1
    train_ids, held_out = holdout(train_set, share, cfg.seed)
    note = what_is_used(train_set, len(train_ids), {f"held out for thresholds (holdout={share})": len(held_out)})
    whole_set = train_set
    if cfg.data.tile:
        check_tiling(detector, cfg.data.tile, cfg.data.overlap)
        if not len(held_out) and validation is None:
            raise UserError("data.tile takes thresholds from whole images that are not learned: set holdout=0.1")
        train_set = Tiles(train_set, train_ids.tolist(), cfg.data.tile, cfg.data.overlap)
        note, train_ids = f"{note}, in {len(train_set)} tiles", torch.arange(len(train_set))
    lesson_set = build_dataset(cfg.data, detector.learns_from) if elsewhere else train_set
    detector.check_count(len(train_ids))

    load: dict[str, Any] = {"batch_size": cfg.batch_size // run.world, "device": run.device, "seed": cfg.seed}
    load |= {"cache": cfg.data.cache, "workers": cfg.data.workers}
    learned, tested = Loader(train_set, indices=train_ids, **load), Loader(test_set, **load)
    normals = Loader(whole_set, indices=held_out, **load) if len(held_out) else learned
    normals = Loader(validation, **load) if validation else normals
    lessons = None
    if detector.by_gradient:
        order: dict[str, Any] = {"shuffle": True, "drop_last": True, "by_label": detector.by_label}
        lessons = Loader(lesson_set, indices=None if elsewhere else train_ids, **order, **load)

    names = {"names": train_set.names, "learned": train_ids.tolist(), "tested": test_set.names}
    names["masks"] = names_with_sizes(test_set.mask_paths, test_set.root)
    if validation:
        names["validation"] = validation.names
    if elsewhere:
        names["elsewhere"] = lesson_set.names
    elif detector.fits and detector.fitted_on == "test":
        names["elsewhere"] = names["tested"]
    return Data(learned, lessons, normals, normals is not learned, tested, names, note)


def seed_of(cfg: Config, step: int) -> int:
    """Of torch's generators in a step of this process: a resumed run draws the same numbers."""
    return cfg.seed + 1_000_003 * step + distributed.rank()


if __name__ == "__main__":
    errors.run(main)
