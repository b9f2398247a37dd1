"""Fit an anomaly detector on normal pictures and test it.

    python train_anomaly.py configs/patchcore_mvtec.yaml data.root=/mvtec data.category=bottle
    torchrun --nproc_per_node=2 train_anomaly.py configs/rd4ad_mvtec.yaml backbone.weights=runs/dino_scavport/last.pt

Writes runs/<run_name>/: last.pt, results.json, heatmaps.png, TensorBoard events. The detector is tested once, after its
last epoch; the threshold comes from normal training pictures that it was not fitted on. All of it is in `main`.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DataConfig, build_dataset
from data.augment import normalize
from data.loading import Loader, holdout
from evaluation.detection import anomaly_results, draw_sheet, score_set
from evaluation.threshold import normal_threshold
from models.anomaly import DETECTORS, DetectorConfig
from models.build import BackboneConfig, build_backbone
from training import checkpoint, config, distributed, errors
from training.log import Log, Window
from training.optim import PRECISIONS, OptimConfig, build_optimizer, clip_gradients, set_rates


@dataclass(kw_only=True)
class Config:
    data: DataConfig
    backbone: BackboneConfig
    detector: DetectorConfig
    optim: OptimConfig | None = None  # for detectors trained by gradients; the others are fitted in one pass
    epochs: int = 1
    batch_size: int = 16  # pictures a step, over all processes
    holdout: float = 0.1  # share of the training normals kept for the threshold and the color scale
    false_alarm_rate: float = 0.01  # the threshold's promise
    log_every: int = 10  # steps between points of the curves
    save_every: int = 500  # steps between checkpoints
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    resume: Literal["auto", "never"] = "auto"
    runs: str = "runs"
    run_name: str


def main(argv: list[str]) -> None:
    # ---------------------------------------------------------------- configuration, run folder
    cfg = config.load(Config, argv)
    device, world = distributed.setup(cfg.device), distributed.world_size()
    resolved, folder = config.as_dict(cfg), config.run_folder(cfg)
    config.at_least_one(cfg, "epochs", "batch_size", "log_every", "save_every")
    if cfg.batch_size % world:
        raise errors.UserError(f"batch_size={cfg.batch_size} is no multiple of {world} processes")
    if not 0 < cfg.false_alarm_rate < 1:
        raise errors.UserError(f"false_alarm_rate={cfg.false_alarm_rate} must lie between 0 and 1")

    # ---------------------------------------------------------------- data
    train_set, test_set = build_dataset(cfg.data, "train"), build_dataset(cfg.data, "test")
    if not hasattr(test_set, "defects"):
        raise errors.UserError(f"data.name={cfg.data.name} has no defects to find; use a set in MVTec layout (mvtec)")
    train_ids, held_out = holdout(train_set, cfg.holdout, cfg.seed)
    load = {"seed": cfg.seed, "cache": cfg.data.cache, "workers": cfg.data.workers}
    normals = Loader(train_set, cfg.batch_size // world, device, indices=held_out, **load)
    tests = Loader(test_set, cfg.batch_size // world, device, **load)

    # ---------------------------------------------------------------- networks, what a killed run left
    torch.manual_seed(cfg.seed)
    backbone, report = build_backbone(cfg.backbone)
    detector = DETECTORS[cfg.detector.name](backbone, **cfg.detector.options)
    detector.to(device, memory_format=torch.channels_last)
    by_gradient = not hasattr(detector, "fit")
    if by_gradient and cfg.optim is None:
        raise errors.UserError(
            f"detector {cfg.detector.name} is trained by gradients: the config needs an optim section"
        )
    dtype, scaler = PRECISIONS[cfg.precision], torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    loader = Loader(
        train_set,
        cfg.batch_size // world,
        device,
        shuffle=by_gradient,
        drop_last=by_gradient,
        indices=train_ids,
        **load,
    )
    total = cfg.epochs * len(loader) if by_gradient else 1
    parts = {"model": detector}
    if by_gradient:
        optimizer = build_optimizer(cfg.optim, detector)
        parts |= {"optimizer": optimizer, "scaler": scaler}
    state = checkpoint.open_run(folder, resolved, resume=cfg.resume)
    start = state["step"] if state else 0
    if state:
        checkpoint.restore(state, parts)
    log, window, began = Log(folder, resolved, start), Window(device), time.perf_counter()
    log.say(
        f"{cfg.run_name}: {cfg.detector.name}, {cfg.backbone.name} ({report}), {len(train_ids)} normals to learn from"
    )
    if start == total and log.repeat_results():
        return

    # ---------------------------------------------------------------- fit
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if not by_gradient and start < total:
        bar = tqdm(loader.epoch(0), "features", len(loader), unit="batch", disable=not distributed.is_main())
        with autocast:
            detector.fit(normalize(images) for images, *_ in bar)
    if by_gradient:
        model = torch.compile(detector) if cfg.compile else detector
        model = DistributedDataParallel(model) if world > 1 else model
        batches = None
        bar = tqdm(
            range(start, total), cfg.run_name, total, initial=start, unit="step", disable=not distributed.is_main()
        )
        for step in bar:
            detector.train()
            epoch, first = divmod(step, len(loader))
            if batches is None or first == 0:
                batches = loader.epoch(epoch, first_batch=first)
            torch.manual_seed(cfg.seed + 1_000_003 * step + distributed.rank())  # a resumed run draws the same numbers
            lr = cfg.optim.lr_at(step, total, len(loader), cfg.batch_size)
            set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, total))
            images, *_ = window.next(batches)
            with autocast:
                loss, stats = model(normalize(images))
            scaler.scale(loss).backward()
            window.add(loss, cfg.batch_size)
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(detector.parameters(), cfg.optim.clip, cfg.optim.clip_mode)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            log_due, save_due = (done % every == 0 or done == total for every in (cfg.log_every, cfg.save_every))
            if log_due or save_due:
                window.check(f"by step {done} at lr {lr:.3g}; the last good checkpoint is {folder / checkpoint.LAST}")
            if log_due:
                curves = window.read() | {"lr": lr, "grad_norm": grad_norm, "epoch": done / len(loader)}
                curves = log.scalars(done, curves | {f"stats/{name}": value for name, value in stats.items()})
                bar.set_postfix_str(f"loss {curves['loss']:.3f}, {curves['speed/images_per_second']:.0f} images/s")
            if save_due and done < total:
                checkpoint.save(folder / checkpoint.LAST, parts, step=done, config=resolved)
    seconds_fit = time.perf_counter() - began
    checkpoint.save(folder / checkpoint.LAST, parts, step=total, config=resolved)

    # ---------------------------------------------------------------- test, once
    threshold, normal_maps = None, None
    if len(held_out):
        with autocast:
            normal_maps, normal_scores = score_set(detector, normals, "held-out normals")
        threshold = normal_threshold(normal_scores, false_alarm_rate=cfg.false_alarm_rate)
    began = time.perf_counter()
    with autocast:
        maps, scores = score_set(detector, tests, "test pictures")
    speed = {"seconds_fit": seconds_fit, "images_per_second": len(scores) / (time.perf_counter() - began)}
    if distributed.is_main():
        results = anomaly_results(scores, maps, test_set, threshold, seed=cfg.seed)
        if normal_maps is not None:
            title = f"{cfg.detector.name}, {cfg.backbone.name}, {cfg.data.options.get('category', cfg.data.name)}"
            picture = draw_sheet(folder / "heatmaps.png", title, test_set, scores, maps, normal_maps, threshold)
            log.picture("heatmaps", picture, total)
        log.scalars(total, {f"test/{k}": v for k, v in results.items() if isinstance(v, float)})
        about = {"detector": cfg.detector.name, "backbone": cfg.backbone.name, "n_train": len(train_ids)}
        log.results(about | results | speed | {"version": checkpoint.code_version()})
    distributed.barrier()
    distributed.cleanup()


if __name__ == "__main__":
    errors.run(main)
