"""Objects cut out of images by the boxes of annotations: COCO's JSON files, and FiftyOne's export of them."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from data.dataset import Dataset
from data.datasets.mixed import renamed
from data.geometry import Geometry, as_geometry
from data.images import OnError, decode, image_sizes, readable
from data.splits import Draw
from runtime.errors import UserError, cut
from runtime.files import open_regular
from runtime.text import first_few
from runtime.values import BelowOne, PathText, Pixels, Range, Seed

LAYOUT = (
    "expected <root>/labels.json and <root>/data/ (FiftyOne), or data.annotations=annotations/instances_train2017.json "
    "and <root>/train2017/ (COCO)"
)
Boxes = Literal["largest", "all", "five"]
Context = Annotated[float, Range(least=1, most=100)]


class Detections(Dataset):
    """Objects by their boxes, each an image of its own, of the class of its category.

    - FiftyOne's COCODetectionDataset: `<root>/labels.json` and `<root>/data/...`;
    - COCO: `<root>/annotations/instances_train2017.json` and `<root>/train2017/...`, by `annotations`.

    A `file_name` is looked for in `images`, or else in `data` beside the JSON file, in the folder of `root` that the
    file is called after (without `instances_`), beside the file, and in `root`: the first that has one of the images.

    Boxes [x, y, width, height] are in pixels of the upright image. Left out, and counted, are crowds (`iscrowd`), boxes
    without area or outside the image, and images without boxes. All boxes of an image are in one split.

    Args:
        size: how what is cut out becomes H x W; a number S squashes it to S x S.
        root: folder of the set.
        annotations: JSON file below `root`; none: `labels.json`.
        test_annotations: another file, of images to test on; `annotations` has those to train on.
        validation_annotations: likewise for validation.
        images: folder below `root` of the files that the JSON file names; none: as above.
        boxes: the `largest` of each image, `all`, or `five` parts of the largest: its corners and its center, each half
            as high and as wide.
        context: factor by which boxes grow about their centers, but not beyond the image.
        min_crop_size: what has a shorter side, in pixels, is left out.
        merge: {category: new name}; categories with the same new name become one class.
        test_fraction: share of the images for testing, without `test_annotations`; none: 0.2.
        validation_fraction: likewise for validation; none: 0, no such split.
        split_seed: of the shares; none: 0.
        splits, group: as for `folder`.
        on_error: `fail` names a missing or broken image; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a file that is no such JSON, an id that is there twice or is of nothing, an image in two files or of
            another size than the file says, a name in `merge` that is no category, no box left, options of a split that
            there is.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        annotations: PathText | None = None,
        test_annotations: PathText | None = None,
        validation_annotations: PathText | None = None,
        images: PathText | None = None,
        boxes: Boxes = "largest",
        context: Context = 1.0,
        min_crop_size: Pixels = 1,
        merge: dict | None = None,
        test_fraction: BelowOne | None = None,
        validation_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        shares = {"test_fraction": test_fraction, "validation_fraction": validation_fraction, "split_seed": split_seed}
        draw = Draw(**shares, splits=splits, group=group)
        files = {"train": annotations or "labels.json"}
        files |= {"validation": validation_annotations} if validation_annotations else {}
        files |= {"test": test_annotations} if test_annotations else {}
        found = {its: _read(Path(root), Path(root, file), images) for its, file in files.items()}
        _check_files(files, found)
        categories = sorted({name for its in found.values() for name in its.categories})
        new = dict(zip(categories, renamed(categories, merge or {})))
        classes = sorted({new[box.category] for its in found.values() for box in its.boxes if box.area > 0})
        whole, self.division, left_out = found.get(split), None, {}
        if len(files) > 1:
            draw.refuse(f"{test_annotations or validation_annotations} divides the set")
            there = tuple(its for its in self.splits if its in files)
            mine = range(len(whole.paths)) if whole else ()
        else:
            whole = found["train"]
            labels = [classes.index(new[name]) if name else len(classes) for name in whole.largest()]
            self.division = draw.divide(root, whole.paths, torch.tensor(labels))
            mine, there = self.division.of(split), self.division.there
            left_out = {f"images {why}": count for why, count in self.division.left_out(split).items()}
        if not mine:
            advice = f"it has {', '.join(there)}; set data.{split}_annotations or data.{split}_fraction"
            raise UserError(f"{root} has no images for {split}: {advice}")
        cut_out, why_not = _cut_out(whole, [*mine], boxes, context, min_crop_size, on_error, size)
        left_out = {why: count for why, count in (why_not | left_out).items() if count}
        if not cut_out:
            raise UserError(f"no box of the split '{split}' of {root} can be cut out: {_words(left_out)}")
        paths, names, places = zip(*cut_out)
        super().__init__(split, size, root, list(paths), [classes.index(new[name]) for name in names], classes)
        self.boxes, self.left_out, self.splits = torch.tensor(places), left_out, there


