"""Which images are trained on and which are held out."""

import numpy as np
import torch
from torch import Tensor


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into (rest, picked), both ascending int64, the same fraction of every class.

    Of a class with n items, n * fraction rounded to the nearest are picked, but at least one and never all; a class
    of one item stays in the rest. Every class draws its own permutation of n from RandomState(seed), whose stream
    NumPy never changes, so a class's split does not depend on other classes, machine or library version.
    """
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = min(max(int(len(members) * fraction + 0.5), 1), len(members) - 1) if fraction > 0 else 0
        picked[members[np.random.RandomState(seed).permutation(len(members))[:count]]] = True
    return (~picked).nonzero().flatten(), picked.nonzero().flatten()


def holdout(dataset, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train indices, held-out indices) of the dataset, stratified by label: `stratified_split` of its labels."""
    return stratified_split(dataset.labels, fraction, seed)


def grouped_split(labels: Tensor, groups: list[str], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `stratified_split`, of whole groups: images of one part, scene or vessel are never on both sides.

    A group counts as of its most frequent class, of equally frequent ones the first; `fraction` is of a class's groups.
    """
    names = sorted({*groups})
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number[name] for name in groups])  # (N,)
    counts = torch.zeros(len(names), int(labels.max()) + 1, dtype=torch.int64)
    counts.index_put_((group, labels), torch.ones_like(labels), accumulate=True)
    _, picked = stratified_split(counts.argmax(1), fraction, seed)
    is_picked = torch.isin(group, picked)
    return (~is_picked).nonzero().flatten(), is_picked.nonzero().flatten()
