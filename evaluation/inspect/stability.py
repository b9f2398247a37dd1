"""How steady a network is when little changes: a camera that moves by some pixels, neighboring frames of a video."""

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dataset import Dataset
from data.loading import Loader
from evaluation.inspect.changed import shifted
from evaluation.inspect.corruption_error import mean_of
from evaluation.inspect.subjects import Observed, Subject, changed_share, cosine

DIRECTIONS = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}


def under_shifts(subject: Subject, loader: Loader, clean: Observed, shifts: list[int]) -> list[dict[str, Any]]:
    """A row per shift in pixels, means over the four directions: `cosine` of the embeddings of an image and the same
    shifted (None of a detector), and `changed`, the share of images whose class or verdict is another one."""
    rows = []
    for shift in shifts:
        seen = [
            subject.look(shifted(loader, down * shift, right * shift), f"shifted {name} by {shift}")
            for name, (down, right) in DIRECTIONS.items()
        ]
        decided = subject.decisions(clean)
        changed = [changed_share(decided, subject.decisions(observed)) for observed in seen]
        rows.append({"shift": shift, "cosine": mean_of([cosine(clean, one) for one in seen])})
        rows[-1]["changed"] = mean_of(changed)
    return rows


def between_frames(subject: Subject, dataset: Dataset, clean: Observed) -> dict[str, Any] | None:
    """Of neighboring frames: how many pairs, the mean `cosine` of their embeddings beside that of any two images of
    the set, and `changed`, the share of pairs with two classes or verdicts; None without a pair."""
    pairs = neighbors(dataset)
    if not len(pairs):
        return None
    first, second = pairs.unbind(1)
    found: dict[str, Any] = {"pairs": len(pairs), "cosine": None, "cosine_of_any_two": None}
    if clean.embeddings is not None:
        unit = F.normalize(clean.embeddings.double().cpu(), dim=1)  # (N, D)
        n = len(unit)
        found["cosine"] = float((unit[first] * unit[second]).sum(1).mean())
        found["cosine_of_any_two"] = float((unit.sum(0).square().sum() - n) / (n * (n - 1)))
    decided = subject.decisions(clean)
    found["changed"] = None if decided is None else changed_share(decided.cpu()[first], decided.cpu()[second])
    return found


def neighbors(dataset: Dataset) -> Tensor:
    """Pairs of images that follow each other in their video, int64 (P, 2): in the order of their names, numbers in
    these by value. A video is a group of the set (a vessel, a scene), or without groups a folder."""
    names = dataset.names
    videos = dataset.whole_groups or [str(Path(name).parent) for name in names]
    members = defaultdict(list)
    for i, video in enumerate(videos):
        members[video].append(i)
    orders = [sorted(own, key=lambda i: natural(names[i])) for own in members.values()]
    pairs = [pair for order in orders for pair in pairwise(order)]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def natural(name: str) -> list[tuple[str, int]]:
    """frame9 before frame10."""
    return [("", int(part)) if part.isdecimal() else (part, -1) for part in re.split(r"(\d+)", name)]