@dataclass
class _Box:
    image: int  # position in the file
    category: str
    place: tuple[float, float, float, float]  # x, y, width, height
    is_crowd: bool

    @property
    def area(self) -> float:
        """0 of what is no object."""
        return 0.0 if self.is_crowd or min(self.place[2:]) <= 0 else self.place[2] * self.place[3]


@dataclass
class _Annotated:
    """One JSON file."""

    file: Path
    paths: list[str]
    sizes: list[tuple[int, int] | None]  # h, w that the file says
    boxes: list[_Box]
    categories: list[str]

    def largest(self) -> list[str | None]:
        """The category of each image's largest box, None of images without."""
        area, category = [0.0] * len(self.paths), [None] * len(self.paths)
        for box in self.boxes:
            if box.area > area[box.image]:
                area[box.image], category[box.image] = box.area, box.category
        return category


def _read(root: Path, file: Path, images: str | None) -> _Annotated:
    content = _json(root, file)
    names, categories = {}, {}
    for row in _rows(content, "categories", file):
        _add(categories, row, "name", "categories", file)
    for row in _rows(content, "images", file):
        _add(names, row, "file_name", "images", file)
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(f"{file} names {len(twice)} images more than once, the first is {twice[0]}")
    names = dict(sorted(names.items(), key=lambda row: row[1]))  # so that splits depend on names alone
    position, boxes, seen = {key: i for i, key in enumerate(names)}, [], set()
    for i, row in enumerate(_rows(content, "annotations", file, needed=False)):
        key = row.get("id", f"number {i + 1}")
        where = f"annotation {cut(str(key), 40)} of {file}"
        if not isinstance(key, int | str) or key in seen:
            raise UserError(f"{where} is there twice, or its id is none: annotations need ids of their own")
        seen.add(key)
        for kind, known in (("image_id", names), ("category_id", categories)):
            its = row.get(kind)
            if not isinstance(its, int | str) or its not in known:
                raise UserError(f"{where} has {kind}={cut(str(its), 40)}, and there is no such {kind[:-3]}")
        place = _numbers(row.get("bbox"), 4)
        if place is None:
            raise UserError(f"{where} has bbox={cut(str(row.get('bbox')), 60)}: it must be four numbers, [x, y, w, h]")
        boxes.append(_Box(position[row["image_id"]], categories[row["category_id"]], place, bool(row.get("iscrowd"))))
    size_of = {row["id"]: _numbers([row.get("height"), row.get("width")], 2) for row in content["images"]}
    folder = _folder(root, file, images, [*names.values()])
    paths = [os.path.join(folder, name) for name in names.values()]
    return _Annotated(file, paths, [size_of[key] for key in names], boxes, [*categories.values()])


