"""Fit an anomaly detector on normal images and test it.

    python train_anomaly.py configs/patchcore_own.yaml data.root=/own data.category=bolt
    torchrun --nproc_per_node=2 train_anomaly.py configs/rd4ad_mvtec.yaml backbone.weights=runs/dino_scavport/last.pt
    python train_anomaly.py configs/patchcore_own.yaml data.root=/own data.category=bolt update=runs/old/last.pt

Writes runs/<run_name>/: last.pt, results.json, test_scores.csv, images, TensorBoard events. The detector is tested
once, after its last epoch. Thresholds come from normal training images that it was not fitted on: each left out in
turn where the detector can do that, else held out. All of it is in `main`.
"""

import runtime.threads  # before torch

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DataConfig, build_dataset, settled, what_is_used
from data.loading import Loader, names_of
from data.masks import names_with_sizes
from data.splits import holdout
from evaluation.anomaly.bank_updates import load_memory, update_memory, white_of
from evaluation.anomaly.calibration import calibrate, promise
from evaluation.anomaly.detection import batches_of, examine_set
from evaluation.anomaly.report import report
from models.anomaly import DetectorConfig, build_detector
from models.anomaly.detector import TrainingBatch
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config, distributed, errors
from runtime.log import Log, Window
from runtime.values import PathText, Seed
from runtime.version import code_version
from training.optim import PRECISIONS, OptimConfig, build_optimizer, clip_gradients, set_rates
from training.schedule import check_lengths


@dataclass(kw_only=True)
class Config:
    data: DataConfig  # the images
    backbone: BackboneConfig  # what the detector sees them with
    detector: DetectorConfig  # the method
    optim: OptimConfig | None = None  # for detectors trained by gradients; the others are fitted in one pass
    epochs: int = 1  # passes over the training set, for detectors trained by gradients
    batch_size: int = 16  # images per step, over all processes
    update: PathText | None = None  # last.pt of a fitted run: only learn what was added to its images or taken away
    holdout: float | None = None  # share of normals kept for thresholds; none: 0.1, 0 if few or each can be left out
    false_alarm_rate: float = 0.01  # what the thresholds promise; below 1 / (normals + 1) nothing can
    pixels: Literal["input", "original"] = "input"  # resolution of the pixel metrics
    log_every: int = 10  # steps between points of the curves
    save_every: int = 500  # steps between checkpoints
    seed: Seed = 0  # of the weights, the order and the hold-out
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the networks
    compile: bool = False  # the training by gradients
    sync_bn: bool = False  # BatchNorm over all processes; CUDA only
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


