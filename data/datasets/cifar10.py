"""CIFAR-10 from JPEG folders or from torchvision's files."""

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torchvision
from PIL import Image
from torch import Tensor

from data.datasets.folder import ClassFolder
from data.geometry import Geometry, as_geometry
from data.images import decode, fitted, image_sizes
from runtime.errors import UserError
from runtime.values import PathText


class CIFAR10:
    """Items `(image uint8 (3, H, W), label, index)`; classes in the published order, which is alphabetical.

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

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int | Geometry = 32,
        *,
        root: PathText,
        per_class: int | None = None,
    ):
        self.geometry = as_geometry(size)
        batches = Path(root) / torchvision.datasets.CIFAR10.base_folder
        if batches.is_dir():
            try:
                published = torchvision.datasets.CIFAR10(root, train=split == "train", download=False)
            except RuntimeError as error:
                raise UserError(f"{batches} is incomplete or damaged: unpack cifar-10-python.tar.gz again") from error
            self._pixels, self.left_out = published.data, {}  # uint8 (N, 32, 32, 3)
            self.paths = [f"{batches}/{split}#{i}" for i in range(len(self._pixels))]
            self.labels = torch.tensor(published.targets)
            self.classes = list(published.classes)
        elif (Path(root) / "train").is_dir() and (Path(root) / "test").is_dir():
            folders = ClassFolder(split, size, root=root)
            self._pixels = None
            self.paths, self.labels, self.classes = folders.paths, folders.labels, folders.classes
            self.left_out = folders.left_out
        else:
            raise UserError(
                f"data.root={root} holds no CIFAR-10: expected {batches}/data_batch_1 and so on, "
                f"or JPEG files in {root}/train/<class>/ and {root}/test/<class>/"
            )

        if per_class is not None and split == "train":
            members = [(self.labels == label).nonzero().flatten() for label in range(len(self.classes))]
            if not 1 <= per_class <= min(map(len, members)):
                raise UserError(f"data.per_class={per_class} must be 1 to {min(map(len, members))}, a class's images")
            kept = torch.cat([positions[:per_class] for positions in members]).sort().values.tolist()
            self.keep(kept, f"beyond data.per_class={per_class}")

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each original image: int64 (N, 2)."""
        return image_sizes(self.paths) if self._pixels is None else torch.full((len(self), 2), 32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self._pixels is None:
            image = decode(self.paths[index], self.geometry)
        else:
            image = fitted(Image.fromarray(self._pixels[index]), self.geometry)
        return image, int(self.labels[index]), index

    def keep(self, positions: list[int], why: str) -> None:
        """Leave out all images but these, for the reason `why`; they are numbered anew, the classes stay."""
        if len(positions) < len(self.paths):
            self.left_out[why] = len(self.paths) - len(positions)
        self.paths = [self.paths[i] for i in positions]
        self.labels = self.labels[positions]
        if self._pixels is not None:
            self._pixels = self._pixels[positions]
