"""Pretrain a backbone without labels.

    python train_ssl.py configs/simclr_scavport.yaml data.root=/images optim.lr=0.3
    torchrun --nproc_per_node=4 train_ssl.py configs/dino_scavport.yaml

Writes runs/<run_name>/: last.pt, metrics.jsonl, results.json, TensorBoard events. The same command resumes a run
that was killed. The whole loop is in `main`; what it calls of this script stands below it in that order.
"""

import runtime.threads  # before torch

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

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
from data.loading import Loader
from data.normalize import Normalization, unnormalize
from data.splits import holdout, write_splits
from evaluation.collapse import collapse_warning, constant_warning, embedding_health
from evaluation.knn import few_neighbors, knn_metrics
from models.backbones.build import BackboneConfig, build_backbone, normalization_from, refuse_classifier
from models.backbones.split_batch_norm import SplitBatchNorm2d
from models.ssl import SSL_METHODS, MethodConfig
from models.ssl.first_step import rehearse
from models.ssl.gradient import Embed, backward
from models.ssl.method import SSLMethod
from models.ssl.spd import SPD
from plots.sheets import view_sheets
from runtime import checkpoint, config, distributed, errors
from runtime.run import Run
from runtime.values import BelowOne, NonNegativeFloat, NonNegativeInt, PathText, PositiveInt, Seed, UnitInterval
from training.optim import OptimConfig, apply_gradients, build_optimizer, mixed_precision, set_rates
from training.sam import SAMConfig, climbed, frozen_statistics
from training.schedule import check_lengths, warmup_cosine


@dataclass(kw_only=True)
class EMAConfig:
    start: UnitInterval = 0.996  # momentum of the first step; half a cosine takes it to `end`
    end: UnitInterval = 1.0  # momentum of the last step


@dataclass(kw_only=True)
class SPDConfig:
    """`spd.*`: these keys, and the keyword-only arguments of the chosen defect."""

    name: str = config.choice(DEFECTS)  # the difference to spot: smooth_blend in the paper
    weight: NonNegativeFloat = 0.1  # of the term beside the method's loss
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class SaveConfig:
    every: PositiveInt = 500  # steps between checkpoints
    keep_last: NonNegativeInt = 0  # so many step_*.pt stay beside last.pt
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
    sam: SAMConfig | None = None  # sharpness-aware minimization: two passes per step
    ema: EMAConfig = field(default_factory=EMAConfig)  # of methods with a target network
    save: SaveConfig = field(default_factory=SaveConfig)  # checkpoints
    epochs: PositiveInt  # passes over the training set
    batch_size: PositiveInt  # images per step, over all processes and accumulated batches
    accumulate: PositiveInt = 1  # batches of a step, which has one loss of all its images
    holdout: BelowOne = 0.1  # share of the training set kept for the kNN metric; 0: train on everything, no metric
    eval_every: PositiveInt = 10  # epochs between kNN metrics
    log_every: PositiveInt = 10  # steps between points of the curves
    overfit: NonNegativeInt = 0  # overfit this many images, always in the same views: does the loss reach its floor?
    seed: Seed = 0  # of the weights, the order, the views and the hold-out
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp16's scaler waits for the device once per step
    compile: bool = False  # the forward, by torch.compile
    sync_bn: bool = False  # BatchNorm over all processes; CUDA only
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given

    def __post_init__(self):
        if self.overfit:
            self.batch_size, self.holdout = self.overfit, 0


