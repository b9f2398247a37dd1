"""Semi-supervised learning: a step's unlabelled images, weakly and strongly augmented, and what they add to the loss.

    semi.begin(epoch, look)                       # before an epoch's first step
    views = torch.cat([views, *semi.views(step)])  # labelled, then weak and strong of the unlabelled
    logits = semi.logits(network, views)          # in one pass as in the official code, or in two: `apart`
    loss = criterion(logits[:B], targets) + semi.loss(logits[B:])

Letters: B labelled images of a step and process, U = ratio * B unlabelled ones, C classes.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.augment.views import Augment
from data.loading import Loader
from losses.consistency import consistency
from losses.pseudo_labels import PSEUDO_LABELS, Look
from runtime import distributed
from runtime.memory import send
from runtime.schema import choice
from runtime.values import Few, FewOrZero, NonNegativeFloat, NonNegativeInt, UnitInterval
from training.sam import frozen_statistics


@dataclass(kw_only=True)
class SemiConfig:
    """`semi.*`: how pseudo-labels are chosen, with the options of it, and what is made of them."""

    name: str = choice(PSEUDO_LABELS)
    ratio: Few = 7  # unlabelled images of a step for each labelled one
    weight: NonNegativeFloat = 1.0  # of the unlabelled images' loss
    warmup_epochs: NonNegativeInt = 0  # at first, of labelled images alone; official Dash: 2
    operations: FewOrZero = 3  # of RandAugment, on the strong view
    cutout: UnitInterval = 0.5  # largest side of the strong view's gray square, as a share of its width
    apart: bool = False  # strong views pass the network by themselves; BatchNorm's running statistics are of the others
    options: dict = field(default_factory=dict)


class SemiSupervised:
    """The unlabelled images of a run. Labelled ones may be among them, as in the official code.

    Args:
        loader: of them, shuffled, a batch of U; an epoch of the run is one of its.
        augment: of labelled images, with one view, which is the weak one too; the strong one is another such view with
            RandAugment and cutout.
        truth (N,): the classes of all images of the loader's data set, for a curve and nothing else; None: unknown.
        sizes: as of `Augment`.

    Attributes:
        rule: of losses/pseudo_labels.py, a part of the checkpoint.
    """

    def __init__(
        self,
        config: SemiConfig,
        loader: Loader,
        augment: Augment,
        n_classes: int,
        *,
        sizes: Tensor | None,
        truth: Tensor | None,
    ):
        self.config, self.loader, self.truth = config, loader, truth
        self.rule = PSEUDO_LABELS[config.name](n_classes, len(loader.indices), **config.options).to(loader.device)
        (weak,) = augment.views
        views = [weak, replace(weak, operations=config.operations, cutout=config.cutout)]
        about = {"normalization": augment.normalization, "first": 1}  # view 0 is that of labelled images
        self.augment = Augment(views, augment.seed, sizes, **about)
        self.numbers = torch.full((len(loader.dataset),), -1)  # of each image of the data set among the unlabelled
        self.numbers[loader.indices.sort().values] = torch.arange(len(loader.indices))
        self.ids, self.counts = torch.empty(0, dtype=torch.int64), torch.zeros(3, device=loader.device)
        self.epoch = -1

    def begin(self, epoch: int, look: Look) -> None:
        """See `PseudoLabels.begin`; epochs of the warm-up do not count."""
        if epoch >= self.config.warmup_epochs:
            self.rule.begin(epoch - self.config.warmup_epochs, look)

    def views(self, step: int) -> list[Tensor]:
        """The weak views and the strong ones of a step, (U, 3, h, w) each; in the warm-up none."""
        epoch, batch = divmod(step, len(self.loader))
        if epoch < self.config.warmup_epochs:
            return []
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.loader.epoch(epoch, first_batch=batch)
        images, *_, self.ids = next(self.batches)
        return self.augment(images, self.ids, epoch)

    def logits(self, network: nn.Module, views: Tensor) -> Tensor:
        """Of a step's views (B + 2 U, 3, h, w), in the warm-up (B, 3, h, w): (B + 2 U, C) or (B, C).

        With `apart` BatchNorm does not normalize weak views by strong ones, which are darker and partly gray, nor does
        the network that is tested by statistics of both. Official code has one pass, and 2^20 steps to get used to it.
        """
        if not self.config.apart or not len(self.ids):
            return network(views)
        strong = len(self.ids)
        others = network(views[:-strong])
        with frozen_statistics(network):
            return torch.cat([others, network(views[-strong:])])

    def loss(self, logits: Tensor) -> Tensor:
        """Of the logits (2 U, C) of `views`, the weak ones' without gradient."""
        weak, strong = logits.chunk(2)
        targets, keep = self.rule(weak.detach().float(), send(self.numbers[self.ids], logits.device))
        loss = consistency(strong, targets, keep) + self.rule.penalty(strong, keep)
        right = torch.zeros_like(keep)
        if self.truth is not None:
            right = keep * (targets.argmax(1) == send(self.truth[self.ids], logits.device))
        self.counts = torch.stack([torch.ones_like(keep), keep, right]).sum(1)
        return self.config.weight * loss

    def curves(self) -> dict[str, Tensor]:
        """Of the last step: the share of unlabelled images whose pseudo-label counts, and of these the share whose
        pseudo-label is right, if that is known. Every process must call it."""
        images, kept, right = distributed.all_reduce_sum(self.counts)
        curves = {"semi/kept": kept / images.clamp(min=1)}
        return curves if self.truth is None else curves | {"semi/right": right / kept.clamp(min=1)}
