"""Do test images look like training images to a backbone? Two answers from features, and what chance would give.

The Frechet distance says how far the two sets lie apart, in a scale that means nothing by itself and that is above 0
for any two finite samples: so the same images, split at random into sets of the same sizes, are measured too. The
classifier two-sample test says how well one can tell a test image from a training image at all: an AUROC of 0.5 means
not at all.
"""

import math
import warnings

import numpy as np
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from search.nearest import nearest

AT_MOST = 2000  # images of each split: more make both numbers steadier, and far slower
RANDOM_SPLITS = 10
FOLDS = 5
STRENGTH = 0.01  # inverse weight of the logistic regression's penalty: features often outnumber images
ALARM = 0.001  # p-value below which two splits count as different: one false alarm in a thousand sets, for each test


def split_distance(train: Tensor, test: Tensor, *, seed: int = 0) -> dict:
    """`frechet` and `classifier` of two splits' features (N, D) and (M, D), and how many images they come from.

    Of more than `AT_MOST` images of a split, so many drawn at random are used. Copies within a split count once: with
    one on each side of a fold, a classifier would recognize the image and not the split. Images with the features of
    one of the other split stay, since splits that share images are alike, and are counted (`shared`).

    Raises:
        ValueError: an empty split, features of two widths.
    """
    rows = np.random.default_rng(seed)
    train, test = (_some(_distinct(part), rows) for part in (train, test))
    shared = int((nearest(test, train)[0] == 0).sum())
    about = {"train": len(train), "test": len(test), "shared": shared}
    return about | {
        "frechet": frechet_test(train, test, seed=seed),
        "classifier": two_sample_test(train, test, seed=seed),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features (N, D) and (M, D), in squared units of the features.

        |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)          (Heusel et al. 2017, section 3, "FID")

    Covariances divide by N - 1; that of a single image is 0. With C = R^T R the last trace is the sum of the singular
    values of R_a R_b^T. So no root of a nearly singular product is taken, as scipy's sqrtm does, which loses half of
    the digits and becomes complex where N <= D; here both are as good as any other case. float64.

    Raises:
        ValueError: an empty set, features of two widths.
    """
    if not (len(a) and len(b) and a.shape[1:] == b.shape[1:] and a.dim() == 2):
        raise ValueError(f"features {tuple(a.shape)} and {tuple(b.shape)} must be (N, D) and (M, D), not empty")
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    square = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * common
    return max(0.0, float(square))  # of equal sets the rounding may be negative


def frechet_test(train: Tensor, test: Tensor, *, seed: int = 0) -> dict[str, float | None]:
    """The Frechet distance of two splits, beside random splits of all their images into sets of the same sizes.

    Returns:
        distance; random_mean, random_std: of `RANDOM_SPLITS`, which has the bias of these sizes and this width in it;
        p: the probability that a further random split is as far apart, by Student's prediction for one more value.
        None: where all random splits are equal, as with two images, there is no p.
    """
    distance, both, random = frechet_distance(train, test), torch.cat([train, test]), np.random.default_rng(seed)
    values = []
    for _ in range(RANDOM_SPLITS):
        order = torch.from_numpy(random.permutation(len(both))).to(both.device)
        values.append(frechet_distance(both[order[: len(train)]], both[order[len(train) :]]))
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    p = None
    if std > 1e-9 * mean:
        t = (distance - mean) / (std * math.sqrt(1 + 1 / RANDOM_SPLITS))
        p = float(stats.t.sf(t, RANDOM_SPLITS - 1))
    return {"distance": distance, "random_mean": mean, "random_std": std, "p": p}


def two_sample_test(train: Tensor, test: Tensor, *, seed: int = 0) -> dict[str, float | None]:
    """How well a logistic regression tells test features (M, D) from training features (N, D) that it has not seen.

    The classifier two-sample test (Lopez-Paz & Oquab 2017) in stratified folds, at most `FOLDS`. As the sets are of
    different sizes, both count alike in training, and ranks decide instead of the accuracy.

    Returns:
        auroc: mean over the folds; 0.5: the two look the same, 1: each image gives its split away.
        accuracy: mean of both sets' shares on the right side, likewise.
        p: of the mean of the folds' standardized Mann-Whitney statistics, taken for one. What is ranked took no part in
        the training, so each is about normal with variance 1 if the splits look the same; the variance of their mean
        is at most 1, however the folds depend on each other.
        All None with fewer than two images in a split.
    """
    folds = min(FOLDS, len(train), len(test))
    if folds < 2:
        return {"auroc": None, "accuracy": None, "p": None}
    x = torch.cat([train, test]).double().cpu().numpy()
    y = np.repeat([0, 1], [len(train), len(test)])
    aurocs, accuracies, deviations = [], [], []
    for learned, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced"))
        with warnings.catch_warnings():  # a classifier that has not quite converged is one all the same
            warnings.simplefilter("ignore", ConvergenceWarning)
            scores = classifier.fit(x[learned], y[learned]).decision_function(x[held_out])
        positive = y[held_out] == 1
        aurocs.append(roc_auc_score(positive, scores))
        accuracies.append(((scores > 0)[positive].mean() + (scores <= 0)[~positive].mean()) / 2)
        n, m = int(positive.sum()), int((~positive).sum())
        deviations.append((aurocs[-1] - 0.5) * math.sqrt(12 * n * m / (n + m + 1)))
    p = float(stats.norm.sf(np.mean(deviations)))
    return {"auroc": float(np.mean(aurocs)), "accuracy": float(np.mean(accuracies)), "p": p}


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and R (r, D), r = min(N, D), whose R^T R is the covariance; float64."""
    x = features.double()
    mean = x.mean(0)
    root = (x - mean) / math.sqrt(max(len(x) - 1, 1))
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


def _distinct(features: Tensor) -> Tensor:
    """The first of each set of equal rows, in their order."""
    _, first = np.unique(features.cpu().numpy(), axis=0, return_index=True)
    return features[torch.from_numpy(np.sort(first)).to(features.device)]


def _some(features: Tensor, random: np.random.Generator) -> Tensor:
    """At most `AT_MOST` of the rows, drawn at random, in their order."""
    if len(features) <= AT_MOST:
        return features
    return features[torch.from_numpy(np.sort(random.permutation(len(features))[:AT_MOST])).to(features.device)]