def _json(root: Path, file: Path) -> dict[str, Any]:
    if not file.is_file():
        there = [str(path.relative_to(root)) for path in sorted([*root.glob("*.json"), *root.glob("*/*.json")])]
        raise UserError(f"there is no {file}; JSON files there: {first_few(there, 4) or 'none'}; {LAYOUT}")
    try:
        with open_regular(file, "r", encoding="utf-8-sig") as opened:
            content = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON file: {cut(str(error), 100)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no COCO file, which has images, annotations and categories; results are none")
    return content


def _rows(content: dict, key: str, file: Path, *, needed: bool = True) -> list[dict]:
    """A list of objects; FiftyOne leaves out `annotations` where there are none."""
    rows = content.get(key, None if needed else [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or (needed and not rows):
        raise UserError(
            f"{file} has no list of {key}; keys there: {first_few(content, 6) or 'none'}; it is no COCO file"
        )
    return rows


def _add(known: dict, row: dict, key: str, kind: str, file: Path) -> None:
    """Take {id: name} of an image or a category."""
    its, name = row.get("id"), row.get(key)
    if not isinstance(its, int | str) or not isinstance(name, str) or not name:
        raise UserError(f"one of {kind} in {file} has id={cut(str(its), 40)} and {key}={cut(str(name), 60)}")
    if its in known:
        raise UserError(f"{file} has id={cut(str(its), 40)} twice in {kind}: of {known[its]} and of {name}")
    known[its] = name.replace("\\", "/") if key == "file_name" else name  # of Windows


def _numbers(values: Any, count: int) -> tuple | None:
    """So many finite numbers, or None."""
    if not isinstance(values, list) or len(values) != count:
        return None
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in values)
    return tuple(values) if good else None


def _folder(root: Path, file: Path, images: str | None, names: list[str]) -> Path:
    """Where the images lie."""
    if images is not None:
        return root / images
    places = [file.parent / "data", root / file.stem.removeprefix("instances_"), file.parent, root]
    for place in places:
        if any(os.path.isfile(place / name) for name in names):
            return place
    looked = ", ".join(dict.fromkeys(str(place.relative_to(root)) for place in places if place.is_relative_to(root)))
    raise UserError(
        f"none of the {len(names)} images of {file}, as {names[0]}, is in {looked} of {root}: set data.images"
    )


def _check_files(files: dict[str, str], found: dict[str, _Annotated]) -> None:
    """No image is in two of the files."""
    owner: dict[str, str] = {}
    for split, its in found.items():
        for path in its.paths:
            before = owner.setdefault(os.path.realpath(path) if len(found) > 1 else path, split)
            if before != split:
                raise UserError(f"{path} is in {files[before]} and in {files[split]}: it must be in one of them")


def _cut_out(
    found: _Annotated,
    mine: list[int],
    boxes: Boxes,
    context: float,
    least: int,
    on_error: OnError,
    size: int | Geometry,
) -> tuple[list[tuple[str, str, list[int]]], dict[str, int]]:
    """(path, category, [top, left, height, width]) of what is cut out of the images `mine`, in the order of the images,
    and how much is not, for each reason."""
    missing = [i for i in mine if not os.path.isfile(found.paths[i])]
    if missing and on_error == "fail":
        names = f"the first is {found.paths[missing[0]]}"
        raise UserError(
            f"{len(missing)} images that {found.file} names are not there, {names}; or set data.on_error=skip"
        )
    of_image: dict[int, list[_Box]] = {}
    for box in found.boxes:
        of_image.setdefault(box.image, []).append(box)
    gone = {*missing}
    used = [i for i in mine if i in of_image and i not in gone]
    kept = readable(lambda k: decode(found.paths[used[k]], as_geometry(size)), [found.paths[i] for i in used], on_error)
    left_out = Counter({"missing images": len(missing), "not readable": len(used) - len(kept)})
    left_out["images without boxes"] = len(mine) - len(used) - len(missing)
    used, rows = [used[k] for k in kept], []
    for i, (height, width) in zip(used, image_sizes([found.paths[i] for i in used]).tolist()):
        if found.sizes[i] not in (None, (height, width)):
            raise UserError(
                f"{found.paths[i]} has {height} x {width} pixels, and {found.file} says {found.sizes[i][0]} x "
                f"{found.sizes[i][1]}: boxes would be elsewhere"
            )
        good = []
        for box in of_image[i]:
            seen = crop_of(box.place, 1.0, (height, width))
            if box.is_crowd:
                left_out["crowds"] += 1
            elif min(box.place[2:]) <= 0:
                left_out["boxes without area"] += 1
            elif seen is None:
                left_out["boxes outside the image"] += 1
            else:
                good.append((seen[2] * seen[3], box))
        if boxes != "all" and good:
            left_out["boxes beside the largest"] += len(good) - 1
            good = [max(good, key=lambda pair: pair[0])]  # of equally large ones the first
        for _, box in good:
            place = crop_of(box.place, context, (height, width))
            for part in five_of(place) if boxes == "five" else [place]:
                if min(part[2:]) < least:
                    left_out[f"below data.min_crop_size={least}"] += 1
                else:
                    rows.append((found.paths[i], box.category, part))
    return rows, dict(left_out)


def crop_of(place: tuple[float, ...], context: float, size: tuple[int, int]) -> list[int] | None:
    """Top, left, height and width of the pixels that a box [x, y, width, height] touches, `context` times as large
    about its center, inside an image of this size (h, w); None: the box itself is outside."""
    spans = []
    for begin, extent, length in ((place[1], place[3], size[0]), (place[0], place[2], size[1])):
        if begin >= length or begin + extent <= 0:
            return None
        grown = extent * (context - 1) / 2
        # rounded, for boxes of relative coordinates end at 64.00000000000001
        low = min(max(math.floor(round(begin - grown, 3)), 0), length - 1)
        high = min(math.ceil(round(begin + extent + grown, 3)), length)
        spans.append((low, max(high - low, 1)))
    (top, height), (left, width) = spans
    return [top, left, height, width]


def five_of(place: list[int]) -> list[list[int]]:
    """The four corners and the center of a place, each half as high and as wide."""
    top, left, height, width = place
    h, w = (height + 1) // 2, (width + 1) // 2
    below, right = top + height - h, left + width - w
    center = [top + (height - h) // 2, left + (width - w) // 2, h, w]
    return [[top, left, h, w], [top, right, h, w], [below, left, h, w], [below, right, h, w], center]


def _words(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items())