def main(argv: list[str]) -> None:
    # ---------------------------------------------------------------- configuration, run folder
    cfg = config.load(Config, argv)
    device, world = distributed.setup(cfg.device), distributed.world_size()
    config.at_least_one(cfg, "batch_size", "log_every", "save_every")
    if cfg.batch_size % world:
        raise errors.UserError(f"batch_size={cfg.batch_size} is no multiple of {world} processes")
    if cfg.sync_bn and world > 1 and device.type != "cuda":
        raise errors.UserError("sync_bn=true needs CUDA devices; set sync_bn=false on a CPU")
    if not 0 < cfg.false_alarm_rate < 1:
        raise errors.UserError(f"false_alarm_rate={cfg.false_alarm_rate} must lie between 0 and 1")
    if cfg.update and cfg.data.white == "auto":
        cfg.data.white = white_of(cfg.update)
    cfg.data = settled(cfg.data)
    resolved, folder = config.as_dict(cfg), config.run_folder(cfg)

    # ---------------------------------------------------------------- networks
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    detector, trained = build_detector(cfg.detector, backbone)
    detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector) if cfg.sync_bn else detector
    detector.to(device, memory_format=torch.channels_last)
    by_gradient, fits = detector.by_gradient, hasattr(detector, "fit")  # one of them, or first one and then the other
    if by_gradient and cfg.optim is None:
        raise errors.UserError(
            f"detector {cfg.detector.name} is trained by gradients: the config needs an optim section"
        )
    if by_gradient and cfg.epochs:
        check_lengths(cfg.epochs, {"optim.warmup_epochs": cfg.optim.warmup_epochs})
    if cfg.epochs < (1 if cfg.detector.weights is None else 0):
        raise errors.UserError(f"epochs={cfg.epochs}: at least 1, or 0 to test detector.weights as they are")
    if cfg.update and not hasattr(detector, "add"):
        raise errors.UserError(f"detector {cfg.detector.name} cannot be updated, only fitted anew: remove update")
    old = load_memory(cfg.update, resolved, detector) if cfg.update else None

    # ---------------------------------------------------------------- data
    train_set, test_set = build_dataset(cfg.data, "train"), build_dataset(cfg.data, "test")
    elsewhere = cfg.epochs and detector.learns_from != "train"
    lessons = build_dataset(cfg.data, detector.learns_from) if elsewhere else train_set
    if test_set.defects is None:
        raise errors.UserError(
            f"data.name={cfg.data.name} has no defects to find; use mvtec (MVTec layout) or one_against_all"
        )
    share = cfg.holdout
    if share is None:
        share = 0.0 if detector.leaves_out or train_set.few else 0.1
    if not 0 <= share < 1:
        raise errors.UserError(f"holdout={share} must be at least 0 and below 1")
    train_ids, held_out = holdout(train_set, share, cfg.seed)
    load = {"seed": cfg.seed, "cache": cfg.data.cache, "workers": cfg.data.workers}
    sizes = {"batch_size": cfg.batch_size // world, "device": device}
    learned = Loader(train_set, **sizes, indices=train_ids, **load)
    if by_gradient:
        own = train_ids if lessons is train_set else None
        order = {"shuffle": True, "drop_last": True, "by_label": detector.by_label}
        loader = Loader(lessons, **sizes, **order, indices=own, **load)
        epoch_steps = len(loader) if cfg.epochs else 0
        detector.check_count(len(train_ids))
    total = cfg.epochs * epoch_steps if by_gradient else 1

    # ---------------------------------------------------------------- resume
    dtype, scaler = PRECISIONS[cfg.precision], torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        image = train_set[int(train_ids[0])][0].to(device)
        detector.rehearse(image, batch_size=sizes["batch_size"], training=by_gradient and total > 0, seed=cfg.seed)
    parts = {"model": detector}
    if by_gradient:
        optimizer = build_optimizer(cfg.optim, detector)
        parts |= {"optimizer": optimizer, "scaler": scaler}
    root = cfg.data.options["root"]
    used = {"names": names_of(train_set, root), "learned": train_ids.tolist(), "tested": names_of(test_set, root)}
    used["masks"] = names_with_sizes(test_set.mask_paths, root)
    if lessons is not train_set:
        used["elsewhere"] = names_of(lessons, cfg.data.options.get("others") or root)
    elif fits and detector.fitted_on == "test":
        used["elsewhere"] = used["tested"]
    state = checkpoint.open_run(folder, resolved, schema=Config, resume=cfg.resume, images=used)
    start, finished = (state["step"], state["step"] == total and state.get("fitted", True)) if state else (0, False)
    about = used | {"config": resolved}  # images by the numbers that a detector remembers
    if state:
        checkpoint.restore(state, parts)
    log, window, began = Log(folder, cfg, start), Window(device), time.perf_counter()
    before = state["seconds_fit"] if state else 0.0  # of the sessions before this one
    log.say(
        f"{cfg.run_name}: {cfg.detector.name}{trained}, {cfg.backbone.name} ({weights}), "
        f"{len(train_ids)} normals to learn from"
    )
    log.say(what_is_used(train_set, len(train_ids), {f"held out for thresholds (holdout={share})": len(held_out)}))
    if finished and log.repeat_results():
        return distributed.cleanup()

    # ---------------------------------------------------------------- train
    if by_gradient:
        model = torch.compile(detector) if cfg.compile else detector
        model = DistributedDataParallel(model, find_unused_parameters=detector.partial) if world > 1 else model
        batches = None
        bar = tqdm(
            range(start, total), cfg.run_name, total, initial=start, unit="step", disable=not distributed.is_main()
        )
        for step in bar:
            detector.train()
            epoch, first = divmod(step, epoch_steps)
            if batches is None or first == 0:
                batches = loader.epoch(epoch, first_batch=first)
            torch.manual_seed(cfg.seed + 1_000_003 * step + distributed.rank())  # a resumed run draws the same numbers
            lr = cfg.optim.lr_at(step, total, epoch_steps, cfg.batch_size)
            set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, total), cfg.optim.peak_lr(cfg.batch_size))
            images, labels, ids = window.next(batches)
            with autocast:
                work, stats = detector.steps(TrainingBatch(images, labels, ids, epoch, cfg.seed)), {}
            for inputs in work:  # most detectors make one step of a batch
                with autocast:
                    loss, seen = model(*inputs)
                stats |= seen
                scaler.scale(loss).backward()
                window.add(loss)
                scaler.unscale_(optimizer)
                grad_norm = clip_gradients(detector.parameters(), cfg.optim.clip, cfg.optim.clip_mode)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

            done = step + 1
            log_due, save_due = (done % every == 0 or done == total for every in (cfg.log_every, cfg.save_every))
            log_due |= save_due  # means since the last point are not saved
            if log_due:
                norm = None if scaler.is_enabled() else grad_norm
                window.check(norm, f"by step {done} at lr {lr:.3g}; {checkpoint.last_good(folder)}")
                curves = window.read() | {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps}
                curves = log.scalars(done, curves | {f"stats/{name}": value for name, value in stats.items()})
                bar.set_postfix_str(f"loss {curves['loss']:.3f}, {curves['speed/images_per_second']:.0f} images/s")
            if save_due and (done < total or fits):
                about["seconds_fit"] = before + time.perf_counter() - began
                checkpoint.save(folder / checkpoint.LAST, parts, step=done, fitted=False, **about)

        distributed.share_buffers(detector)

    # ---------------------------------------------------------------- fit
    if fits and not finished:
        torch.manual_seed(cfg.seed + 1_000_003 * total + distributed.rank())
        source = learned if detector.fitted_on == "train" else Loader(test_set, **sizes, **load)
        try:
            with autocast:
                if cfg.update:
                    log.say(update_memory(detector, old, about["names"], learned))
                else:
                    detector.fit(batches_of(source, "features"), len(source.indices))
        except errors.UserError as error:
            again = f"detector.weights={folder / checkpoint.LAST} epochs=0 fits it again with other options"
            kept = f"; the training is kept: {again}" if total > 1 else ""
            raise errors.UserError(f"{error}{kept}") from None
    about["seconds_fit"] = before if finished else before + time.perf_counter() - began
    if not finished:
        checkpoint.save(folder / checkpoint.LAST, parts, step=total, fitted=True, **about)

    # ---------------------------------------------------------------- thresholds from normals, then the test, once
    began = time.perf_counter()
    normals = Loader(train_set, **sizes, indices=held_out if len(held_out) else train_ids, **load)
    normal = None
    with autocast:
        if len(held_out) or detector.can_leave_out(len(train_ids)):
            normal = examine_set(detector, normals, "normal images", leave_out=not len(held_out))
        calibration = calibrate(normal, normals, cfg.false_alarm_rate)
        if calibration["promised_false_alarm_rate"] != cfg.false_alarm_rate:
            log.say(promise(calibration))
        checkpoint.save(folder / checkpoint.LAST, parts, step=total, fitted=True, **about, calibration=calibration)
        seconds_threshold, began = time.perf_counter() - began, time.perf_counter()
        found = examine_set(detector, Loader(test_set, **sizes, **load), "test images")
    speed = {"seconds_fit": about["seconds_fit"], "seconds_threshold": seconds_threshold}
    speed["images_per_second"] = len(found.scores) / (time.perf_counter() - began)
    if distributed.is_main():
        results = {"detector": cfg.detector.name, "backbone": cfg.backbone.name, "n_train": len(train_ids)}
        results |= detector.facts() | speed
        results |= report(log, found, test_set, normal, normals, calibration, original=cfg.pixels == "original")
        log.results(results | {"version": code_version()})
    distributed.barrier()
    distributed.cleanup()


if __name__ == "__main__":
    errors.run(main)
