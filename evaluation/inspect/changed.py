"""A Loader whose images are changed on the device, for whatever takes a Loader: corruptions, shifts by some pixels."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from data.corruptions import Constants, corrupt
from data.corruptions.fields import fold
from data.dataset import Dataset
from data.loading import Loader

Change = Callable[[Tensor, Tensor], Tensor]  # images uint8 (B, 3, H, W), their numbers (B,) on the CPU -> images


class Changed:
    """The batches of `loader` with other images; padding, which is no image, stays as it is."""

    def __init__(self, loader: Loader, change: Change):
        self.loader, self.change = loader, change

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def device(self) -> torch.device:
        return self.loader.device

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for images, *rest, indices in self.loader.epoch(epoch):
            yield self.changed(images, indices), *rest, indices

    def changed(self, images: Tensor, indices: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) of these numbers (B,) in the data set: likewise."""
        changed = self.change(images, indices)
        inside = self.dataset.inside(indices, images.device)  # (B, H, W)
        return changed if inside is None else torch.where(inside[:, None], changed, images)


def corrupted(loader: Loader, name: str, severity: int, *, seed: int, constants: Constants | None) -> Changed:
    return Changed(loader, partial(corrupt, name=name, severity=severity, seed=seed, constants=constants))


def shifted(loader: Loader, down: int, right: int) -> Changed:
    """Each image as if the camera had moved by so many pixels; what comes in is mirrored, in padded images padding."""

    def shift(images: Tensor, indices: Tensor) -> Tensor:  # noqa: ARG001
        for dim, by in ((2, down), (3, right)):
            size = images.shape[dim]
            index = fold(torch.arange(size, device=images.device) - by, size, "mirror")
            images = images.index_select(dim, index)
        return images

    return Changed(loader, shift)
