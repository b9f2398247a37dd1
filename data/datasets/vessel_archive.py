"""A large archive of images of all kinds, without labels: to pretrain on."""

from fnmatch import fnmatch
from functools import partial
from typing import Literal, NamedTuple

import torch

from data.dataset import Dataset
from data.duplicates import Fingerprints, Print, distinct, fingerprint
from data.geometry import Geometry, as_geometry
from data.image_files import find_images, is_folder
from data.images import OnError, image_size, in_threads
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.text import first_few, say_once
from runtime.values import PathText, Pixels


class VesselArchive(Dataset):
    """All images at any depth below `root`, less what no backbone learns from; the folders' names mean nothing.

    Every file is read once when the set is made, JPEG at reduced size. What is left out is counted for each reason in
    one line, and the first few of each are named in a warning.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder of the archive.
        leave_out: patterns of paths below `root`, as `*screenshot*,documents/*`, in any case.
        min_side: images with a shorter side, in pixels, are left out.
        duplicates: `drop` keeps of images that show the same (copies, also resized, re-encoded, flipped or turned) the
            one with most pixels; `keep` keeps all.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: there is no such folder, no image in it, or none left.
    """

    splits = ("train",)

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        leave_out: tuple[str, ...] = (),
        min_side: Pixels = 64,
        duplicates: Literal["keep", "drop"] = "keep",
        on_error: OnError = "skip",
    ):
        if not is_folder(root):
            raise UserError(f"data.root={root} is not a folder: expected images at any depth below it")
        paths = find_images(root)
        super().__init__(split, size, root, paths, [0] * len(paths), ["unlabelled"])
        patterns = [pattern.lower() for pattern in leave_out]
        unwanted = [any(fnmatch(name.lower(), pattern) for pattern in patterns) for name in self.names]
        self._drop(unwanted, "matching data.leave_out")
        if on_error == "fail" and min_side <= 1 and duplicates == "keep":
            return
        looks = list(
            in_threads(partial(_look, geometry=as_geometry(size), on_error=on_error), self.paths, "checking images")
        )
        self.unreadable = {path: look for path, look in zip(self.paths, looks) if isinstance(look, str)}
        self._drop([isinstance(look, str) for look in looks], "not readable")
        seen = [look for look in looks if not isinstance(look, str)]
        tiny = [min(look.size) < min_side for look in seen]
        self._drop(tiny, f"smaller than data.min_side={min_side}")
        if duplicates == "drop":
            large = [look for look, is_tiny in zip(seen, tiny) if not is_tiny]
            kept = distinct(
                Fingerprints.of([look.print for look in large]), torch.tensor([h * w for (h, w), _ in large])
            )
            dropped = torch.ones(len(large), dtype=torch.bool).index_fill(0, kept, False)
            self._drop(dropped.tolist(), "showing what another shows")

    def _drop(self, unwanted: list[bool], why: str) -> None:
        names = [path for path, is_unwanted in zip(self.paths, unwanted) if is_unwanted]
        if names and len(names) == len(self):
            raise UserError(f"all {len(self)} images of {self.root} would be left out, {why}; the first is {names[0]}")
        if names and is_main():
            say_once(f"warning: left out {len(names)} of {len(self)} images, {why}: {first_few(names)}")
        self.keep([i for i, is_unwanted in enumerate(unwanted) if not is_unwanted], why)


class _Look(NamedTuple):
    size: tuple[int, int]  # height, width
    print: Print


def _look(path: str, geometry: Geometry, on_error: OnError) -> _Look | str:
    """What is known of an image, or why it cannot be read."""
    try:
        return _Look(image_size(path), fingerprint(path, geometry))
    except UserError as error:
        if on_error == "fail":
            raise
        return str(error)
