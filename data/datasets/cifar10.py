"""CIFAR-10 from JPEG folders or from torchvision's files."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from data.dataset import Dataset
from data.datasets.folder import ClassFolder
from data.geometry import Geometry
from data.images import fitted
from runtime.errors import UserError
from runtime.values import PathText, PositiveInt


class CIFAR10(Dataset):
    """The classes are in the published order, which is alphabetical.

    `<root>/cifar-10-batches-py/` (the published Python files, read and checked by torchvision) stays in memory
    as it is, and `paths` name its rows, `.../train#17`; else `<root>/train/<class>/*` and `<root>/test/<class>/*` are
    decoded.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with cifar-10-batches-py, or with `train` and `test`.
        per_class: so many training images of each class, the first ones; none: all 5,000.

    Raises:
        UserError: neither layout is there, the published files are incomplete, or a class has fewer images.
    """

    def __init__(self, split: str, size: int | Geometry = 32, *, root: PathText, per_class: PositiveInt | None = None):
        self._pixels: np.ndarray | None = None  # uint8 (n, 32, 32, 3), all rows of the published files
        batches = Path(root) / torchvision.datasets.CIFAR10.base_folder
        if batches.is_dir():
            for path in batches.iterdir():
                if not path.is_file():  # torchvision would wait for a FIFO
                    raise UserError(f"{path} is not a regular file: unpack cifar-10-python.tar.gz again")
            try:
                published = torchvision.datasets.CIFAR10(root, train=split == "train", download=False)
            except RuntimeError as error:
                raise UserError(f"{batches} is incomplete or damaged: unpack cifar-10-python.tar.gz again") from error
            self._pixels = published.data
            paths = [f"{batches}/{split}#{i}" for i in range(len(published.data))]
            super().__init__(split, size, root, paths, published.targets, list(published.classes))
        elif (Path(root) / "train").is_dir() and (Path(root) / "test").is_dir():
            folders = ClassFolder(split, size, root=root)
            super().__init__(split, size, root, folders.paths, folders.labels, folders.classes)
        else:
            raise UserError(
                f"data.root={root} holds no CIFAR-10: expected {batches}/data_batch_1 and so on, "
                f"or JPEG files in {root}/train/<class>/ and {root}/test/<class>/"
            )

        if per_class is not None and split == "train":
            members = [(self.labels == label).nonzero().flatten() for label in range(len(self.classes))]
            if per_class > min(map(len, members)):
                raise UserError(f"data.per_class={per_class} at most {min(map(len, members))}, a class's images")
            kept = torch.cat([positions[:per_class] for positions in members]).sort().values.tolist()
            self.keep(kept, f"beyond data.per_class={per_class}")

    @cached_property
    def sizes(self) -> Tensor:
        return super().sizes if self._pixels is None else torch.full((len(self), 2), 32)

    def image(self, index: int) -> Tensor:
        if self._pixels is None:
            return super().image(index)
        row = int(self.paths[index].rpartition("#")[2])
        return fitted(Image.fromarray(self._pixels[row]), self.geometry)
