"""One class as the normal one, all others as anomalies: CIFAR-10's protocol, and that of any class folders."""

from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor

from data.datasets.cifar10 import CIFAR10
from data.datasets.folder import ClassFolder
from data.geometry import Geometry
from data.images import OnError, readable
from runtime.errors import UserError
from runtime.values import PathText


class OneAgainstAll:
    """Train items `(image, 0, index)` of the class `normal`; test items `(image, mask, label, index)` of all classes.

    The training set is the training images of `normal`, the test set all test images: label 0 if they are of that
    class, else 1 (Ruff et al. 2018, "Deep One-Class Classification", section 4.3). The published metric is the mean of
    the AUROC over the classes, each in turn the normal one: one run per class, see configs/sweeps/cifar10_anomaly.yaml.

    image uint8 (3, H, W); mask bool (H, W), empty, for nobody marked where an image is of another class: `has_masks`
    is False. `defects` says for each image "good" or its class; `classes` are ["normal", "anomalous"].

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with the classes, with `train` and `test`, or with cifar-10-batches-py.
        normal: name of the normal class.
        test_fraction: in [0, 1), for class folders without `train` and `test`; 0 leaves all images to training.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: `normal` is no class of the set, or what the underlying set has to say.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int | Geometry,
        *,
        root: PathText,
        normal: str,
        test_fraction: float | None = None,
        on_error: OnError = "fail",
    ):
        if (Path(root) / torchvision.datasets.CIFAR10.base_folder).is_dir():
            self._all = CIFAR10(split, size, root=root)
        else:
            self._all = ClassFolder(split, size, root=root, test_fraction=test_fraction)
        names = self._all.classes
        if normal not in names:
            raise UserError(f"data.normal={normal!r} is no class of {root}; classes there: {', '.join(names)}")
        if "good" in names and normal != "good":
            raise UserError(f"class 'good' of {root} would be an anomaly, but normal images are called so: rename it")
        if split == "train":  # before any is looked at: the other classes are never decoded
            self._all.keep((self._all.labels == names.index(normal)).nonzero()[:, 0].tolist(), "of other classes")
        self._all.keep(readable(self._all.__getitem__, self._all.paths, on_error), "not readable")
        self.left_out = self._all.left_out
        self.split, self.geometry, self.paths = split, self._all.geometry, self._all.paths
        self.labels = (self._all.labels != names.index(normal)).long()
        self.defects = ["good" if names[c] == normal else names[c] for c in self._all.labels.tolist()]
        self.classes, self.has_masks = ["normal", "anomalous"], False

    @property
    def sizes(self) -> Tensor:
        """Height and width of each original image, upright: int64 (N, 2)."""
        return self._all.sizes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | tuple[Tensor, Tensor, int, int]:
        image, label = self._all[index][0], int(self.labels[index])
        if self.split == "train":
            return image, label, index
        return image, torch.zeros(image.shape[1:], dtype=torch.bool), label, index