def main(argv: list[str]) -> None:
    cfg = config.load(Config, argv)
    run = Run(cfg)
    check(cfg, run)
    data = prepare_data(cfg, run)
    method, objective, model, notes = build_networks(cfg, run, data)
    optimizer = build_optimizer(cfg.optim, method)
    autocast, scaler = mixed_precision(cfg.precision, run.device)
    epoch_steps = len(data.loader) // cfg.accumulate
    total = cfg.epochs * epoch_steps

    parts = {"model": method, "optimizer": optimizer, "scaler": scaler}
    state = run.open(parts, total, data.names, {"best": -1.0, "curves": {}, "metrics": {}})
    introduce(cfg, run, data, method, notes)
    if run.is_finished():
        return

    for step in run.steps():
        epoch, batch = divmod(step, epoch_steps)
        seed = cfg.seed + 1_000_003 * step + 1009 * distributed.rank()
        method.train()
        method.set_epoch(epoch)
        lr = cfg.optim.lr_at(step, total, epoch_steps, cfg.batch_size)
        set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, total), cfg.optim.peak_lr(cfg.batch_size))

        if batch == 0 or step == run.start:
            batches = data.loader.epoch(epoch, first_batch=batch * cfg.accumulate)
        micro_batches = [run.window.next(batches) for _ in range(cfg.accumulate)]  # (images, labels, ids) of each
        views = partial(data.augment, epoch=0 if cfg.overfit else epoch)  # (images, ids) -> V x (B, 3, h, w)

        gradient = partial(backward, model, objective, micro_batches, views, scaler, autocast, seed)
        with distributed.unsynchronized(model, cfg.sam is not None and cfg.sam.m_sharpness):
            loss, stats = gradient()
        if cfg.sam is not None:
            for parameter in method.frozen():
                parameter.grad = None
            with climbed(method.parameters(), cfg.sam.rho, adaptive=cfg.sam.adaptive), frozen_statistics(method):
                gradient()
        run.window.add(loss)

        grad_norm = apply_gradients(optimizer, scaler, method.parameters(), cfg.optim, frozen=method.frozen())
        method.after_step(warmup_cosine(step, total, start=cfg.ema.start, end=cfg.ema.end))

        done = step + 1
        if step == 0:
            log_views(run, views, micro_batches[0], normalization_from(cfg.backbone))
        eval_due, save_due = (run.due(done, n) for n in (cfg.eval_every * epoch_steps, cfg.save.every))
        log_due, stops = save_due or run.due(done, cfg.log_every), run.stops(done)
        if log_due or eval_due or stops:
            run.check(done, lr, grad_norm, scaler)
        if log_due:
            rates = {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps}
            state["curves"] = log_curves(cfg, run, data, method, done, rates, stats)
        if eval_due and data.held_out:
            state |= evaluate(cfg, run, data, method, done, state)
        if save_due or stops:
            run.save(done, cfg.save.keep_last if save_due else 0, part=method.kept, **state)

    results = {"method": cfg.method.name, "backbone": cfg.backbone.name, "parameters": size_of(method), "steps": total}
    run.finish(results | {"loss": state["curves"].get("loss")} | state["metrics"] | {"seconds": run.seconds})


def check(cfg: Config, run: Run) -> None:
    """Refuse what cannot work, as far as the config alone tells."""
    in_epochs = {f"method.{k}": cfg.method.options[k] for k in SSL_METHODS[cfg.method.name].in_epochs}
    check_lengths(cfg.epochs, {"optim.warmup_epochs": cfg.optim.warmup_epochs} | in_epochs)
    refuse_classifier(cfg.backbone)
    if cfg.batch_size % (run.world * cfg.accumulate):
        raise errors.UserError(
            f"batch_size={cfg.batch_size} is no multiple of {run.world} processes x accumulate={cfg.accumulate}"
        )
    if cfg.sync_bn and run.world > 1 and run.device.type != "cuda":
        raise errors.UserError("sync_bn=true needs CUDA devices; set sync_bn=false on a CPU")
    if cfg.data.fit != "squash":  # crops are drawn in the whole original image
        raise errors.UserError(f"pretraining needs whole images: data.fit=squash, not {cfg.data.fit}")


