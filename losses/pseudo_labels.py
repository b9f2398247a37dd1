"""Which pseudo-labels of unlabelled images count: the thresholds of FixMatch, FlexMatch, FreeMatch and Dash, and
self-training in rounds.

    rule = PSEUDO_LABELS["flexmatch"](n_classes, n_images, threshold=0.95)
    rule.begin(epoch, look)                # before the first step of an epoch
    targets, keep = rule(logits, numbers)  # of the weak views of a step's unlabelled images
    loss = consistency(strong_logits, targets, keep) + rule.penalty(strong_logits, keep)

Their state are buffers, a part of a checkpoint. It is that of all processes' images, and equal on all of them. Nothing
waits for the device.

Letters: U unlabelled images of a step and process, C classes, N unlabelled images in all.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.consistency import fairness
from runtime.distributed import all_reduce_mean, gather
from runtime.values import BelowOne, NonNegativeFloat, PositiveFloat, PositiveInt, Range, UnitInterval

Look = Callable[[str], tuple[Tensor, Tensor]]
AtLeastOne = Annotated[float, Range(least=1, most=1e6)]


class PseudoLabels(nn.Module):
    """What the rules share. Logits are float32 without gradient."""

    def __init__(self, n_classes: int, n_images: int):
        super().__init__()
        self.n_classes, self.n_images = n_classes, n_images

    def begin(self, epoch: int, look: Look) -> None:
        """Called before an epoch, the first with unlabelled images being 0. `look("labelled")` and `look("unlabelled")`
        give logits (M, C) and labels (M,) of all such images as they stand, in eval mode, by ascending number."""

    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """logits (U, C) of weak views, numbers (U,) int64 of their images, on the same device -> targets (U, C), each
        a distribution, and keep (U,), 1 where it counts."""
        raise NotImplementedError

    def penalty(self, logits: Tensor, keep: Tensor) -> Tensor:  # noqa: ARG002
        """What the loss has besides, of the logits (U, C) of strong views."""
        return logits.new_zeros(())

    def one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.n_classes).float()


class FixMatch(PseudoLabels):
    """The likeliest class where its probability is at least `threshold` (Sohn et al. 2020, equation 4).

    Args:
        threshold: least probability of a pseudo-label.
    """

    def __init__(self, n_classes: int, n_images: int, *, threshold: UnitInterval = 0.95):
        super().__init__(n_classes, n_images)
        self.threshold = threshold

    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        top, classes = logits.softmax(1).max(1)
        return self.one_hot(classes), (top >= self.threshold).float()


class FlexMatch(PseudoLabels):
    """A threshold for each class that is lower while the network is seldom sure of it (Zhang et al. 2021, equations 5
    to 11): threshold * b / (2 - b), b = n_c / max(the largest n_c, the number of images never sure), where n_c counts
    the images whose last sure class, of a probability of at least `threshold`, was c. The step's own images count from
    the next step on, as in the official code (TorchSSL and USB, thresh_warmup).

    Args:
        threshold: probability from which on the network is sure; highest threshold of a class.
    """

    last: Tensor

    def __init__(self, n_classes: int, n_images: int, *, threshold: UnitInterval = 0.95):
        super().__init__(n_classes, n_images)
        self.threshold = threshold
        self.register_buffer("last", torch.full((n_images,), -1))  # of each image the last class that was sure

    def thresholds(self) -> Tensor:
        """Of each class: (C,)."""
        counts = torch.zeros(self.n_classes + 1, device=self.last.device)
        counts.index_add_(0, self.last + 1, torch.ones_like(self.last, dtype=counts.dtype))  # first: never sure
        share = counts[1:] / counts.max()
        return self.threshold * share / (2 - share)

    @torch.no_grad()
    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        top, classes = logits.softmax(1).max(1)
        keep = top >= self.thresholds()[classes]
        numbers, classes_of, sure = gather(numbers), gather(classes), gather((top >= self.threshold).int()) > 0
        self.last[numbers] = torch.where(sure, classes_of, self.last[numbers])
        return self.one_hot(classes), keep.float()


class FreeMatch(PseudoLabels):
    """Thresholds that follow the network (Wang et al. 2023, equations 5 to 8): t * p_c / max(p) with t the moving
    average of the largest probability and p that of the probabilities, both from 1 / C on, this step's included; and
    the fairness penalty of equation 12.

    Args:
        momentum: of the moving averages.
        fairness: weight of the penalty; the paper's configs have 0.001 (USB), its code 0.01.
        most: largest t; the paper's 1 is none, and 0.95 where official configs clip it.
    """

    top: Tensor
    shares: Tensor
    histogram: Tensor

    def __init__(
        self,
        n_classes: int,
        n_images: int,
        *,
        momentum: BelowOne = 0.999,
        fairness: NonNegativeFloat = 0.001,
        most: UnitInterval = 1.0,
    ):
        super().__init__(n_classes, n_images)
        self.momentum, self.fairness, self.most = momentum, fairness, most
        self.register_buffer("top", torch.tensor(1 / n_classes))
        self.register_buffer("shares", torch.full((n_classes,), 1 / n_classes))
        self.register_buffer("histogram", torch.full((n_classes,), 1 / n_classes))  # of the likeliest classes

    @torch.no_grad()
    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        probabilities = logits.softmax(1)
        top, classes = probabilities.max(1)
        one_hot = self.one_hot(classes)
        now = torch.cat([top.mean()[None], probabilities.mean(0), one_hot.mean(0)])
        now = all_reduce_mean(now).split((1, self.n_classes, self.n_classes))
        for average, value in zip((self.top, self.shares, self.histogram), now):
            average.lerp_(value.view_as(average), 1 - self.momentum)
        self.top.clamp_(max=self.most)
        threshold = self.top * self.shares / self.shares.max()  # (C,)
        return one_hot, (top >= threshold[classes]).float()

    def penalty(self, logits: Tensor, keep: Tensor) -> Tensor:
        return self.fairness * fairness(logits, keep, self.shares, self.histogram)


class Dash(PseudoLabels):
    """Pseudo-labels whose loss is small (Xu et al. 2021, algorithm 1): the cross-entropy of the weak view with its own
    pseudo-label is at most rho = max(c * gamma^-k * rho_0, least), k one more every `every` steps. Pseudo-labels are
    soft, softmax(logits / temperature), until rho is `least`, and then hard, as in the official code.

    rho_0 is the mean loss of the labelled training images before the first step with unlabelled ones, as in the paper.
    USB takes that of its evaluation set, the test images, which are none of a training's business.

    Args:
        gamma: by which rho falls.
        c: factor on the first rho.
        least: smallest rho; 0.05 is a probability of 0.951.
        every: steps from one fall to the next; official: ten epochs of 1,024.
        temperature: of soft pseudo-labels.
    """

    first: Tensor
    steps: Tensor

    def __init__(
        self,
        n_classes: int,
        n_images: int,
        *,
        gamma: AtLeastOne = 1.27,
        c: AtLeastOne = 1.0001,
        least: PositiveFloat = 0.05,
        every: PositiveInt = 10240,
        temperature: PositiveFloat = 0.5,
    ):
        super().__init__(n_classes, n_images)
        self.gamma, self.c, self.least, self.every, self.temperature = gamma, c, least, every, temperature
        self.register_buffer("first", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    def begin(self, epoch: int, look: Look) -> None:
        if epoch == 0:
            self.first.copy_(F.cross_entropy(*look("labelled")))

    def threshold(self) -> Tensor:
        """rho of the step to come."""
        return (self.c * self.gamma ** -(self.steps // self.every).float() * self.first).clamp(min=self.least)

    @torch.no_grad()
    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        rho = self.threshold()
        self.steps += 1
        soft = (logits / self.temperature).softmax(1)
        targets = torch.where(rho <= self.least, self.one_hot(logits.argmax(1)), soft)
        losses = -(targets * logits.log_softmax(1)).sum(1)
        return targets, (losses <= rho).float()


class SelfTraining(PseudoLabels):
    """Pseudo-labels in rounds (Lee 2013; Xie et al. 2020, "Noisy Student", with one network): before a round all
    unlabelled images are classified as they stand, and those with a probability of at least `threshold` keep that
    class for the whole of it.

    Args:
        threshold: least probability of a pseudo-label.
        round_epochs: length of a round.
    """

    classes: Tensor

    def __init__(
        self, n_classes: int, n_images: int, *, threshold: UnitInterval = 0.95, round_epochs: PositiveInt = 10
    ):
        super().__init__(n_classes, n_images)
        self.threshold, self.round_epochs = threshold, round_epochs
        self.register_buffer("classes", torch.full((n_images,), -1))  # -1: does not count

    def begin(self, epoch: int, look: Look) -> None:
        if epoch % self.round_epochs == 0:
            top, classes = look("unlabelled")[0].softmax(1).max(1)
            self.classes.copy_(torch.where(top >= self.threshold, classes, -1))

    def forward(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        classes = self.classes[numbers]
        return self.one_hot(classes.clamp(min=0)), (classes >= 0).float()


PSEUDO_LABELS: dict[str, Callable[..., PseudoLabels]] = {
    "fixmatch": FixMatch,
    "flexmatch": FlexMatch,
    "freematch": FreeMatch,
    "dash": Dash,
    "self_training": SelfTraining,
}
