"""Fine-tune or train a classifier and test it.

    python train_classifier.py configs/classifier_own.yaml data.root=/images backbone.weights=IMAGENET1K_V1
    torchrun --nproc_per_node=2 train_classifier.py configs/classifier_stl10.yaml backbone.weights=runs/dino/last.pt

Writes runs/<run_name>/: last.pt, metrics.jsonl, results.json, confusion.png, confused.png, TensorBoard events. What is
chosen is chosen on validation images, temperature and threshold included: the set's split `validation`, where it has
one, else a seeded part of the training images. With `semi` a step also has images without labels: the rest of the
training images after `labels_per_class`, or another set, `unlabelled`; an epoch is a pass over these. With
`early_stopping` the weights of the lowest validation loss are kept and tested, without it the last ones; the test
images are seen once, at the end. The same command resumes a run that was killed. The whole loop is in `main`; what it
calls of this script stands below it in that order.
"""

import runtime.threads  # before torch

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor

from data import AugmentConfig, DataConfig, build_augment, build_dataset, settled, what_is_used
from data.augment.mixing import Mix, MixConfig
from data.dataset import Dataset
from data.loading import Loader
from data.normalize import Normalization, normalize, unnormalize
from data.splits import few_per_class, holdout, write_splits
from evaluation.anomaly.thresholds import FalseAlarmRate
from evaluation.classification import classification_report
from evaluation.confidence import calibrated, reliability, remarks
from evaluation.confused import draw_confusion
from evaluation.features import extract
from losses.pseudo_labels import Look
from losses.supervised import LOSSES, LossConfig, soft_targets
from models.backbones.build import BackboneConfig, normalization_from
from models.classifier import Classifier, HeadConfig, WithNovelty, build_classifier
from models.semi_supervised import SemiConfig, SemiSupervised
from plots.sheets import view_sheets
from runtime import config, distributed, errors
from runtime.run import Run
from runtime.values import BelowOne, PathText, PositiveInt, Seed
from training.ema import Averaged
from training.optim import OptimConfig, apply_gradients, build_optimizer, mixed_precision, set_rates
from training.plateau import EarlyStoppingConfig, PlateauConfig, ValidationWatch
from training.rehearsal import batch_norm_needs_more, naming, no_trace
from training.schedule import check_lengths
from training.unfreezing import Layers, UnfreezeConfig

FAMILIAR = 2000  # training images, at most, whose features a new image is compared with


@dataclass(kw_only=True)
class Config:
    data: DataConfig  # the images
    labels_per_class: PositiveInt | None = None  # so many training images of each class, drawn by seed; none: all
    unlabelled: DataConfig | None = None  # images without labels for `semi`; none: all training images
    semi: SemiConfig | None = None  # what is learned from images without labels
    backbone: BackboneConfig  # what is fine-tuned
    head: HeadConfig  # what makes classes of its features
    augment: AugmentConfig  # the one view of an image that a step sees
    mix: MixConfig | None = None  # mixup and CutMix of the views
    loss: LossConfig  # of logits and targets
    label_smoothing: BelowOne = 0.0  # share of a training target that is spread over all classes
    optim: OptimConfig  # optimizer and rates
    ema: BelowOne = 0.0  # momentum of the moving average of the weights that is then tested and kept; 0: none
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)  # the classifier first, then layer by layer
    plateau: PlateauConfig | None = None  # a lower rate where the validation loss no longer falls
    early_stopping: EarlyStoppingConfig | None = None  # an end there
    epochs: PositiveInt  # passes over the training set, at most
    batch_size: PositiveInt  # images per step, over all processes
    holdout: BelowOne | None = (
        None  # share kept for validation; none: 0.1, or 0 with labels_per_class or a split `validation`
    )
    log_every: PositiveInt = 10  # steps between points of the curves
    save_every: PositiveInt = 500  # steps between checkpoints
    unknown: FalseAlarmRate = 0.05  # largest share of images of the classes that is called none of these
    seed: Seed = 0  # of the weights, the order, the views and the hold-out
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp16's scaler waits for the device once per step
    compile: bool = False  # the forward, by torch.compile
    sync_bn: bool = False  # BatchNorm over all processes; CUDA only
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


