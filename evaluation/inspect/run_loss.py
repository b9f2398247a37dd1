"""The loss of a run's network on fixed inputs, as a function of its weights: of a classifier, or of pretraining.

    loss = load_loss("runs/classifier", device, images=500)
    value, accuracy = loss.measure()

Images, views and random numbers are the same at every call, so that two values differ by the weights alone.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data import AugmentConfig, DataConfig, DefectConfig, build_augment, build_dataset, settled
from data.augment.negatives import DefectiveView
from data.dataset import Dataset
from data.defects import DEFECTS
from data.images import in_threads
from data.normalize import normalize
from data.splits import evenly
from losses.supervised import LOSSES, LossConfig, soft_targets
from models.backbones.build import BackboneConfig, build_backbone, normalization_from
from models.classifier import load_trained
from models.ssl import SSL_METHODS, MethodConfig
from models.ssl.method import SSLMethod
from runtime import checkpoint, config
from runtime.errors import UserError
from runtime.integrity import faults, first_two
from runtime.text import first_few

Batch = tuple[list[Tensor], Tensor]  # views V x (B, 3, h, w), normalized, of a classifier one; labels (B,)


class RunLoss:
    """A network in eval mode and the batches that its loss is measured on.

    Attributes:
        name: of the run. network: on its device. batches: all there are. images: names of the images in them.
        note: what the user should know of it.
        reestimates: whether `measure` first estimates BatchNorm's statistics anew.
        still: a part of the network whose statistics stay even then: an EMA target.
    """

    reestimates = False
    still: nn.Module | None = None
    note = ""

    def __init__(self, name: str, network: nn.Module, batches: list[Batch], images: list[str]):
        self.name, self.network, self.batches, self.images = name, network.eval(), batches, images

    def of(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, differentiable."""
        raise NotImplementedError

    def value(self) -> tuple[float, float]:
        """As `measure`, with the statistics as they are."""
        raise NotImplementedError

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """The mean loss over all images, and the share of them that is classified correctly (NaN without classes)."""
        if self.reestimates:
            self.reestimate()
        return self.value()

    @torch.no_grad()
    def reestimate(self) -> None:
        """BatchNorm's running statistics become the means of the batches' own, as by torch.optim.swa_utils.update_bn,
        except that nothing else is in train mode."""
        still = {*self.still.modules()} if self.still is not None else set()
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        norms = [norm for norm in norms if norm not in still]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # a plain mean
        for batch in self.batches:
            self.of(batch)
        for norm, momentum in zip(norms, momenta):
            norm.momentum, norm.training = momentum, False


class ClassifierLoss(RunLoss):
    """That of train_classifier.py's test: of plain images and plain labels, in float64 from float32 logits."""

    def __init__(self, *about, criterion: Callable[[Tensor, Tensor], Tensor], n_classes: int):
        super().__init__(*about)
        self.criterion, self.n_classes = criterion, n_classes

    def of(self, batch: Batch) -> Tensor:
        (images,), labels = batch
        return self.criterion(self.network(images), soft_targets(labels, self.n_classes))

    def value(self) -> tuple[float, float]:
        logits = torch.cat([self.network(images) for (images,), _ in self.batches]).double()  # (N, C)
        labels = torch.cat([labels for _, labels in self.batches])  # (N,)
        loss = self.criterion(logits, soft_targets(labels, self.n_classes))
        return float(loss), float((logits.argmax(1) == labels).double().mean())


class PretextLoss(RunLoss):
    """That of a pretraining method, its batches of equal size; random numbers that a forward pass draws are the same at
    every call."""

    def __init__(self, name: str, network: SSLMethod, *about, seed: int):
        super().__init__(name, network, *about)
        self.still, self.seed = network.target, seed

    def of(self, batch: Batch) -> Tensor:
        views, labels = batch
        devices = [labels.device] if labels.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return self.network(views, labels)[0]

    def value(self) -> tuple[float, float]:
        return float(torch.stack([self.of(batch).double() for batch in self.batches]).mean()), float("nan")


def load_loss(
    path: str | Path,
    device: torch.device,
    *,
    images: int,
    data: DataConfig | None = None,
    split: str = "train",
    batch_size: int | None = None,
    reestimates: bool = False,
    seed: int = 0,
) -> RunLoss:
    """The loss of a run of train_classifier.py or train_ssl.py.

    Args:
        path: a checkpoint, or a run folder, whose last.pt is meant.
        images: so many are taken at most, spread evenly over those of the split; of the training set, over those that
            the run has learned from.
        data: where other images are to be taken than the run's own.
        batch_size: images per forward; None: the run's own. The value of a contrastive loss depends on it.
        reestimates: BatchNorm's statistics, before each measurement.
        seed: of the order in which a pretraining's images make batches.

    Raises:
        UserError: another kind of checkpoint, images of other classes, or fewer than a batch.
    """
    file = checkpoint.file_of(path)
    state = checkpoint.load(file)
    about = {"images": images, "split": split, "batch_size": batch_size or state["config"].get("batch_size", 64)}
    data = settled(data or config.build(DataConfig, checkpoint.section(state, "data", file), "data."))
    dataset = build_dataset(data, split)
    name = file.parent.name if file.stem == "last" else f"{file.parent.name}/{file.stem}"
    if "head" in state["config"]:
        loss = _classifier(name, file, state, dataset, device, **about)
    elif "method" in state["config"]:
        loss = _pretext(name, file, state, dataset, device, **about, seed=seed)
    else:
        raise UserError(f"{file} is of neither train_classifier.py nor train_ssl.py, whose losses this can measure")
    loss.reestimates = reestimates
    return loss


