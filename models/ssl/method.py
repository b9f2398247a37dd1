"""What every pretraining method has: an online network, perhaps an EMA target, `embed` and `criterion`."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from models.backbones.drop_path import DropPath
from runtime.errors import UserError


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
        target: its exponential moving average, updated by the loop after each step; None without one.
        kept: which of the two is evaluated, and loaded from a checkpoint unless `backbone.part` says otherwise.
        projects: whether `online(view)` is a projection of the view (B, D), as SPD needs it.
        needs_labels: whether images without classes make no sense.
        needs_defect: whether the last view must have a synthetic defect.
        takes: least and most number of views, and the augmentation recipe that makes them.
        least_images: images that a step needs over all processes: 2 if it compares those of a batch with each other.
        in_epochs: names of the options that are lengths in epochs.
        advice: what to do when the loss stays where it is for constant embeddings.

    `embed(views)`, views V x (B, 3, h, w), gives tensors whose first dimension runs over the images (B, ...).
    `criterion(embeddings, labels (B,)) -> (loss, stats)` makes of them the scalar to minimise and {name: 0-d tensor}
    for the curves; two names have a meaning: `embeddings` (B, V, D), detached, is what the dashboard examines, and
    `chance_loss` the loss of constant embeddings. Neither changes anything but batch norms'
    statistics: what a step leaves behind (a queue, a centre) it puts there in `update`.
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

    def cancel_gradients(self) -> None:
        """Called between clipping and the optimizer's step: drop the gradients of what is frozen for now."""

    def update(self) -> None:
        """Called once after the optimizer's step: move what is neither trained nor averaged, as a queue or a centre."""

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
