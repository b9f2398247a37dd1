"""Linear classification of frozen features: a grid of learning rates trained at once, chosen on a hold-out."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import stratified_split
from runtime.errors import UserError

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MOMENTUM = 0.9
HOLDOUT = 0.2  # share of each class's training images on which the learning rate is chosen


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    n_classes: int,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> tuple[Tensor, dict]:
    """Logits of a linear classifier trained on cached features, and how its learning rate was chosen.

    SGD with momentum 0.9, cosine to 0 per step, no weight decay, W ~ N(0, 0.01^2), zero bias (the linear evaluation
    of DINO, eval_linear.py), for all `learning_rates` at once as one wide classifier (DINOv2, eval/linear.py). The
    learning rate is the one of best top-1 on a stratified fifth of the *training* set (ties: lower cross-entropy, then
    the lower rate); with it a classifier is trained anew on the whole training set. The test set has no part in it.

    Deviations: features are standardized with the mean and deviation of the images trained on (MAE has a BatchNorm
    without affine there; DINO and SimCLR have nothing), so one grid fits any backbone; features are cached, so there is
    no augmentation; an epoch's batches differ by at most one image, so there is no small last batch.
    Deterministic in `seed`; works in the features' dtype; every rank computes the same, without communication.

    Args:
        train_features: (N, D).
        train_labels: (N,) int64 in [0, n_classes).
        test_features: (M, D).
        learning_rates: one value is used as it is, without a hold-out.

    Returns:
        logits (M, n_classes), and {"lr", "holdout_top1", "holdout_top1_by_lr"}; the last two None without a hold-out.

    Raises:
        UserError: one class only, of which every answer is right.
        ValueError: no class has two training images (nothing to hold out), or shapes that do not fit.
    """
    check_features(train_features, train_labels, test_features, n_classes)
    settings = {"n_classes": n_classes, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    report = {"lr": learning_rates[0], "holdout_top1": None, "holdout_top1_by_lr": None}
    if len(learning_rates) > 1:
        fit, held = stratified_split(train_labels.cpu(), HOLDOUT, seed)
        if len(held) == 0:
            raise ValueError(f"no class has two of the {len(train_labels)} images, nothing to hold out: give one rate")
        logits = train_and_apply(
            train_features[fit], train_labels[fit], train_features[held], learning_rates=learning_rates, **settings
        )  # (G, H, n_classes)
        best, top1 = best_of(logits, train_labels[held], learning_rates)
        by_lr = {f"{lr:g}": value for lr, value in zip(learning_rates, top1)}
        report = {"lr": learning_rates[best], "holdout_top1": top1[best], "holdout_top1_by_lr": by_lr}
    logits = train_and_apply(
        train_features, train_labels, test_features, learning_rates=[report["lr"]], **settings
    )  # (1, M, n_classes)
    return logits[0], report


@torch.no_grad()
def train_and_apply(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    n_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    learning_rates: Sequence[float],
) -> Tensor:
    """Train G classifiers, one a learning rate, from the same start on the same batches; logits (G, M, n_classes)."""
    n_train, dim = train_features.shape
    n_rates = len(learning_rates)
    train, test = standardized(train_features, test_features)
    inputs = with_one(train)  # (N, D+1)
    targets = F.one_hot(train_labels, n_classes).to(inputs)  # (N, C)

    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    start = 0.01 * torch.randn(dim, n_classes, generator=generator, dtype=inputs.dtype)  # (D, C)
    start = torch.cat([start, start.new_zeros(1, n_classes)]).to(inputs.device)  # (D+1, C)
    weight = start.repeat(1, n_rates)  # (D+1, G*C)
    velocity = torch.zeros_like(weight)
    rates = inputs.new_tensor(learning_rates).repeat_interleave(n_classes)  # (G*C,)

    n_batches = math.ceil(n_train / batch_size)
    step, n_steps = 0, epochs * n_batches
    for _ in range(epochs):
        order = torch.randperm(n_train, generator=generator).to(inputs.device)
        for rows in order.tensor_split(n_batches):
            x, y = inputs[rows], targets[rows]  # (B, D+1), (B, C)
            logits = (x @ weight).view(-1, n_rates, n_classes)  # (B, G, C)
            # The gradient of the mean cross-entropy by the logits is (softmax - one-hot) / B.
            grad = (logits.softmax(2) - y[:, None]).flatten(1)  # (B, G*C)
            velocity.mul_(MOMENTUM).addmm_(x.T, grad, alpha=1 / len(rows))  # (D+1, G*C)
            weight -= (0.5 + 0.5 * math.cos(math.pi * step / n_steps)) * rates * velocity
            step += 1

    logits = with_one(test) @ weight  # (M, G*C)
    return logits.view(-1, n_rates, n_classes).transpose(0, 1)  # (G, M, C)


def check_features(train_features: Tensor, train_labels: Tensor, test_features: Tensor, n_classes: int) -> None:
    """Raises what a classifier of frozen features cannot be trained on."""
    if train_features.shape[1:] != test_features.shape[1:] or train_labels.shape != train_features.shape[:1]:
        raise ValueError(
            f"expected train_features (N, D), train_labels (N,) and test_features (M, D), got "
            f"{tuple(train_features.shape)}, {tuple(train_labels.shape)} and {tuple(test_features.shape)}"
        )
    if n_classes < 2:
        raise UserError("a linear probe tells classes apart, and there is only one: give a data set with two or more")


def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) and (M, D), both with the mean and deviation of `train`; a constant feature becomes (about) 0."""
    mean, scale = train.mean(0), train.std(0, correction=0)  # (D,)
    scale = torch.where(scale > 1e-6 * mean.abs(), scale, 1)
    return (train - mean) / scale, (test - mean) / scale


def best_of(logits: Tensor, labels: Tensor, values: Sequence[float]) -> tuple[int, list[float]]:
    """Which of G classifiers has the best top-1, then the lowest cross-entropy, then the lowest of `values`; and the
    top-1 of each. logits (G, H, C), labels (H,)."""
    finite = logits.isfinite().all(2).all(1)  # (G,) one that diverged comes last
    top1 = (logits.argmax(2) == labels).double().mean(1).where(finite, 0.0).tolist()  # G numbers
    loss = [float(F.cross_entropy(one, labels)) if ok else math.inf for one, ok in zip(logits, finite)]
    return min(range(len(values)), key=lambda i: (-top1[i], loss[i], values[i])), top1


def with_one(x: Tensor) -> Tensor:
    """(N, D) with a column of ones, which carries the bias: (N, D+1)."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