@dataclass
class Data:
    """The images of a run, as `prepare_data` makes them ready."""

    loader: Loader  # what is learned from
    augment: Callable[..., list[Tensor]]  # views = augment(images, ids, epoch)
    bank: Loader  # kNN: the same images, each once
    queries: Loader  # kNN: the held-out ones
    classes: int
    names: dict[str, list]  # for the checkpoint
    notes: list[str]  # for the user

    @property
    def held_out(self) -> int:
        """Images for the kNN metric; 0: there is no such metric."""
        return len(self.queries.indices)


def prepare_data(cfg: Config, run: Run) -> Data:
    """Read the training set, hold images out of it, and build the augmentation. Settles `cfg.data`."""
    native, cfg.data = cfg.data.size == "native", settled(cfg.data)
    train_set = build_dataset(cfg.data, "train")
    classes = len(train_set.labels.unique())
    train_ids, held_out = holdout(train_set, cfg.holdout if classes > 1 else 0.0, cfg.seed)
    if cfg.overfit > len(train_ids):
        raise errors.UserError(f"overfit={cfg.overfit} must be 0 or a number of images, {len(train_ids)} at most")
    if cfg.save.best and not len(held_out):
        raise errors.UserError("save.best keeps the best kNN metric, and there is none without holdout or classes")
    unused = {f"held out (holdout={cfg.holdout})": len(held_out)}
    if cfg.overfit:  # spread over the set, and so over its classes
        unused["not in overfit"] = len(train_ids) - cfg.overfit
        train_ids = train_ids[torch.linspace(0, len(train_ids) - 1, cfg.overfit).long()]

    load: dict[str, Any] = {"seed": cfg.seed, "cache": cfg.data.cache, "workers": cfg.data.workers}
    micro_batch = cfg.batch_size // (run.world * cfg.accumulate)
    order: dict[str, Any] = {"shuffle": True, "drop_last": True, "balanced": cfg.data.balanced}
    loader = Loader(train_set, micro_batch, run.device, indices=train_ids, **order, **load)
    if len(loader) < cfg.accumulate:
        raise errors.UserError(f"accumulate={cfg.accumulate} is more than the {len(loader)} batches of an epoch")
    augment = build_augment(cfg.augment, cfg.seed, train_set.sizes, normalization_from(cfg.backbone))
    few = few_neighbors(len(train_ids)) if len(held_out) else None
    notes = [what_is_used(train_set, len(train_ids), unused), few]
    notes += [blur_note(augment, train_set.geometry, train_set.sizes)]
    seen = train_set  # by kNN; at their native size, images would take more time and memory than the training
    if native and len(held_out) and cfg.augment.name != "patches":
        seen = copy(train_set)
        seen.geometry = build_geometry(replace(cfg.data, size=augment.views[0].shape))
    bank, queries = (Loader(seen, 256, run.device, indices=ids, **load) for ids in (train_ids, held_out))
    augment = with_defects(cfg, augment)
    names = {"names": train_set.names, "learned": train_ids.tolist()}
    return Data(loader, augment, bank, queries, classes, names, [note for note in notes if note])


