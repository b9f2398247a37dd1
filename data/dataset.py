"""What every dataset has, and what a new layout on disk need not write again.

A new layout is one file in data/datasets/ and one row in `DATASETS` (data/__init__.py): a class that lists the files
and says what each of them is. Its keyword-only arguments are its options in the configuration:

    class Table(Dataset):
        def __init__(self, split: str, size: int | Geometry, *, root: PathText, on_error: OnError = "fail"):
            rows = ...  # those of the split
            super().__init__(split, size, root, paths, labels, classes, on_error=on_error)

To be tested for anomalies it gives `defects`, and `masks` if there are any, in place of labels and classes.
`data.loading.Loader` makes batches of it and keeps what was decoded.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.geometry import Geometry, as_geometry
from data.images import OnError, decode, decode_mask, fitted, image_sizes, readable
from data.masks import check_sizes, warn_of_values
from data.opening import memory_for, opened
from data.splits import FILE, Division, below
from runtime.distributed import barrier, is_main
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import PathText


class Dataset:
    """One split of a dataset, never augmented: `dataset[i] -> (image, label, index)`, image uint8 (3, H, W).

    The test split of one with defects: `(image, mask, label, index)`, mask bool (H, W), true on the defect; label 0
    normal, 1 anomalous.

    Attributes, where N is the number of images:
        split, root, geometry: which images, below which folder, and how they become H x W.
        paths: N texts.
        labels, classes: int64 (N,), and the names of their values.
        sizes: int64 (N, 2), heights and widths of the original images.
        left_out: {reason: how many images of the folder are not in the set for it}.
        unreadable: {path: reason} of those that `on_error=skip` left out.
        defects: for each image "good" or the name of its defect; None: the set has none to find.
        has_masks: whether it is known where the defects are.
        mask_paths: for each image the files of its mask, whose union it is, or None.
        boxes: of images that are parts of files, int64 (N, 4) top, left, height and width there; None: whole files.
        division: of a set that has no splits on the disk, which of all its images is in which; else None.
        groups: {kind of group: for each image its group}, such as {"lighting": [...]}; each is tested by itself too.

    Args:
        size: how images (and masks, by nearest pixels) become H x W; a number S squashes them to S x S.
        root: what the paths lie below.
        paths: of the images, at least one.
        labels, classes: for each image its class's number, and all classes' names; with defects normal and anomalous
            unless given.
        defects: for each image "good" or the name of its defect.
        masks: for each image the path of its mask, or those of several (a file per region), or None; None: no masks
            at all.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: no images, a mask of another size than its image.
    """

    splits: tuple[str, ...] = ("train", "test")  # what `split` may be
    few = False  # whether no image of `train` can be spared for a threshold, unless the user says so
    numbered = False  # whether the values of a mask number the kinds of defect, so that more than two are no mistake
    saturates = False  # whether it has `regions`, for the sPRO
    boxes: Tensor | None = None
    same_classes = True  # whether all splits must have images of the same classes, unless it has defects
    division: Division | None = None

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        root: PathText,
        paths: list[str],
        labels: list[int] | Tensor | None = None,
        classes: list[str] | None = None,
        defects: list[str] | None = None,
        masks: Sequence[str | list[str] | None] | None = None,
        on_error: OnError = "fail",
    ):
        if not paths:
            raise UserError(f"data.root={root} holds no image of the split '{split}'")
        if labels is None:
            labels, classes = [int(defect != "good") for defect in defects], ["normal", "anomalous"]
        self.split, self.root, self.geometry = split, root, as_geometry(size)
        self.paths, self.labels, self.classes = paths, torch.as_tensor(labels), classes
        self.defects, self.has_masks = defects, masks is not None
        self.mask_paths = [[mask] if isinstance(mask, str) else mask for mask in masks or [None] * len(paths)]
        self.left_out: dict[str, int] = {}
        self.unreadable: dict[str, str] = {}
        self.drop_unreadable(on_error)
        pairs = [(path, mask) for path, files in zip(self.paths, self.mask_paths) for mask in files or ()]
        check_sizes(pairs)
        warn_of_values((mask for _, mask in pairs), numbered=self.numbered)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | tuple[Tensor, Tensor, int, int]:
        image, label = self.image(index), int(self.labels[index])
        if self.defects is not None and self.split == "test":
            return image, self.mask(index), label, index
        return image, label, index

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W). A set whose images are neither files nor parts of them defines this and `sizes`."""
        return decode(self.paths[index], self.geometry, self.box(index))

    def original(self, index: int) -> Tensor:
        """The image at its own size, uint8 (3, h, w)."""
        geometry = self.geometry.whole(self.sizes[index].tolist())
        return decode(self.paths[index], geometry, self.box(index))

    def box(self, index: int) -> list[int] | None:
        """Top, left, height and width of the image in its upright file; None: the whole file."""
        return None if self.boxes is None else self.boxes[index].tolist()

    @contextmanager
    def stored(self, index: int) -> Iterator[Image.Image]:
        """The file of an image (of which `box` may be a part), not yet decoded, and memory kept for that. A set whose
        images are no files defines this too.

        Raises:
            UserError: the file cannot be read, or what is done with the image inside fails.
        """
        with opened(self.paths[index]) as image, memory_for(image, self.geometry):
            yield image

    def mask(self, index: int, *, original: bool = False) -> Tensor:
        """The true mask of an image: bool (H, W), or `original` (h, w) as it is stored; empty without one."""
        files = self.mask_paths[index]
        if files is None:
            size = self.sizes[index].tolist() if original else (self.geometry.height, self.geometry.width)
            return torch.zeros(*size, dtype=torch.bool)
        return torch.stack([decode_mask(file, None if original else self.geometry) for file in files]).any(0)

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each original image, upright: int64 (N, 2), read from the headers when first asked."""
        return image_sizes(self.paths) if self.boxes is None else self.boxes[:, 2:]

    def inside(self, indices: Tensor, device: torch.device | str) -> Tensor | None:
        """Where the inputs of these images (B,) show them and no padding: bool (B, H, W) on `device`; None without
        padding, whose sizes then nobody has to read."""
        return self.geometry.inside(self.sizes[indices], device) if self.geometry.fit == "pad" else None

    @classmethod
    def categories(cls, **_options) -> list[str]:
        """What the option `category` may be, sorted, with these options of the set; nothing of a set without it."""
        return []

    @property
    def groups(self) -> dict[str, list[str]]:
        return {}

    @property
    def mask_known(self) -> Tensor:
        """Whether it is known which pixels are defective, as it is of all good images: bool (N,)."""
        return torch.tensor([mask is not None for mask in self.mask_paths]) | (self.labels == 0)

    @property
    def names(self) -> list[str]:
        """The images' paths below `root`: what an image is known by in later runs, wherever the data lie."""
        return [os.path.relpath(self.full_name(i), self.root) for i in range(len(self))]

    def full_name(self, index: int) -> str:
        """The image's path; if it is a part of a file `<path>#<top>,<left>,<height>,<width>`."""
        box = self.box(index)
        return self.paths[index] if box is None else f"{self.paths[index]}#{','.join(map(str, box))}"

    @property
    def kinds(self) -> list[str]:
        """Of each image its class; of sets with defects "good" or its defect."""
        return self.defects or [self.classes[label] for label in self.labels.tolist()]

    @property
    def matched(self) -> str:
        """What was found, in words: how many images of each class, or of each defect and how many masks."""
        counts = Counter(self.kinds)
        each = first_few((f"{counts[kind]} {kind}" for kind in sorted(counts, key=lambda k: (k != "good", k))), 20)
        masks = f", {sum(mask is not None for mask in self.mask_paths)} masks" if self.has_masks else ""
        groups = "" if self.whole_groups is None else f", in {len({*self.whole_groups})} groups"
        return f"{self.split} of {self.root or 'several'}: {len(self)} images ({each}){masks}{groups}"

    @property
    def whole_groups(self) -> list[str] | None:
        """For each image the part, scene or vessel whose images are never on two sides; None: each is its own."""
        if self.division is None or self.division.groups is None:
            return None
        group_of = dict(zip(self.division.names, self.division.groups))
        return [group_of[name] for name in below(self.root, self.paths)]

    @property
    def divisions(self) -> dict[str, Division]:
        """`division` by the name of its file in a run folder (`data.splits.write_splits`)."""
        return {FILE: self.division} if self.division is not None else {}

    def keep(self, positions: list[int], why: str) -> None:
        """Leave out all images but these, for the reason `why`; they are numbered anew, the classes stay."""
        if len(positions) < len(self):
            self.left_out[why] = len(self) - len(positions)
        self.labels = self.labels[positions]
        self.boxes = None if self.boxes is None else self.boxes[positions]
        if "sizes" in self.__dict__:  # they have been read
            self.sizes = self.sizes[positions]
        self.paths, self.mask_paths = ([column[i] for i in positions] for column in (self.paths, self.mask_paths))
        if self.defects is not None:
            self.defects = [self.defects[i] for i in positions]

    def only(self, positions: list[int]) -> "Dataset":
        """A set of these images alone."""
        part = copy(self)
        part.left_out = {}
        part.keep(positions, "not asked for")
        return part

    def drop_unreadable(self, on_error: OnError) -> None:
        """With `skip` decode all images now and leave out the broken ones, named in one warning."""
        self.keep(readable(self.__getitem__, self.paths, on_error, self.unreadable), "not readable")


