"""The linear evaluations of DINO, MoCo, SimCLR and VICReg: a linear classifier trained by SGD on random crops."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.augment.views import Augment, View
from data.loading import Loader
from data.normalize import normalization_of
from evaluation.linear_probe import MOMENTUM, with_one
from models.backbones.vit import ViT
from runtime import distributed

WHOLE = 256 / 224  # short side before the center crop, over the side of the crop


@dataclass(frozen=True)
class Protocol:
    """What the official scripts do. All: momentum 0.9, zero bias, a random-resized-crop of 8 to 100 % and a flip in
    training, and in the test the center of an image whose short side is 256 for crops of 224.

    Deviation: training crops are cut from images that were squashed to the test images' short side, not from the files'
    own pixels. Their positions and proportions are those of crops drawn in the original image.
    """

    lr: float
    batch_size: int  # images per step, over all processes
    epochs: int
    scaled: bool = False  # lr is that of 256 images per step, and grows with them
    schedule: Literal["steps", "cosine_by_epoch", "cosine_by_step"] = "cosine_by_epoch"  # steps: / 10 at 60 and 80 %
    weight_decay: float = 0.0  # of weight and bias
    nesterov: bool = False
    zero_start: bool = False  # weights begin at zero; else W ~ N(0, 0.01^2)
    crops: Literal["bilinear", "bicubic"] = "bilinear"  # how training crops are resized
    resample: Literal["bilinear", "bicubic"] = "bilinear"  # of the test images
    tokens: bool = False  # DINO's features of a ViT, see `tokens_of`

    def rate(self, epoch: int, step: int, epochs: int, epoch_steps: int, batch_size: int) -> float:
        """The learning rate of step `step` of an epoch, of so many epochs, steps per epoch and images per step."""
        peak = self.lr * batch_size / 256 if self.scaled else self.lr
        if self.schedule == "steps":
            return peak * 0.1 ** sum(epoch >= share * epochs for share in (0.6, 0.8))
        done = epoch / epochs
        if self.schedule == "cosine_by_step":
            done = (epoch * epoch_steps + step) / (epochs * epoch_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))


PROTOCOLS = {
    # eval_linear.py, 8 processes of 128 images
    "dino": Protocol(lr=1e-3, batch_size=1024, epochs=100, scaled=True, resample="bicubic", tokens=True),
    # main_lincls.py
    "moco": Protocol(lr=30.0, batch_size=256, epochs=100, schedule="steps"),
    # appendix B.6 of the paper; run.py with --zero_init_logits_layer=True, as the README calls it
    "simclr": Protocol(
        lr=0.1,
        batch_size=4096,
        epochs=90,
        scaled=True,
        schedule="cosine_by_step",
        nesterov=True,
        zero_start=True,
        crops="bicubic",
        resample="bicubic",
    ),
    # evaluate.py, as the README calls it
    "vicreg": Protocol(lr=0.02, batch_size=256, epochs=100, weight_decay=1e-6),
}


def tokens_of(backbone: ViT) -> Callable[[Tensor], Tensor]:
    """Official DINO's features of a ViT: the class tokens of the last four blocks, each after the last LayerNorm; of a
    ViT-B or wider that of the last block and the mean of its patches."""

    def features(images: Tensor) -> Tensor:
        if backbone.width >= 768:
            token, patches = backbone.forward_tokens(images)
            return torch.cat([token, patches.mean(1)], dim=1)  # (B, 2 D)
        return backbone.class_tokens(images, 4)  # (B, 4 D)

    return features


class Probed(nn.Module):
    """A backbone whose output are the features that a protocol takes: images (B, 3, H, W) -> (B, D)."""

    def __init__(self, backbone: nn.Module, protocol: Protocol):
        super().__init__()
        self.backbone, self.normalization = backbone, normalization_of(backbone)
        self.features = tokens_of(backbone) if protocol.tokens and isinstance(backbone, ViT) else backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


@torch.no_grad()
def train_classifier(
    backbone: nn.Module,
    loader: Loader,
    view: View,
    protocol: Protocol,
    *,
    n_classes: int,
    epochs: int,
    seed: int,
    log: Callable[[int, float, float], None] | None = None,
) -> Tensor:
    """The weights (D+1, C) of a linear classifier, the last row the bias, trained as `protocol` says.

    The backbone is in eval mode and does not change. The gradient is that of the mean cross-entropy over all processes'
    images of a step, whatever part of them each has.

    Args:
        backbone: images (B, 3, h, w), normalized -> features (B, D).
        loader: the training images, shuffled, without `drop_last`; its batches of all processes make a step.
        view: what a step sees of an image.
        epochs: those of the protocol, or fewer for a short trial: the schedule is stretched over them.
        seed: of the initial weights and the crops.
        log: is called with the epoch (1, 2, ...), its mean loss and its last learning rate.
    """
    backbone.eval()
    augment = Augment([view], seed, loader.dataset.sizes, normalization=normalization_of(backbone))
    n_images, together = len(loader.indices), loader.batch_size * distributed.world_size()
    epoch_steps = math.ceil(n_images / together)
    weight = velocity = None
    for epoch in tqdm(range(epochs), "linear classifier", leave=False, disable=not distributed.is_main()):
        batches, losses = loader.epoch(epoch), 0.0
        for step in range(epoch_steps):
            rate = protocol.rate(epoch, step, epochs, epoch_steps, together)
            inputs, labels = _inputs(backbone, augment, batches, epoch, loader)
            if weight is None:
                weight = _start(inputs.shape[1], n_classes, seed, protocol.zero_start).to(loader.device)
                velocity = torch.zeros_like(weight)
            logits = inputs @ weight  # (B, C)
            error = logits.softmax(1) - F.one_hot(labels, n_classes)  # (B, C)
            size = min(together, n_images - step * together)
            grad = distributed.all_reduce_sum(inputs.T @ error) / size + protocol.weight_decay * weight  # (D+1, C)
            velocity.mul_(MOMENTUM).add_(grad)
            weight -= rate * (grad + MOMENTUM * velocity if protocol.nesterov else velocity)
            losses = losses + F.cross_entropy(logits, labels, reduction="sum")
        if log is not None:
            log(epoch + 1, float(distributed.all_reduce_sum(torch.as_tensor(losses)) / n_images), rate)
    return weight


def _inputs(backbone: nn.Module, augment: Augment, batches, epoch: int, loader: Loader) -> tuple[Tensor, Tensor]:
    """The next batch's features with a column of ones (B, D+1) and its labels (B,); without a batch B is 0, as for a
    process that has no image in an epoch's last step."""
    batch = next(batches, None)
    if batch is None:
        image = loader.dataset[0][0][None].to(loader.device)  # (1, 3, H, W)
        view = augment(image, torch.zeros(1, dtype=torch.int64), epoch)[0]
        return with_one(backbone(view).float())[:0], torch.empty(0, dtype=torch.int64, device=loader.device)
    images, *_, labels, ids = batch
    return with_one(backbone(augment(images, ids, epoch)[0]).float()), labels


def _start(rows: int, n_classes: int, seed: int, zero: bool) -> Tensor:
    """Weights from the CPU's generator, so that they are the same on every device."""
    weight = 0.01 * torch.randn(rows, n_classes, generator=torch.Generator().manual_seed(seed))
    weight[slice(None) if zero else -1] = 0
    return weight
