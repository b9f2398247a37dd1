"""A row per corruption and severity: what a subject makes of the corrupted test images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.corruptions import Constants
from data.datasets.cifar import CIFAR10C
from data.loading import Loader
from evaluation.inspect.changed import corrupted
from evaluation.inspect.robustness_report import shown
from evaluation.inspect.subjects import Observed, Subject, changed_share, cosine
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import PathText


def under_corruptions(
    subject: Subject,
    loader: Loader,
    clean: Observed,
    names: list[str],
    severities: list[int],
    *,
    seed: int,
    constants: Constants,
    published: PathText | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows, in the order of `names`.

    Args:
        clean: the subject's `look` at the images as they are.
        published: folder of CIFAR-10-C, whose images are taken in place of corrupted ones; None: none.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        for severity in severities:
            if published is None:
                images = corrupted(loader, name, severity, seed=seed, constants=constants)
            else:
                images = of_files(loader, published, name, severity)
            row = numbers(subject, subject.look(images, f"{name} {severity}"), clean)
            rows.append({"corruption": name, "severity": severity, **row})
        say(f"{name}: error {', '.join(shown(row['error']) for row in rows[-len(severities) :])}")
    return rows


def examples(
    loader: Loader,
    names: list[str],
    severities: list[int],
    *,
    seed: int,
    constants: Constants,
    published: PathText | None,
) -> list[tuple[str, Tensor]]:
    """The first test image under each of them, uint8 (3, H, W), with a caption in two lines."""
    image, number = loader.dataset.image(0)[None], torch.zeros(1, dtype=torch.int64)  # (1, 3, H, W)
    found = []
    for name in names:
        for severity in severities:
            if published is None:
                made = corrupted(loader, name, severity, seed=seed, constants=constants).changed(image, number)[0]
            else:
                made = of_files(loader, published, name, severity).dataset.image(0)
            found.append((f"{name.replace('_', ' ')}\nseverity {severity}", made))
    return found


def numbers(subject: Subject, observed: Observed, clean: Observed) -> dict[str, Any]:
    """The subject's numbers; `cosine` of the embeddings of clean and corrupted images, and `changed`, the share of the
    images whose class or verdict is another one. The latter two are None where the images are in another order."""
    same = torch.equal(observed.labels, clean.labels)
    row = subject.numbers(observed) | {"cosine": cosine(clean, observed) if same else None}
    return row | {"changed": changed_share(subject.decisions(clean), subject.decisions(observed)) if same else None}


def require_files(root: PathText, names: list[str]) -> None:
    """UserError for a corruption that CIFAR-10-C's folder has no file of, before hours of others are measured."""
    for name in names:
        if not (file := Path(root) / f"{name}.npy").is_file():
            raise UserError(f"cifar10_c has no {file}: give the folder of the published files, or leave out {name}")


def of_files(loader: Loader, root: PathText, name: str, severity: int) -> Loader:
    """CIFAR-10-C's images of a corruption.

    Raises:
        UserError: a missing file, or other classes than the loader's.
    """
    about = {"root": root, "corruption": name, "severity": severity}
    dataset = CIFAR10C("test", loader.dataset.geometry, **about)
    if dataset.classes != loader.dataset.classes:
        other = sorted({*dataset.classes} ^ {*loader.dataset.classes})
        raise UserError(f"cifar10_c has CIFAR-10's classes, and the images have others: {first_few(other, 4)}")
    return Loader(dataset, loader.batch_size, loader.device, cache="none")