class ArrayDataset(Dataset):
    """Images that are rows of arrays, uint8 (n, h, w, 3), perhaps mapped from disk; `paths` name them `<file>#<row>`.

    Args:
        arrays: {file: its images}, in this order.
    """

    arrays: dict[str, np.ndarray] | None = None  # None: the images are files after all

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        root: PathText,
        arrays: dict[str, np.ndarray],
        labels: list[int] | Tensor,
        classes: list[str],
    ):
        self.arrays = arrays
        paths = [f"{file}#{row}" for file, pixels in arrays.items() for row in range(len(pixels))]
        super().__init__(split, size, root, paths, labels, classes)

    @cached_property
    def sizes(self) -> Tensor:
        if self.arrays is None:
            return super().sizes
        return torch.tensor([self.arrays[path.rpartition("#")[0]].shape[1:3] for path in self.paths])

    def image(self, index: int) -> Tensor:
        if self.arrays is None:
            return super().image(index)
        return fitted(self._row(index), self.geometry)

    @contextmanager
    def stored(self, index: int) -> Iterator[Image.Image]:
        if self.arrays is None:
            with super().stored(index) as image:
                yield image
        else:
            yield self._row(index)

    def _row(self, index: int) -> Image.Image:
        file, _, row = self.paths[index].rpartition("#")
        return Image.fromarray(np.ascontiguousarray(self.arrays[file][int(row)]))


def download(fetch: Callable[[], object], root: PathText) -> None:
    """Have rank 0 `fetch` a published set into `root` by torchvision, which checks it; the others wait.

    Raises:
        UserError: there is no network, or what came is damaged.
    """
    if is_main():
        try:
            fetch()
        except (OSError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"data.download=true: cannot fetch the set into {root}: {why}; unpack it there") from error
    barrier()
