"""Which files of a folder are images: one walk for all data sets and for predict.py."""

import errno
import functools
import heapq
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.text import say_once

NO_IMAGES = {  # formats that Pillow opens, but that are no photographs it can decode
    *("BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"),  # only recognized (WMF is drawn on Windows alone)
    "EPS",  # a PostScript program, which Ghostscript would run
    *("CUR", "GBR", "ICNS", "ICO"),  # icons and brushes; .gbr are also the drawings of circuit boards
}
FLOATS = {".pfm"}  # maps of depth or disparity: `decode` refuses floating-point pixels
JUNK = {  # folders of file systems, network drives and image viewers, in lower case
    *("lost+found", "thumbs", "thumbnails", "$recycle.bin", "system volume information", "#recycle", "#snapshot")
}
SIDECARS = {"thumbs.db", "desktop.ini"}  # files that lie everywhere and are not worth a line
RUN = {"config.yaml", "metrics.jsonl"}  # a folder that holds both belongs to a run
TABLE, HEATMAPS = "predictions.csv", "heatmaps"  # of predict.py; while it runs, the table has a longer name


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are tried on a file, whatever its extension: in Pillow's order."""
    Image.preinit()  # the most common ones, which thereby come first
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_IMAGES)


@functools.cache
def extensions() -> frozenset[str]:
    """Extensions of the images that this Pillow can decode, in lower case."""
    readable = {*formats(), "MPO"}  # JPEG's reader opens MPO
    return frozenset(extension for extension, kind in Image.EXTENSION.items() if kind in readable) - FLOATS


@dataclass
class Listing:
    """What lies in a folder and below. All paths begin with the folder's own, as it was given."""

    paths: list[str] = field(default_factory=list)  # of the images, sorted
    folders: list[str] = field(default_factory=list)  # that were entered, the first one included
    repeated: dict[str, str] = field(default_factory=dict)  # a link -> the same folder, which is entered or lies above
    runs: list[str] = field(default_factory=list)  # folders of runs and of predict.py's heat maps
    junk: list[str] = field(default_factory=list)  # folders left out by their names
    others: list[str] = field(default_factory=list)  # files that are no images by their extension

    def notice(self) -> str:
        """What was left out and why, in words; empty if nothing was. Hidden names (a leading dot) are not counted."""
        parts = []
        if self.others:
            kinds = Counter(os.path.splitext(path)[1].lower() or "without extension" for path in self.others)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
            parts.append(f"{_number(self.others, 'file')} of other kinds ({counts}; first {self.others[0]})")
        if self.junk:
            names = ", ".join(sorted({os.path.basename(path) for path in self.junk})[:5])
            parts.append(f"{_number(self.junk, 'folder')} by name ({names})")
        if self.runs:
            parts.append(f"{_number(self.runs, 'folder')} of runs and heat maps ({self.runs[0]})")
        if self.repeated:
            link, entered = next(iter(self.repeated.items()))
            parts.append(f"{_number(self.repeated, 'link')} to folders that are in already ({link} is {entered})")
        return ", ".join(parts)


def find_images(folder: str | Path, *, leave_out: str | Path | None = None) -> list[str]:
    """Paths of all images in `folder` and below, sorted, as `list_images` finds them."""
    return list_images(folder, leave_out=leave_out).paths


def list_images(folder: str | Path, *, leave_out: str | Path | None = None) -> Listing:
    """All images in `folder` and below, known by extension, in any case; a folder that is not there has none.

    Links are followed, but no folder is entered twice: of several paths to one folder a real one wins over one through
    a link, then the one nearer to the top, then the first by name. Links to a folder above are not followed.

    Left out are hidden files and folders (a leading dot), folders of `JUNK` or with a leading "@" or "__", folders of
    runs, heat maps that predict.py drew, and the folder `leave_out`. Rank 0 says once on stderr what that was.

    Raises:
        UserError: a folder that cannot be read.
    """
    top, found = str(folder), Listing()
    if not is_folder(top):
        return found
    above = [*Path(os.path.abspath(top)).parents, *Path(os.path.realpath(top)).parents]
    entered = {_identity(parent): str(parent) for parent in above if os.path.isdir(parent)}
    drawn = _identity(leave_out) if leave_out and is_folder(leave_out) else None
    waiting = [(False, 0, top)]  # a heap: real folders first, then links by their depth and name
    while waiting:
        _, depth, place = heapq.heappop(waiting)
        identity = _identity(place)
        if identity in entered:
            found.repeated[place] = entered[identity]
            continue
        entered[identity] = place
        entries = _entries(place)
        names = {entry.name for entry in entries}
        if place != top and (identity == drawn or names >= RUN):
            found.runs.append(place)
            continue
        found.folders.append(place)
        has_table = any(name.startswith(TABLE) for name in names)
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                if is_junk(name):
                    found.junk.append(entry.path)
                elif name == HEATMAPS and has_table:
                    found.runs.append(entry.path)
                else:
                    heapq.heappush(waiting, (entry.is_symlink(), depth + 1, entry.path))
            elif _may_be_image(name):
                found.paths.append(entry.path)  # of a broken link or a FIFO too, which `decode` then names
            elif name.lower() not in SIDECARS:
                found.others.append(entry.path)
    for paths in (found.paths, found.junk, found.runs, found.others):
        paths.sort()
    if is_main() and (left_out := found.notice()):
        say_once(f"{top}: left out {left_out}")
    return found


def is_junk(name: str) -> bool:
    """Whether a folder of this name holds no data: hidden, of the system, or a cache of small copies."""
    return name.startswith((".", "@", "__")) or name.lower() in JUNK


def is_folder(path: str | Path) -> bool:
    """As os.path.isdir, but a folder above that may not be entered is a `UserError` that names it."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give yourself the right to") from None
    except OSError:
        return False
    return os.path.isdir(path)


def refuse_shared_folders(train: Iterable[str], test: Iterable[str]) -> None:
    """UserError when images of `test` lie in a folder that images of `train` lie in, or below it, perhaps by a link."""
    taken = {os.path.realpath(place): place for place in {os.path.dirname(path) for path in train}}
    for place in sorted({os.path.dirname(path) for path in test}):
        real = os.path.realpath(place)
        for one in (real, *map(str, Path(real).parents)):
            if one in taken:
                raise UserError(
                    f"{place} and {taken[one]} are the same folder, so the test would be on training images: "
                    "copy or link single files to divide them"
                )


def _identity(path: str | Path) -> tuple[int, int]:
    """Device and inode: equal for all paths to one folder."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(_unreadable(path, error)) from None
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(_unreadable(folder, error)) from None


def _may_be_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in extensions()


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, or to a place that may not be read
        if error.errno == errno.ELOOP and _may_be_image(entry.name):
            return False
        raise UserError(_unreadable(entry.path, error)) from None


def _unreadable(path: str | Path, error: OSError) -> str:
    return f"cannot read folder {path}: {error.strerror}; make it readable, or hide it (name it .{Path(path).name})"


def _number(things, noun: str) -> str:
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"
