"""One class as the normal one, all others as anomalies: CIFAR-10's protocol, and that of any class folders."""

from pathlib import Path

import torchvision
from torch import Tensor

from data.dataset import Dataset
from data.datasets.cifar import CIFAR10
from data.datasets.folder import ClassFolder
from data.geometry import Geometry
from data.images import OnError
from data.splits import Draw
from runtime.errors import UserError
from runtime.values import BelowOne, PathText


class OneAgainstAll(Dataset):
    """Images of the class `normal` to learn from, and images of all classes to test on.

    The training set is the training images of `normal`, the test set all test images: label 0 if they are of that
    class, else 1 (Ruff et al. 2018, "Deep One-Class Classification", section 4.3). The published number is the mean of
    the AUROC over the classes, each in turn the normal one: one run per class, see configs/sweeps/cifar10_anomaly.yaml.

    `defects` says for each image "good" or its class. There are no masks, for another class fills all of an image.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with the classes, with `train` and `test`, or with cifar-10-batches-py.
        normal: name of the normal class.
        test_fraction, splits, group: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: `normal` is no class of the set, or what the underlying set has to say.
    """

    splits = ClassFolder.splits

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        normal: str,
        test_fraction: BelowOne | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        if (Path(root) / torchvision.datasets.CIFAR10.base_folder).is_dir():
            Draw(test_fraction=test_fraction, splits=splits, group=group).refuse(
                f"CIFAR-10 in {root} has its own splits"
            )
            if split not in CIFAR10.splits:
                raise UserError(f"CIFAR-10 in {root} has no split '{split}'")
            every: Dataset = CIFAR10(split, size, root=root)
        else:
            every = ClassFolder(split, size, root=root, test_fraction=test_fraction, splits=splits, group=group)
        self._take(every, normal, on_error)

    def _take(self, every: Dataset, normal: str, on_error: OnError) -> None:
        """Become the set of all classes, `every`, with `normal` against the others."""
        self._all, names, root = every, every.classes, every.root
        if normal not in names:
            raise UserError(f"data.normal={normal!r} is no class of {root}; classes there: {', '.join(names)}")
        if "good" in names and normal != "good":
            raise UserError(f"class 'good' of {root} would be an anomaly, but normal images are called so: rename it")
        if every.split != "test":  # before any is looked at: the other classes are never decoded
            every.keep((every.labels == names.index(normal)).nonzero()[:, 0].tolist(), "of other classes")
        every.drop_unreadable(on_error)
        defects = ["good" if names[label] == normal else names[label] for label in every.labels.tolist()]
        Dataset.__init__(self, every.split, every.geometry, root, every.paths, defects=defects)
        self.boxes, self.left_out, self.unreadable = every.boxes, every.left_out, every.unreadable
        self.division, self.splits = every.division, every.splits

    @property
    def sizes(self) -> Tensor:
        return self._all.sizes

    def image(self, index: int) -> Tensor:
        return self._all.image(index)

    def stored(self, index: int):
        return self._all.stored(index)
