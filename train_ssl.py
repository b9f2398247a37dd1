"""Pretrain a backbone without labels.

    python train_ssl.py configs/simclr_scavport.yaml data.root=/images optim.lr=0.3
    torchrun --nproc_per_node=4 train_ssl.py configs/dino_scavport.yaml

Writes runs/<run_name>/: last.pt, metrics.jsonl, results.json, TensorBoard events. The same command goes on where a
killed one stopped. All that happens is in `main`, top to bottom.
"""

import runtime.threads  # before torch

import time
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import (
    AugmentConfig,
    DataConfig,
    DefectConfig,
    build_augment,
    build_dataset,
    build_geometry,
    settled,
    what_is_used,
)
from data.augment.negatives import DefectiveView
from data.augment.spd_views import SpotTheDifference
from data.augment.view_detail import blur_note
from data.defects import DEFECTS
from data.loading import Loader, names_of
from data.normalize import unnormalize
from data.splits import holdout
from evaluation.collapse import collapse_warning, constant_warning, embedding_health
from evaluation.knn import few_neighbors, knn_metrics
from models.backbones.build import BackboneConfig, build_backbone, refuse_classifier
from models.backbones.split_batch_norm import SplitBatchNorm2d
from models.ssl import SSL_METHODS, MethodConfig
from models.ssl.first_step import rehearse
from models.ssl.spd import SPD
from plots.sheets import view_sheets
from runtime import checkpoint, config, distributed, errors
from runtime.log import Log, Window
from runtime.values import PathText, Seed
from runtime.version import code_version
from training.ema import ema_update
from training.gradients import Embed, backward
from training.optim import PRECISIONS, OptimConfig, build_optimizer, clip_gradients, set_rates
from training.sam import SAMConfig, climbed, frozen_statistics
from training.schedule import check_lengths, warmup_cosine


@dataclass(kw_only=True)
class EMAConfig:
    start: float = 0.996  # momentum of the first step; half a cosine takes it to `end`
    end: float = 1.0  # momentum of the last step


@dataclass(kw_only=True)
class SPDConfig:
    """`spd.*`: these keys, and the keyword-only arguments of the chosen defect."""

    name: str = config.choice(DEFECTS)  # the difference to spot: smooth_blend in the paper
    weight: float = 0.1  # of the term beside the method's loss
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class SaveConfig:
    every: int = 500  # steps between checkpoints
    keep_last: int = 0  # so many step_*.pt stay beside last.pt
    best: bool = False  # best.pt: the highest kNN accuracy on the held-out part of the training set


@dataclass(kw_only=True)
class Config:
    data: DataConfig  # the images
    backbone: BackboneConfig  # what is pretrained
    method: MethodConfig  # of pretraining
    augment: AugmentConfig  # the views that the method sees
    defect: DefectConfig | None = None  # of the last view, for a method that needs one
    spd: SPDConfig | None = None  # SPot-the-Difference beside the method's loss
    optim: OptimConfig  # optimizer and rates
    sam: SAMConfig | None = None  # sharpness-aware minimisation: two passes per step
    ema: EMAConfig = field(default_factory=EMAConfig)  # of methods with a target network
    save: SaveConfig = field(default_factory=SaveConfig)  # checkpoints
    epochs: int  # passes over the training set
    batch_size: int  # images per step, over all processes and accumulated batches
    accumulate: int = 1  # batches of a step, which has one loss of all its images
    holdout: float = 0.1  # share of the training set kept for the kNN metric; 0: train on everything, no metric
    eval_every: int = 10  # epochs between kNN metrics
    log_every: int = 10  # steps between points of the curves
    overfit: int = 0  # overfit this many images, always in the same views: does the loss reach its floor?
    seed: Seed = 0  # of the weights, the order, the views and the hold-out
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp16's scaler waits for the device once per step
    compile: bool = False  # the forward, by torch.compile
    sync_bn: bool = False  # BatchNorm over all processes; CUDA only
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