def _classifier(
    name: str, file: Path, state: dict, dataset: Dataset, device: torch.device, *, images, split, batch_size
) -> RunLoss:
    loss = config.build(LossConfig, checkpoint.section(state, "loss", file), "loss.")
    ids = _chosen(state, dataset, split, images)
    model, state = load_trained(file, state)
    if state["classes"] != dataset.classes:
        other = first_few(sorted({*state["classes"]} ^ {*(dataset.classes or [])}), 4)
        raise UserError(f"the classes of {file} are not those of the images (different: {other})")
    batches = []
    for pixels, labels, _ in _decoded(dataset, ids, batch_size, device):
        batches.append(([normalize(pixels, model.normalization)], labels))

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[loss.name](logits, targets, **loss.options)

    about: dict[str, Any] = {"criterion": criterion, "n_classes": len(state["classes"])}
    return ClassifierLoss(name, _on(model, device), batches, [dataset.names[i] for i in ids.tolist()], **about)


def _pretext(
    name: str, file: Path, state: dict, dataset: Dataset, device: torch.device, *, images, split, batch_size, seed
) -> RunLoss:
    ids = _chosen(state, dataset, split, images)
    random.Random(seed).shuffle(order := ids.tolist())  # a batch has images of all classes, as in training
    ids = torch.tensor(order[: len(order) // batch_size * batch_size])
    if not len(ids):
        raise UserError(f"{len(order)} images make no batch of {batch_size} ({file}): raise images, or set batch_size")
    method, views, remark = load_method(file, state, dataset)
    decoded = _decoded(dataset, ids, batch_size, device)
    batches = [(views(pixels, numbers, epoch=0), labels) for pixels, labels, numbers in decoded]
    loss = PretextLoss(name, _on(method, device), batches, [dataset.names[i] for i in ids.tolist()], seed=seed)
    loss.note = remark
    return loss


def load_method(file: Path, state: dict, dataset: Dataset) -> tuple[SSLMethod, Callable[..., list[Tensor]], str]:
    """The pretraining method of a checkpoint with its weights, the views of its images, and what is left out of it.

    Options that are counted in epochs are at their end.
    """

    def section(schema: type, name: str) -> Any:
        return config.build(schema, checkpoint.section(state, name, file), f"{name}.")

    try:
        backbone = config.build(
            BackboneConfig, checkpoint.section(state, "backbone", file) | {"weights": None}, "backbone."
        )
        chosen, recipe = section(MethodConfig, "method"), section(AugmentConfig, "augment")
        defect = section(DefectConfig, "defect") if state["config"].get("defect") else None
        method = SSL_METHODS[chosen.name](build_backbone(backbone)[0], **chosen.options)
    except UserError as error:
        raise UserError(f"the config in {file}: {error}") from None
    if wrong := list(faults(method.state_dict(), state.get("model"), "model")):
        raise UserError(f"{file} does not fit its own config: {first_two(wrong)}; {checkpoint.advice_on(file)}")
    method.load_state_dict(state["model"])
    method.set_epoch(int(state["config"].get("epochs", 1)) - 1)
    seed = int(state["config"].get("seed", 0))
    views = build_augment(recipe, seed, dataset.sizes, normalization_from(backbone))
    if defect is not None:
        views = DefectiveView(views, DEFECTS[defect.name](**defect.options))
    spd = f"{file}: the loss of {chosen.name} without the term of spd" if state["config"].get("spd") else ""
    return method, views, spd


def _on(network: Any, device: torch.device) -> Any:
    return network.to(device).to(memory_format=torch.channels_last)


def _chosen(state: dict, dataset: Dataset, split: str, most: int) -> Tensor:
    """Numbers of the images to take, ascending."""
    ids = torch.arange(len(dataset))
    if split == "train" and state.get("names") == dataset.names and "learned" in state:
        ids = torch.tensor(sorted(state["learned"]))
    return ids[evenly(len(ids), most)]


def _decoded(dataset: Dataset, ids: Tensor, batch_size: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Batches of pixels uint8 (B, 3, H, W) and labels (B,) on the device, and numbers (B,) on the CPU; every process
    has all of them, for it measures other weights than the rest."""
    decoded = [item[0] for item in in_threads(dataset.__getitem__, ids.tolist(), "decoding")]
    batches = []
    for start in range(0, len(ids), batch_size):
        numbers = ids[start : start + batch_size]
        pixels = torch.stack(decoded[start : start + batch_size]).to(device)  # (B, 3, H, W)
        batches.append((pixels, dataset.labels[numbers].to(device), numbers))
    return batches
