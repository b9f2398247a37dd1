"""CIFAR-10, CIFAR-100 and the corrupted test images of CIFAR-10-C."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torchvision

from data.dataset import ArrayDataset, Dataset, download
from data.datasets.folder import ClassFolder
from data.geometry import Geometry
from runtime.errors import UserError
from runtime.files import open_regular
from runtime.values import PathText, PositiveInt, Range

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",  # this one and those below are not of the benchmark: to choose settings on
    "gaussian_blur",
    "spatter",
    "saturate",
]
Severity = Annotated[int, Range(least=1, most=5)]


class CIFAR10(ArrayDataset):
    """The classes are in the published order, which is alphabetical.

    `<root>/cifar-10-batches-py/` (the published Python files, read and checked by torchvision) stays in memory
    as it is, and `paths` name its rows, `.../train#17`; else `<root>/train/<class>/*` and `<root>/test/<class>/*` are
    decoded.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with cifar-10-batches-py, or with `train` and `test`.
        per_class: so many training images of each class, the first ones; none: all.
        download: fetch the published files into `root` if they are not there.

    Raises:
        UserError: neither layout is there, the published files are incomplete, or a class has fewer images.
    """

    title: str = "CIFAR-10"
    published: type = torchvision.datasets.CIFAR10

    def __init__(
        self,
        split: str,
        size: int | Geometry = 32,
        *,
        root: PathText,
        per_class: PositiveInt | None = None,
        download: bool = False,
    ):
        batches, first = Path(root) / self.published.base_folder, self.published.train_list[0][0]
        if download:
            fetch(self.published, root)
        if batches.is_dir():
            for path in batches.iterdir():
                if not path.is_file():  # torchvision would wait for a FIFO
                    raise UserError(f"{path} is not a regular file: unpack the published archive again")
            try:
                published = self.published(root, train=split == "train", download=False)
            except RuntimeError as error:
                archive = self.published.filename
                raise UserError(f"{batches} is incomplete or damaged: unpack {archive} again") from error
            pixels = {f"{batches}/{split}": published.data}
            super().__init__(split, size, root, pixels, published.targets, list(published.classes))
        elif (Path(root) / "train").is_dir() and (Path(root) / "test").is_dir():
            folders = ClassFolder(split, size, root=root)
            Dataset.__init__(self, split, size, root, folders.paths, folders.labels, folders.classes)
        else:
            raise UserError(
                f"data.root={root} holds no {self.title}: expected {batches}/{first} and so on, "
                f"or JPEG files in {root}/train/<class>/ and {root}/test/<class>/"
            )

        if per_class is not None and split == "train":
            members = [(self.labels == label).nonzero().flatten() for label in range(len(self.classes))]
            if per_class > (most := min(map(len, members))):
                raise UserError(f"data.per_class={per_class} must be at most {most}, a class's images")
            kept = torch.cat([positions[:per_class] for positions in members]).sort().values.tolist()
            self.keep(kept, f"beyond data.per_class={per_class}")


class CIFAR100(CIFAR10):
    """As CIFAR-10, with the 100 fine classes of `<root>/cifar-100-python/`."""

    title = "CIFAR-100"
    published = torchvision.datasets.CIFAR100


class CIFAR10C(CIFAR10):
    """The test images of CIFAR-10 under one corruption (Hendrycks and Dietterich 2019), and clean images to train on.

    `<root>/<corruption>.npy` is uint8 (50000, 32, 32, 3), severities 1 to 5 one after another, each of all test images
    in CIFAR-10's order, and `<root>/labels.npy` their labels.

    Args:
        root: folder CIFAR-10-C.
        corruption: name of its file.
        severity: 1 to 5; none: all five.
        clean: CIFAR-10, which the split `train` is of; only needed for that.

    Raises:
        UserError: a missing file, or one of another shape.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry = 32,
        *,
        root: PathText,
        corruption: Corruption,
        severity: Severity | None = None,
        clean: PathText | None = None,
    ):
        if split == "train":
            if clean is None:
                raise UserError("CIFAR-10-C has test images only: set data.clean to the folder of CIFAR-10")
            super().__init__(split, size, root=clean)
            return
        file, numbers = Path(root) / f"{corruption}.npy", Path(root) / "labels.npy"
        pixels, labels = (self._read(path) for path in (file, numbers))
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3) or labels.shape != (len(pixels),):
            shapes = f"{pixels.dtype} {pixels.shape} and {numbers} {labels.shape}"
            raise UserError(f"{file} is {shapes}; expected uint8 (50000, 32, 32, 3) and (50000,)")
        ArrayDataset.__init__(self, split, size, root, {str(file): pixels}, torch.from_numpy(labels).long(), CLASSES)
        if severity is not None:
            each = len(pixels) // 5
            kept = list(range(each * (severity - 1), each * severity))
            self.keep(kept, f"not of data.severity={severity}")

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            open_regular(path).close()  # np.load would wait for a FIFO
            return np.load(path, mmap_mode="r" if path.name != "labels.npy" else None)
        except (OSError, ValueError) as error:
            expected = "expected <root>/<corruption>.npy and <root>/labels.npy of CIFAR-10-C"
            raise UserError(f"cannot read {path}: {error}; {expected}") from error


def fetch(published: type, root: PathText) -> None:
    download(lambda: published(root, download=True), root)