def main(argv: list[str]) -> None:
    # ---------------------------------------------------------------- configuration, run folder
    cfg = config.load(Config, argv)
    if cfg.overfit:
        cfg.batch_size, cfg.holdout = cfg.overfit, 0
    device, world = distributed.setup(cfg.device), distributed.world_size()
    config.at_least_one(cfg, "epochs", "batch_size", "accumulate", "eval_every", "log_every")
    config.at_least_one(cfg.save, "every")
    in_epochs = {f"method.{k}": cfg.method.options[k] for k in SSL_METHODS[cfg.method.name].in_epochs}
    check_lengths(cfg.epochs, {"optim.warmup_epochs": cfg.optim.warmup_epochs} | in_epochs)
    refuse_classifier(cfg.backbone)
    if cfg.batch_size % (world * cfg.accumulate):
        raise errors.UserError(
            f"batch_size={cfg.batch_size} is no multiple of {world} processes x accumulate={cfg.accumulate}"
        )
    if cfg.sync_bn and world > 1 and device.type != "cuda":
        raise errors.UserError("sync_bn=true needs CUDA devices; set sync_bn=false on a CPU")
    if cfg.data.fit != "squash":  # crops are drawn in the whole original image
        raise errors.UserError(f"pretraining needs whole images: data.fit=squash, not {cfg.data.fit}")

    # ---------------------------------------------------------------- data
    native, cfg.data = cfg.data.size == "native", settled(cfg.data)
    resolved, folder = config.as_dict(cfg), config.run_folder(cfg)
    train_set = build_dataset(cfg.data, "train")
    classes = len(train_set.labels.unique())
    train_ids, held_out = holdout(train_set, cfg.holdout if classes > 1 else 0.0, cfg.seed)
    measurable = len(held_out) > 0
    if not 0 <= cfg.overfit <= len(train_ids):
        raise errors.UserError(f"overfit={cfg.overfit} must be 0 or a number of images, {len(train_ids)} at most")
    if cfg.overfit:  # spread over the set, and so over its classes
        train_ids = train_ids[torch.linspace(0, len(train_ids) - 1, cfg.overfit).long()]
    if cfg.save.best and not measurable:
        raise errors.UserError("save.best keeps the best kNN metric, and there is none without holdout or classes")
    micro_batch = cfg.batch_size // (world * cfg.accumulate)
    load = {"seed": cfg.seed, "cache": cfg.data.cache, "workers": cfg.data.workers}
    loader = Loader(train_set, micro_batch, device, shuffle=True, drop_last=True, indices=train_ids, **load)
    augment = build_augment(cfg.augment, cfg.seed, train_set.sizes)
    blurred = blur_note(augment, train_set.geometry, train_set.sizes)
    seen = train_set  # by kNN; at their native size, images would take more time and memory than the training
    if native and measurable and cfg.augment.name != "patches":
        seen = copy(train_set)
        seen.geometry = build_geometry(replace(cfg.data, size=augment.views[0].shape))
    bank, queries = (Loader(seen, 256, device, indices=ids, **load) for ids in (train_ids, held_out))
    if cfg.defect is not None:
        augment = DefectiveView(augment, DEFECTS[cfg.defect.name](**cfg.defect.options))
    if cfg.spd is not None:
        augment = SpotTheDifference(augment, DEFECTS[cfg.spd.name](**cfg.spd.options))

    # ---------------------------------------------------------------- networks, optimizer, resume
    torch.manual_seed(cfg.seed)
    backbone, report = build_backbone(cfg.backbone)
    method = SSL_METHODS[cfg.method.name](backbone, **cfg.method.options)
    if cfg.sync_bn and any(isinstance(module, SplitBatchNorm2d) for module in method.modules()):
        raise errors.UserError("sync_bn=true would undo method.splits: set one of the two")
    method = nn.SyncBatchNorm.convert_sync_batchnorm(method) if cfg.sync_bn else method
    method.to(device, memory_format=torch.channels_last)
    objective = method if cfg.spd is None else SPD(method, cfg.spd.weight)
    model = objective if cfg.accumulate == 1 else Embed(objective)
    if cfg.compile:
        torch._inductor.config.fallback_random = True  # with and without gradient a batch draws the same numbers
        model = torch.compile(model)
    model = distributed.data_parallel(model)
    optimizer = build_optimizer(cfg.optim, method)
    dtype, scaler = PRECISIONS[cfg.precision], torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    epoch_steps = len(loader) // cfg.accumulate
    if epoch_steps == 0:
        raise errors.UserError(f"accumulate={cfg.accumulate} is more than the {len(loader)} batches of an epoch")
    image, measured = (images[int(train_ids[0])][0] for images in (train_set, seen))
    about = {"classes": classes, "n_images": len(train_ids), "measured": measured if measurable else None}
    warnings = rehearse(method, objective, augment, image, cfg, **about, autocast=autocast)
    start, total, best, curves, metrics = 0, cfg.epochs * epoch_steps, -1.0, {}, {}
    parts = {"model": method, "optimizer": optimizer, "scaler": scaler}
    images = {"names": names_of(train_set, cfg.data.options["root"]), "learned": train_ids.tolist()}
    about = {"schema": Config, "resume": cfg.resume, "images": images}
    state, began = checkpoint.open_run(folder, resolved, **about), time.perf_counter()
    if state is not None:
        checkpoint.restore(state, parts)
        start, best, curves, metrics = (state[key] for key in ("step", "best", "curves", "metrics"))
        began -= state["seconds"]

    log, window = Log(folder, cfg, start), Window(device)
    parameters = sum(p.numel() for p in method.online.parameters())
    log.say(f"{cfg.run_name}: {cfg.method.name} on {len(train_ids)} images, {cfg.backbone.name} ({report}), ")
    log.say(f"{parameters:,} parameters, {epoch_steps} steps per epoch, step {start} of {total}, {world} x {device}")
    unused = {f"held out (holdout={cfg.holdout})": len(held_out)}
    unused["not in overfit"] = len(train_set) - len(train_ids) - len(held_out)
    few = few_neighbors(len(train_ids)) if measurable else None
    for note in filter(None, (what_is_used(train_set, len(train_ids), unused), few, blurred)):
        log.say(note)
    for warning in warnings:
        log.warn_now(start, warning)

    # ---------------------------------------------------------------- train
    if start == total and log.repeat_results():
        return distributed.cleanup()

    batches = None
    bar = tqdm(range(start, total), cfg.run_name, total, initial=start, unit="step", disable=not distributed.is_main())
    for step in bar:
        epoch, seed = step // epoch_steps, cfg.seed + 1_000_003 * step + 1009 * distributed.rank()
        method.train()
        method.set_epoch(epoch)
        if batches is None or step % epoch_steps == 0:
            batches = loader.epoch(epoch, first_batch=step % epoch_steps * cfg.accumulate)
        lr = cfg.optim.lr_at(step, total, epoch_steps, cfg.batch_size)
        set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, total), cfg.optim.peak_lr(cfg.batch_size))

        micro_batches = [window.next(batches) for _ in range(cfg.accumulate)]  # (images, labels, ids) of each batch
        views = partial(augment, epoch=0 if cfg.overfit else epoch)  # (images, ids) -> V x (B, 3, h, w)
        with distributed.unsynchronised(model, cfg.sam is not None and cfg.sam.m_sharpness):
            loss, stats = backward(model, objective, micro_batches, views, scaler, autocast, seed)
        if cfg.sam is not None:
            method.cancel_gradients()
            with climbed(method.parameters(), cfg.sam.rho, adaptive=cfg.sam.adaptive), frozen_statistics(method):
                backward(model, objective, micro_batches, views, scaler, autocast, seed)
        window.add(loss)

        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(method.parameters(), cfg.optim.clip, cfg.optim.clip_mode)
        method.cancel_gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if method.target is not None:
            momentum = warmup_cosine(step, total, start=cfg.ema.start, end=cfg.ema.end)
            ema_update(method.target, method.online, momentum)
        method.update()

        if step == 0:
            shown, _, ids = (part[:8] for part in micro_batches[0])
            for name, sheet in view_sheets(shown, [unnormalize(view) for view in views(shown, ids)]).items():
                log.image(f"views/{name}", pil_to_tensor(sheet))
        done = step + 1
        log_due, eval_due, save_due = (
            done % every == 0 or done == total
            for every in (cfg.log_every, cfg.eval_every * epoch_steps, cfg.save.every)
        )
        log_due |= save_due  # means since the last point are not saved
        if log_due or eval_due:
            norm = None if scaler.is_enabled() else grad_norm
            where = f"by step {done} at lr {lr:.3g}; {checkpoint.last_good(folder)}"
            window.check(norm, where, scaler.get_scale())
        if log_due:
            health = embedding_health(stats.pop("embeddings"))
            curves = window.read() | {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps} | health
            curves = log.scalars(done, curves | {f"stats/{name}": value for name, value in stats.items()})
            chance = curves.get("stats/chance_loss") if cfg.spd is None else None
            distinct = classes if method.needs_labels else cfg.batch_size // world
            about = {"chance": chance, "advice": method.advice, "epochs": done / epoch_steps, "distinct": distinct}
            log.warn(done, collapse_warning(curves["loss"], health, **about))
            bar.set_postfix_str(f"loss {curves['loss']:.3f}, {curves['speed/images_per_second']:.0f} images/s")
        if eval_due and measurable:
            with window.paused():
                distributed.share_buffers(method)
                metrics = log.scalars(done, knn_metrics(method.backbone, bank, queries))
            log.warn_now(done, constant_warning(metrics, curves.get("embedding/std")))
            if cfg.save.best and metrics["knn20_top1"] > best:
                best, about = metrics["knn20_top1"], {"step": done, "config": resolved, "part": method.kept}
                checkpoint.save(folder / "best.pt", {"model": method}, **about, best=best)
        if save_due:
            about = {"step": done, "best": best, "config": resolved, "part": method.kept}
            about |= {"curves": curves, "metrics": metrics, "seconds": time.perf_counter() - began}
            with window.paused():
                checkpoint.save(folder / checkpoint.LAST, parts, **about, **images)
                checkpoint.keep_copy(folder, done, cfg.save.keep_last)

    # ---------------------------------------------------------------- results
    about = {"method": cfg.method.name, "backbone": cfg.backbone.name, "parameters": parameters, "steps": total}
    results = about | {"loss": curves.get("loss")} | metrics | {"seconds": time.perf_counter() - began}
    log.results(results | {"version": code_version()})
    distributed.cleanup()


if __name__ == "__main__":
    errors.run(main)
