"""What every pretraining method has: an online network, perhaps an EMA target, `embed` and `criterion`. And the ways in
which several views pass through a network: `each_view`, `all_views`, `multi_crop`."""

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from models.backbones.drop_path import DropPath
from runtime.errors import UserError
from training.ema import ema_update


class Encoder(nn.Module):
    """A backbone with the head that is thrown away after pretraining."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class SSLMethod(nn.Module):
    """Base of the pretraining methods; the training loop relies on exactly this.

    Attributes:
        online: the network that gradients train; `online.backbone` is what it is all for.
        target: its exponential moving average, which `after_step` moves; None without one.
        kept: which of the two is evaluated, and loaded from a checkpoint unless `backbone.part` says otherwise.
        projects: whether `online(view)` is a projection of the view (B, D), as SPD needs it.
        needs_labels: whether images without classes make no sense.
        needs_defect: whether the last view must have a synthetic defect.
        takes: least and most number of views, and the augmentation recipe that makes them.
        least_images: images that a step needs over all processes: 2 if it compares those of a batch with each other.
        in_epochs: names of the options that are lengths in epochs.
        advice: what to do when the loss stays where it is for constant embeddings.

    `embed(views)`, views V x (B, 3, h, w), gives tensors whose first dimension runs over the images (B, ...).
    `criterion(embeddings, labels (B,)) -> (loss, stats)` makes of them the scalar to minimize and {name: 0-d tensor}
    for the curves; two names have a meaning: `embeddings` (B, V, D), detached, is what the dashboard examines, and
    `chance_loss` the loss of constant embeddings. Neither changes anything but batch norms' statistics: a method that
    keeps something from step to step (a queue, a center) moves it in `after_step`.
    """

    online: Encoder
    kept: Literal["online", "target"] = "online"
    projects = True
    needs_labels = False
    needs_defect = False
    takes: tuple[int, int, str] = (2, 2, "simclr")
    least_images = 1
    in_epochs: tuple[str, ...] = ()
    advice = "lower the learning rate, warm up longer, or check the views in TensorBoard"

    def __init__(self):
        super().__init__()
        self.target: Encoder | None = None
        self.epoch = 0

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def forward(self, views: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_views(len(views))
        return self.criterion(self.embed(views), labels)

    def check_views(self, number: int) -> None:
        least, most, recipe = self.takes
        if not least <= number <= most:
            many = f"{least} or more" if most >= MANY else least if least == most else f"{least} to {most}"
            name = type(self).__name__
            raise UserError(f"{name} takes {many} views, and augment makes {number}: use augment={recipe}")

    def set_epoch(self, epoch: int) -> None:
        """Called before each step, for options that are counted in epochs."""
        self.epoch = epoch

    def frozen(self) -> Iterable[nn.Parameter]:
        """The parameters that steps of this epoch leave alone."""
        return ()

    def after_step(self, momentum: float) -> None:
        """Called once after the optimizer's step: the target becomes momentum * target + (1 - momentum) * online. A
        method with a queue or a center moves that afterwards."""
        if self.target is not None:
            ema_update(self.target, self.online, momentum)

    @property
    def backbone(self) -> nn.Module:
        """The backbone to evaluate and to keep."""
        return getattr(self, self.kept).backbone


MANY = 10**9  # no limit on the number of views


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy with the same weights, no gradients and no stochastic depth: the start of an EMA target."""
    target = copy.deepcopy(network).requires_grad_(False)
    for module in target.modules():
        if isinstance(module, DropPath):
            module.p = 0.0
    return target


def each_view(network: nn.Module, views: list[Tensor]) -> Tensor:
    """One pass for each view, so that BatchNorm sees one view at a time: V x (B, 3, h, w) -> (B, V, ...)."""
    return torch.stack([network(view) for view in views], dim=1)


def all_views(network: nn.Module, views: list[Tensor]) -> Tensor:
    """One pass over all views, so that BatchNorm sees them together: V x (B, 3, h, w) -> (B, V, ...)."""
    return network(torch.cat(views)).unflatten(0, (len(views), -1)).transpose(0, 1)  # (V B, ...) -> (B, V, ...)


def multi_crop(network: Encoder, views: list[Tensor]) -> Tensor:
    """One backbone pass for each run of equally large views, so that BatchNorm sees one resolution at a time, then one
    head pass over everything (DINO's MultiCropWrapper): V x (B, 3, h, w) -> (B, V, D)."""
    runs = [torch.cat(list(run)) for _, run in groupby(views, key=lambda view: view.shape[-2:])]
    out = network.head(torch.cat([network.backbone(run) for run in runs]))  # (V B, D)
    return out.unflatten(0, (len(views), -1)).transpose(0, 1)  # (B, V, D)