def main(argv: list[str]) -> None:
    cfg = config.load(Config, argv)
    run = Run(cfg)
    check(cfg, run)
    data = prepare_data(cfg, run)
    model, weights = build_networks(cfg, run, data)
    optimizer, layers = build_optimizer(cfg.optim, model), Layers(model, model.backbone)
    averaged = Averaged(model, cfg.ema)
    autocast, scaler = mixed_precision(cfg.precision, run.device)
    compiled: Any = torch.compile(model) if cfg.compile else model
    watch, epoch_steps = ValidationWatch(cfg.plateau, cfg.early_stopping), data.epoch_steps

    parts = averaged.parts | {"optimizer": optimizer, "scaler": scaler, "watch": watch} | data.parts
    state = run.open(parts, cfg.epochs * epoch_steps, data.names, {"curves": {}, "metrics": {}})
    run.total = run.start if watch.ended else run.total
    introduce(cfg, run, data, model, weights, layers)
    if run.is_finished():
        return

    batches = data.batches(run.start)
    for step in run.steps():
        epoch, batch = divmod(step, epoch_steps)
        if batch == 0 and data.semi is not None:
            data.semi.begin(epoch, data.look(model, autocast))
        if (batch == 0 or step == run.start) and layers.train(cfg.unfreeze.layers_at(epoch, layers.count)):
            network = distributed.data_parallel(compiled)  # anew, for it expects the gradients of these layers
        lr = cfg.optim.lr_at(step, cfg.epochs * epoch_steps, epoch_steps, cfg.batch_size) * watch.rate
        set_rates(optimizer, lr, cfg.optim.weight_decay_at(step, cfg.epochs * epoch_steps), lr)

        images, labels, ids = run.window.next(batches)
        views, targets = data.views(images, labels, ids, step)  # (B, 3, h, w), with semi (B + 2 U, 3, h, w); (B, C)
        torch.manual_seed(cfg.seed + 1_000_003 * step + 1009 * distributed.rank())
        with autocast():
            loss = data.loss(data.logits(network, views), targets)
        scaler.scale(loss).backward()
        run.window.add(loss)
        grad_norm = apply_gradients(optimizer, scaler, model.parameters(), cfg.optim)
        averaged.update()

        done = step + 1
        if step == 0:
            log_views(run, images, views, model.normalization)
        if done % epoch_steps == 0 and data.validation is not None:
            state["metrics"] = validate(run, data, averaged.network, autocast, done)
            last_stage = cfg.unfreeze.is_last(epoch, layers.count)
            watch.see(epoch + 1, state["metrics"]["validation/loss"], averaged.network, counts=last_stage)
            run.total = done if watch.ended else run.total
        save_due, stops = run.due(done, cfg.save_every), run.stops(done)
        log_due = save_due or run.due(done, cfg.log_every)
        if log_due or stops:
            run.check(done, lr, grad_norm, scaler)
        if log_due:
            rates = {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps, "layers": layers.learning}
            state["curves"] = run.curves(done, rates | (data.semi.curves() if data.semi else {}))
        if save_due or stops:
            run.save(done, **state)
    finish(cfg, run, data, averaged.network, watch, state, autocast)


