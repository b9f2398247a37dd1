"""Logistic regression on frozen features, solved exactly; its penalty is chosen on a hold-out."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import stratified_split
from evaluation.linear_probe import HOLDOUT, best_of, check_features, standardized, with_one

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 3))  # 1e-6 to 10, two a decade
ITERATIONS = 1000  # of L-BFGS, at most
GRADIENT = 1e-7  # largest entry of the gradient at which it is solved


def logistic_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    n_classes: int,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Tensor, dict]:
    """Logits of a multinomial logistic regression of cached features, and how its penalty was chosen.

    The linear evaluation of SimCLR's transfer (Chen et al. 2020, B.8, after Kornblith et al. 2019) and of DINOv2
    (eval/log_regression.py): full-batch L-BFGS, an L2 penalty from a logarithmic grid, no augmentation. It has no
    learning rate, order or number of epochs that could favor one backbone. The penalty is the one of best top-1 on a
    stratified fifth of the *training* set (ties: lower cross-entropy, then the smaller penalty); with it the whole
    training set is fitted anew. With classes of one image there is nothing to hold out of them, and where no class
    has two the middle of `penalties` is taken.

    Deviations: features are standardized like those of `linear_probe`, float64; 15 penalties (SimCLR: 45 from 1e-6 to
    1e5 of features as they are).

    Args:
        train_features: (N, D).
        train_labels: (N,) int64 in [0, n_classes).
        test_features: (M, D).
        penalties: lambda of `solve`, rising; one value is used as it is.

    Returns:
        logits (M, n_classes) float64, and {"l2", "holdout_top1", "holdout_top1_by_l2"}; the last two None without a
        hold-out.

    Raises:
        UserError: one class only, of which every answer is right.
        ValueError: shapes that do not fit.
    """
    check_features(train_features, train_labels, test_features, n_classes)
    report = {"l2": penalties[len(penalties) // 2], "holdout_top1": None, "holdout_top1_by_l2": None}
    fit, held = stratified_split(train_labels.cpu(), HOLDOUT, seed)
    if len(penalties) > 1 and len(held):
        logits = torch.stack(
            fitted(train_features[fit], train_labels[fit], train_features[held], n_classes, penalties)
        )  # (G, H, C)
        best, top1 = best_of(logits, train_labels[held], penalties)
        by_penalty = {f"{penalty:.3g}": value for penalty, value in zip(penalties, top1)}
        report = {"l2": penalties[best], "holdout_top1": top1[best], "holdout_top1_by_l2": by_penalty}
    (logits,) = fitted(train_features, train_labels, test_features, n_classes, [report["l2"]])
    return logits, report


def fitted(train: Tensor, labels: Tensor, test: Tensor, n_classes: int, penalties: Sequence[float]) -> list[Tensor]:
    """Logits (M, C) of `test` for each of the rising penalties, each solved from the solution of the next larger."""
    train, test = standardized(train.double(), test.double())
    weight, logits = train.new_zeros(train.shape[1] + 1, n_classes), []
    for penalty in reversed(penalties):
        weight = solve(train, labels, penalty, weight)
        logits.insert(0, with_one(test) @ weight)  # (M, C)
    return logits


def solve(features: Tensor, labels: Tensor, penalty: float, weight: Tensor) -> Tensor:
    """The weights (D+1, C), the last row the bias, that minimize  mean cross-entropy + penalty / 2 ||W||^2.

    The bias is not penalized, as in scikit-learn, whose C is 1 / (N penalty). L-BFGS with a strong Wolfe line search.

    Args:
        features: (N, D) float64.
        labels: (N,) int64 in [0, C).
        weight: (D+1, C), where it starts.
    """
    inputs, weight = with_one(features), weight.clone().requires_grad_()
    options = {"max_iter": ITERATIONS, "tolerance_grad": GRADIENT, "tolerance_change": 0, "history_size": 20}
    optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe", max_eval=math.inf, **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight, labels) + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()