def with_defects(cfg: Config, augment: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The augmentation with the further views that `defect` and `spd` ask for."""
    if cfg.defect is not None:
        augment = DefectiveView(augment, DEFECTS[cfg.defect.name](**cfg.defect.options))
    if cfg.spd is not None:
        augment = SpotTheDifference(augment, DEFECTS[cfg.spd.name](**cfg.spd.options))
    return augment


def build_networks(cfg: Config, run: Run, data: Data) -> tuple[SSLMethod, nn.Module, nn.Module, dict]:
    """The method; what gives the loss, which is the method or SPD around it; what passes a batch, which is that one or
    a part of it, perhaps compiled and distributed; and for the user where the `weights` come from and the `warnings`.

    One image has passed through all of it, so that what cannot work is found before the run folder is touched.
    """
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    method = SSL_METHODS[cfg.method.name](backbone, **cfg.method.options)
    if cfg.sync_bn and any(isinstance(module, SplitBatchNorm2d) for module in method.modules()):
        raise errors.UserError("sync_bn=true would undo method.splits: set one of the two")
    method = nn.SyncBatchNorm.convert_sync_batchnorm(method) if cfg.sync_bn else method
    method.to(run.device).to(memory_format=torch.channels_last)
    objective = method if cfg.spd is None else SPD(method, cfg.spd.weight)
    model: Any = objective if cfg.accumulate == 1 else Embed(objective)
    if cfg.compile:
        torch._inductor.config.fallback_random = True  # with and without gradient a batch draws the same numbers
        model = torch.compile(model)
    model = distributed.data_parallel(model)
    first = data.names["learned"][0]
    image, measured = (loader.dataset[first][0] for loader in (data.loader, data.bank))
    about: dict[str, Any] = {"classes": data.classes, "n_images": len(data.loader.indices)}
    about |= {"measured": measured if data.held_out else None}
    autocast, _ = mixed_precision(cfg.precision, run.device)
    warnings = rehearse(method, objective, data.augment, image, cfg, **about, autocast=autocast)
    return method, objective, model, {"weights": weights, "warnings": warnings}


def size_of(method: SSLMethod) -> int:
    """Parameters of the network that is trained."""
    return sum(p.numel() for p in method.online.parameters())


def introduce(cfg: Config, run: Run, data: Data, method: SSLMethod, notes: dict) -> None:
    """Print what is about to happen, and warnings."""
    write_splits(data.loader.dataset, run.folder)
    images, steps = len(data.loader.indices), run.total // cfg.epochs
    lines = [
        f"{cfg.run_name}: {cfg.method.name} on {images} images, {cfg.backbone.name} ({notes['weights']})",
        f"{size_of(method):,} parameters, {steps} steps per epoch, step {run.start} of {run.total}, "
        f"{run.world} x {run.device}",
    ]
    for line in lines + data.notes:
        run.log.say(line)
    for warning in notes["warnings"]:
        run.log.warn_now(run.start, warning)


def log_views(
    run: Run, views: Callable[..., list[Tensor]], batch: tuple[Tensor, ...], normalization: Normalization
) -> None:
    """Write the views of a batch's first eight images to TensorBoard."""
    images, _, ids = (part[:8] for part in batch)
    made = [unnormalize(view, normalization) for view in views(images, ids)]
    for name, sheet in view_sheets(images, made).items():
        run.log.image(f"views/{name}", pil_to_tensor(sheet))


def log_curves(
    cfg: Config, run: Run, data: Data, method: SSLMethod, done: int, rates: dict, stats: dict[str, Tensor]
) -> dict[str, float]:
    """Write a point of the curves, and warn of a collapse; returns the point."""
    health = embedding_health(stats.pop("embeddings"))
    curves = run.curves(done, rates | health | {f"stats/{name}": value for name, value in stats.items()})
    chance = curves.get("stats/chance_loss") if cfg.spd is None else None
    distinct = data.classes if method.needs_labels else cfg.batch_size // run.world
    about: dict[str, Any] = {"chance": chance, "advice": method.advice, "epochs": curves["epoch"], "distinct": distinct}
    run.log.warn(done, collapse_warning(curves["loss"], health, **about))
    return curves


def evaluate(cfg: Config, run: Run, data: Data, method: SSLMethod, done: int, state: dict) -> dict:
    """Classify the held-out images by their nearest neighbors; returns the metrics and the best one so far, at which
    best.pt is written."""
    with run.window.paused():
        distributed.share_buffers(method)
        metrics = run.log.scalars(done, knn_metrics(method.backbone, data.bank, data.queries))
    run.log.warn_now(done, constant_warning(metrics, state["curves"].get("embedding/std")))
    best = state["best"]
    if cfg.save.best and metrics["knn20_top1"] > best:
        best = metrics["knn20_top1"]
        about = {"step": done, "config": run.config, "part": method.kept, "best": best}
        checkpoint.save(run.folder / "best.pt", {"model": method}, **about)
    return {"metrics": metrics, "best": best}


if __name__ == "__main__":
    errors.run(main)