def check(cfg: Config, run: Run) -> None:
    """Refuse what cannot work, as far as the config alone tells."""
    lengths = {"optim.warmup_epochs": cfg.optim.warmup_epochs, "unfreeze.head_epochs": cfg.unfreeze.head_epochs}
    check_lengths(cfg.epochs, lengths)
    if cfg.batch_size % run.world:
        raise errors.UserError(f"batch_size={cfg.batch_size} is no multiple of {run.world} processes")
    if cfg.mix is not None and cfg.batch_size // run.world % 2:
        raise errors.UserError(
            f"mix takes images in pairs: batch_size={cfg.batch_size} must be an even number for each of {run.world} "
            "processes"
        )
    if cfg.semi is None and cfg.unlabelled is not None:
        raise errors.UserError("unlabelled names images for semi, and there is none: set semi=fixmatch")
    if cfg.semi is not None and cfg.unlabelled is None and cfg.labels_per_class is None:
        raise errors.UserError(
            "semi learns from images without labels: set labels_per_class=4, or unlabelled=folder unlabelled.root=/path"
        )
    if cfg.semi is not None and cfg.semi.warmup_epochs >= cfg.epochs:
        raise errors.UserError(
            f"semi.warmup_epochs={cfg.semi.warmup_epochs} leaves none of epochs={cfg.epochs} to the unlabelled images: "
            "lower it"
        )
    if cfg.semi is not None and cfg.loss.name == "bce":
        raise errors.UserError(
            "semi takes the likeliest class of a softmax, and loss=bce has none: set loss=cross_entropy"
        )
    if cfg.sync_bn and run.world > 1 and run.device.type != "cuda":
        raise errors.UserError("sync_bn=true needs CUDA devices; set sync_bn=false on a CPU")


@dataclass
class Data:
    """What a run learns from, as `prepare_data` makes it ready."""

    loader: Loader  # labelled training images
    augment: Callable[..., list[Tensor]]  # views = augment(images, ids, epoch)
    mix: Mix | None
    criterion: Callable[[Tensor, Tensor], Tensor]  # of logits and targets, (B, C) each
    validation: Loader | None
    tested: Loader
    classes: list[str]
    names: dict[str, list]  # for the checkpoint
    note: str  # for the user
    smoothing: float  # of labels
    semi: SemiSupervised | None  # with the unlabelled images
    about_unlabelled: Callable[[], AbstractContextManager]  # around what reads these: see `about_unlabelled`

    @property
    def epoch_steps(self) -> int:
        return len(self.loader if self.semi is None else self.semi.loader)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What of it a checkpoint keeps."""
        return {} if self.semi is None else {"semi": self.semi.rule}

    def batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """The labelled batches from a step on, pass after pass, with `semi` several passes in an epoch."""
        number, first = divmod(step, len(self.loader))
        while True:
            yield from self.loader.epoch(number, first_batch=first)
            number, first = number + 1, 0

    def views(self, images: Tensor, labels: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Views and targets (B, C) of a labelled batch; below its views those of the unlabelled images of the step."""
        number = step // len(self.loader)  # of the pass, so that the views of an image are others in each
        (views,) = self.augment(images, ids, number)  # (B, 3, h, w)
        targets = soft_targets(labels, len(self.classes), self.smoothing)  # (B, C)
        if self.mix is not None:
            views, targets = self.mix(views, targets, ids, number)
        if self.semi is not None:
            with self.about_unlabelled():
                unlabelled = self.semi.views(step)
            views = torch.cat([views, *unlabelled])  # (B + 2 U, 3, h, w), in the warm-up (B, 3, h, w)
        return views, targets

    def logits(self, network: nn.Module, views: Tensor) -> Tensor:
        return network(views) if self.semi is None else self.semi.logits(network, views)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the labelled images, and of the unlabelled ones below them."""
        loss, below = self.criterion(logits[: len(targets)], targets), logits[len(targets) :]
        return loss if self.semi is None or not len(below) else loss + self.semi.loss(below)

    def look(self, model: Classifier, autocast: Callable) -> Look:
        """What the network says now of all labelled or unlabelled training images."""

        def look(which: str) -> tuple[Tensor, Tensor]:
            assert self.semi is not None
            loader = {"labelled": self.loader, "unlabelled": self.semi.loader}[which]
            about: dict[str, Any] = {"indices": loader.indices, "cache": loader.cache, "workers": loader.workers}
            distributed.share_buffers(model)
            with autocast(), self.about_unlabelled() if which == "unlabelled" else nullcontext():
                return extract(model, Loader(loader.dataset, loader.batch_size, loader.device, **about))

        return look


def prepare_data(cfg: Config, run: Run) -> Data:
    """Read the three sets of images, or hold validation images out of the training set. Settles `cfg.data`."""
    cfg.data = settled(cfg.data)
    train_set, test_set = (build_dataset(cfg.data, split) for split in ("train", "test"))
    classes = train_set.classes or []
    if len(train_set.labels.unique()) < 2:
        raise errors.UserError(
            "a classifier tells classes apart, and all training images are of one: data.root needs a folder for each"
        )
    own = cfg.holdout is None and "validation" in train_set.splits
    share = cfg.holdout if cfg.holdout is not None else 0.0 if own or cfg.labels_per_class else 0.1
    train_ids, held_out = holdout(train_set, share, cfg.seed)
    labelled = draw_labelled(train_set, train_ids, cfg)
    if (cfg.plateau or cfg.early_stopping) and not own and not len(held_out):
        raise errors.UserError(
            f"plateau and early_stopping need validation images, and holdout={share} leaves none: set holdout=0.1"
        )
    others = {f"held out for validation (holdout={share})": len(held_out)}
    others[f"beyond labels_per_class={cfg.labels_per_class}"] = len(train_ids) - len(labelled)
    note = what_is_used(train_set, len(labelled), others)

    load: dict[str, Any] = {"seed": cfg.seed, "cache": cfg.data.cache, "workers": cfg.data.workers}
    order: dict[str, Any] = {"shuffle": True, "drop_last": True, "balanced": cfg.data.balanced}
    micro_batch = cfg.batch_size // run.world
    loader = Loader(train_set, micro_batch, run.device, indices=labelled, **order, **load)
    len(loader)  # raises if there is no batch
    tested, validation = Loader(test_set, micro_batch, run.device, **load), None
    names = {"names": train_set.names, "learned": labelled.tolist(), "tested": test_set.names}
    names["classes"] = classes
    if own:
        validation = Loader(build_dataset(cfg.data, "validation"), micro_batch, run.device, **load)
        names["validation"] = validation.dataset.names
    elif len(held_out):
        validation = Loader(train_set, micro_batch, run.device, indices=held_out, **load)
    sizes = train_set.sizes if cfg.data.fit == "squash" else None  # of originals, which only then are whole
    augment = build_augment(cfg.augment, cfg.seed, sizes, normalization_from(cfg.backbone))
    mix = Mix(cfg.mix, cfg.seed) if cfg.mix else None
    if len(augment.views) != 1:
        raise errors.UserError(
            f"a classifier sees one view of an image, and augment={cfg.augment.name} makes {len(augment.views)}: "
            "use augment=crop"
        )

    semi = prepare_unlabelled(cfg, run, train_set, train_ids, augment, len(classes))
    if semi is not None:
        note += f"; semi: {len(semi.loader.indices)} images without labels"
        if cfg.unlabelled is not None:
            names["unlabelled"] = semi.loader.dataset.names

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[cfg.loss.name](logits, targets, **cfg.loss.options)

    smoothing = cfg.label_smoothing
    where = partial(about_unlabelled, cfg)
    return Data(loader, augment, mix, criterion, validation, tested, classes, names, note, smoothing, semi, where)


def draw_labelled(train_set: Dataset, train_ids: Tensor, cfg: Config) -> Tensor:
    """Those of the training images whose labels are learned from."""
    if cfg.labels_per_class is None:
        return train_ids
    labels = train_set.labels[train_ids]
    names = train_set.classes or []
    counts = {names[label]: int((labels == label).sum()) for label in labels.unique()}
    least = min(counts, key=lambda name: counts[name])
    if counts[least] < cfg.labels_per_class:
        raise errors.UserError(
            f"labels_per_class={cfg.labels_per_class} must be at most {counts[least]}, the training images of "
            f"{errors.cut(least)}"
        )
    return train_ids[few_per_class(labels, cfg.labels_per_class, cfg.seed)]


def prepare_unlabelled(
    cfg: Config, run: Run, train_set: Dataset, train_ids: Tensor, augment: Any, n_classes: int
) -> SemiSupervised | None:
    """The unlabelled images of `semi`: all training images, or those of `unlabelled`, a section that it settles."""
    if cfg.semi is None:
        return None
    dataset, ids, about, truth = train_set, train_ids, cfg.data, train_set.labels
    if cfg.unlabelled is not None:
        with about_unlabelled(cfg):
            about = cfg.unlabelled = settled(cfg.unlabelled)
            dataset, truth = build_dataset(about, "train"), None
        ids = torch.arange(len(dataset))
    together = cfg.semi.ratio * cfg.batch_size
    if len(ids) < together:
        raise errors.UserError(
            f"{len(ids)} images without labels make no step of semi.ratio={cfg.semi.ratio} x batch_size="
            f"{cfg.batch_size}: lower one of them"
        )
    load: dict[str, Any] = {"cache": about.cache, "workers": about.workers, "shuffle": True, "drop_last": True}
    loader = Loader(dataset, together // run.world, run.device, seed=cfg.seed, indices=ids, **load)
    sizes = dataset.sizes if about.fit == "squash" else None
    return SemiSupervised(cfg.semi, loader, augment, n_classes, sizes=sizes, truth=truth)


def about_unlabelled(cfg: Config) -> AbstractContextManager:
    """Inside, messages that name keys of `data` name those of `unlabelled`, if there is this section."""
    if cfg.unlabelled is None:
        return nullcontext()
    return errors.keys_in("unlabelled", {key.name for key in fields(cfg.unlabelled)} | {*cfg.unlabelled.options})


def build_networks(cfg: Config, run: Run, data: Data) -> tuple[Classifier, str]:
    """The classifier, and in words where its backbone's weights come from. One image has passed through it in both
    modes, so that what cannot work is found before the run folder is touched."""
    torch.manual_seed(cfg.seed)
    model, weights = build_classifier(cfg.backbone, cfg.head, len(data.classes))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn else model
    model.to(run.device).to(memory_format=torch.channels_last)
    image = data.loader.dataset[data.names["learned"][0]][0].to(run.device)  # (3, H, W) uint8
    rows = min(cfg.batch_size // run.world, 2)
    (view,) = data.augment(image.repeat(rows, 1, 1, 1), torch.zeros(rows, dtype=torch.int64), 0)
    sizes = {f"augment.{key}": value for key, value in cfg.augment.options.items() if key == "size"}
    autocast, _ = mixed_precision(cfg.precision, run.device)
    with naming(sizes), batch_norm_needs_more(cfg.batch_size), no_trace(model, run.device, training=True), autocast():
        model(view)
    with naming({"data.size": tuple(image.shape[1:])}), no_trace(model, run.device, training=False), autocast():
        model(normalize(image[None], model.normalization))
    return model, weights


def introduce(cfg: Config, run: Run, data: Data, model: Classifier, weights: str, layers: Layers) -> None:
    """Print what is about to happen."""
    write_splits(data.tested.dataset, run.folder)
    size, end = sum(p.numel() for p in model.parameters()), cfg.unfreeze.layers_at(cfg.epochs - 1, layers.count)
    validated = "none, hence no temperature, and no threshold of none of these (holdout=0.1 gives both)"
    if data.validation is not None:
        validated = f"{len(data.validation.indices)} images"
    last = "" if cfg.unfreeze.is_last(cfg.epochs - 1, layers.count) else ": epochs ends before the others' turn"
    for line in (
        f"{cfg.run_name}: {len(data.classes)} classes, {cfg.backbone.name} ({weights}), {cfg.head.name} head, "
        f"{cfg.loss.name}",
        f"{size:,} parameters, {data.epoch_steps} steps per epoch, step {run.start} of {run.total}, "
        f"{run.world} x {run.device}",
        f"layers of the backbone that learn in the end: {end} of {layers.count}{last}",
        f"{data.note}; test: {len(data.tested.indices)} images, validation: {validated}",
    ):
        run.log.say(line)


def log_views(run: Run, images: Tensor, views: Tensor, normalization: Normalization) -> None:
    """Write the first eight images of a batch, and what the network sees of them, to TensorBoard."""
    for name, sheet in view_sheets(images[:8], [unnormalize(views[:8], normalization)]).items():
        run.log.image(f"views/{name}", pil_to_tensor(sheet))


def measure(data: Data, network: nn.Module, loader: Loader, autocast: Callable) -> tuple[dict, Tensor, Tensor]:
    """`classification_report` of the loader's images with the loss of their labels, what the network (the classifier,
    or one `WithNovelty`) makes of them, (N, C or more), logits first, and labels (N,)."""
    distributed.share_buffers(network)
    with autocast():
        rows, labels = (column.cpu() for column in extract(network, loader))
    logits = rows[:, : len(data.classes)]  # (N, C)
    loss = float(data.criterion(logits.double(), soft_targets(labels, len(data.classes))))
    return {"loss": loss} | classification_report(logits, labels, data.classes), rows, labels


def validate(run: Run, data: Data, model: Classifier, autocast: Callable, done: int) -> dict[str, float]:
    """Write the metrics of the validation images as a point of the curves; returns it."""
    assert data.validation is not None
    with run.window.paused():
        report, _, _ = measure(data, model, data.validation, autocast)
        kept = {f"validation/{key}": report[key] for key in ("loss", "top1", "top5", "macro_f1")}
        return run.log.scalars(done, kept)


def familiar(cfg: Config, run: Run, data: Data, model: Classifier, autocast: Callable) -> Tensor:
    """Normalized features (M, D) of up to `FAMILIAR` training images, spread evenly over them: WithNovelty's bank."""
    distributed.share_buffers(model)
    count = len(data.loader.indices)
    some = data.loader.indices[torch.linspace(0, count - 1, min(count, FAMILIAR), dtype=torch.float64).long()]
    load: dict[str, Any] = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    loader = Loader(data.loader.dataset, cfg.batch_size // run.world, run.device, indices=some, **load)
    with autocast():
        return functional.normalize(extract(model.backbone, loader)[0])


def finish(
    cfg: Config, run: Run, data: Data, model: Classifier, watch: ValidationWatch, state: dict, autocast: Callable
) -> None:
    """Keep the weights that `early_stopping` chose on the validation images, calibrate them on these (of which there
    may be none), save them, and test, once."""
    watch.restore(model)
    bank = familiar(cfg, run, data, model, autocast)
    network = WithNovelty(model, bank)
    rows, labels, validated = torch.empty(0, len(data.classes) + 1), torch.empty(0, dtype=torch.int64), {}
    if data.validation is not None:
        report, rows, labels = measure(data, network, data.validation, autocast)
        validated = {f"validation_{key}": report[key] for key in ("loss", "top1", "top5", "macro_f1")}
    calibration = calibrated(rows[:, :-1], rows[:, -1], labels, cfg.loss.name, cfg.unknown)
    run.save(run.total, **state, calibration=calibration, bank=bank.cpu())
    for line in remarks(calibration, cfg.unknown):
        run.log.say(line)
    epochs = run.total // data.epoch_steps
    results: dict[str, Any] = {"backbone": cfg.backbone.name, "head": cfg.head.name, "epochs": epochs}
    results |= {"steps": run.total, "tested_epoch": watch.epoch if watch.restores else epochs}
    results["chosen"] = "lowest validation loss" if watch.restores else "last epoch"
    results["ended"] = "by early_stopping" if watch.ended else "after all epochs"
    results |= {"n_train": len(data.loader.indices), "loss": state["curves"].get("loss")} | calibration | validated
    report, rows, labels = measure(data, network, data.tested, autocast)
    results["test_loss"] = report.pop("loss")
    results |= reliability(rows[:, :-1], rows[:, -1], labels, cfg.loss.name, calibration)
    draw_confusion(run.log, rows[:, :-1], labels, data.tested.dataset, data.classes)
    run.finish(results | report | {"seconds": run.seconds})


if __name__ == "__main__":
    errors.run(main)
