"""DIMO, the Dataset of Industrial Metal Objects (De Roovere et al. 2022): whole images, or the parts in them cut out,
also one part against all others."""

import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset
from data.datasets.bop import OTHERS, Items, Label, find_scenes, read_models, read_scenes
from data.datasets.one_against_all import OneAgainstAll
from data.geometry import Geometry, as_geometry
from data.images import OnError, decode, image_sizes, readable
from data.splits import Draw
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import BelowOne, PathText, Pixels, PositiveInt, Seed

SMALLEST = 16  # pixels: the shorter side of a part that is cut out


class DIMO(Dataset):
    """Images of metal parts on a carrier; each scene was taken from 13 viewpoints, and rendered in 71 variants.

    `<root>/<sub-set>/<scene>/rgb/000000.png`, with JSON files that say of each image by its number how it was made
    (`scene_info.json`) and where its parts lie (`scene_gt.json`, `scene_camera.json`). Sub-sets have any names, and may
    be two folders deep. A part is cut out by the rectangle around its model's box, whose corners are in
    `<root>/models/models_info.json`: what hides the part is not known. Numbers from 100 are carriers and background.

    The split is by scene: all viewpoints, cameras and variants (000012_07 is one of 000012) are on one side. As many of
    each class as of the others (`data.splits.grouped_split`).

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with `models` and the sub-sets.
        subsets: names of those to use, as `real_jaigo,sim_jaigo`; none: all.
        crop: `image` takes whole images, `object` each part as an image of its own.
        label: what the classes are: of parts that are cut out `part`, or of the image its `carrier`, `lighting` or
            `composition`; none: part of these, composition of whole images.
        min_crop_size: parts with a shorter side inside the image, in pixels, are left out; none: 16.
        test_fraction: share of the scenes for testing; none: 0.2.
        split_seed: of that share; none: 0.
        splits: as for `folder`.
        on_error: `fail` names a broken or missing image at once or when it is decoded; `skip` looks for them now and
            leaves them out.

    Raises:
        UserError: no scenes, a scene without images or one of its files, a file that is damaged or does not have the
            same images, a camera for images of another size, a class without training images.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        subsets: tuple[str, ...] = (),
        crop: Literal["image", "object"] = "image",
        label: Label | None = None,
        min_crop_size: Pixels | None = None,
        test_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        on_error: OnError = "fail",
    ):
        whole = crop == "image"
        kind = label or ("composition" if whole else "part")
        if whole and kind == "part":
            raise UserError("data.label=part: an image shows several parts; set data.crop=object to cut them out")
        if whole and min_crop_size is not None:
            raise UserError("data.min_crop_size is of parts that are cut out: remove it, or set data.crop=object")
        folders = find_scenes(Path(root), subsets)
        models = None if whole else read_models(Path(root))
        items = read_scenes(folders, kind, models, on_error)
        if not items.paths:
            raise UserError(f"the scenes of {root} show no part with a number below {OTHERS}: use data.crop=image")
        classes = sorted({*items.names}, key=_by_number)
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name in items.names])
        draw = Draw(test_fraction=test_fraction, split_seed=split_seed, splits=splits)
        division = draw.divide(root, items.paths, labels, groups=items.groups, splits=self.splits)
        mine, how = division.of(split), f"data.test_fraction={test_fraction}" if splits is None else splits
        _check_sides(root, classes, labels[division.of("train")], bool(mine), split, how)
        files = sorted({items.paths[i] for i in mine})
        broken: dict[str, str] = {}
        is_good = {files[i] for i in readable(lambda i: decode(files[i], as_geometry(size)), files, on_error, broken)}
        kept = [i for i in mine if items.paths[i] in is_good]
        left_out = division.left_out(split) | {"not readable": len(mine) - len(kept)}
        boxes = None
        if not whole:
            kept, boxes, unseen = _seen(items, kept, SMALLEST if min_crop_size is None else min_crop_size)
            left_out |= unseen
            if not kept:
                reasons = ", ".join(f"{count} {why}" for why, count in unseen.items() if count)
                raise UserError(f"no part in the {split} images of {root} can be cut out: {reasons}")
        super().__init__(split, size, root, [items.paths[i] for i in kept], labels[kept], classes)
        self.division, self.boxes, self.unreadable = division, boxes, broken
        self.left_out = {why: count for why, count in left_out.items() if count}

    @property
    def matched(self) -> str:
        return f"{super().matched}, from {_scenes_of(self.names)}"


class DIMOOneVsAll(OneAgainstAll):
    """One part as normal against all others, each cut out as `DIMO` does; the scenes that are tested on show both.

    Args:
        root: folder with `models` and the sub-sets.
        normal: number of the part.
        subsets, min_crop_size, test_fraction, split_seed, splits, on_error: as for `dimo`.

    Raises:
        UserError: there is no such part, or as for `DIMO`.
    """

    splits = DIMO.splits

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        normal: PositiveInt,
        subsets: tuple[str, ...] = (),
        min_crop_size: Pixels = SMALLEST,
        test_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        on_error: OnError = "fail",
    ):
        every = DIMO(
            split,
            size,
            root=root,
            subsets=subsets,
            crop="object",
            min_crop_size=min_crop_size,
            test_fraction=test_fraction,
            split_seed=split_seed,
            splits=splits,
            on_error=on_error,
        )
        self._take(every, f"part{normal}", "fail")  # what cannot be read is out already

    @property
    def matched(self) -> str:
        return f"{super().matched}, from {_scenes_of(self.names)}"


def _scenes_of(names: list[str]) -> str:
    """How many scenes these images are of, and of which sub-sets."""
    scenes = {name.partition("/rgb/")[0] for name in names}
    subsets = sorted({os.path.dirname(scene) or "." for scene in scenes})
    return f"{len(scenes)} scenes of {first_few(subsets, 8)}"


def _check_sides(root: PathText, classes: list[str], learned: Tensor, is_there: bool, split: str, how: str) -> None:
    """The split has a scene (`is_there`), and every class is among the labels that are `learned`."""
    if not is_there:
        raise UserError(f"{root} has no scene for {split} with {how}: change that, or add scenes")
    if rare := sorted({*range(len(classes))} - {*learned.tolist()}):
        names = first_few(classes[i] for i in rare)
        raise UserError(f"no scene of {root} with {names} is for training: give it one in data.splits")


def _seen(items: Items, kept: list[int], least: int) -> tuple[list[int], Tensor, dict[str, int]]:
    """Which of the `kept` parts can be cut out of their images, their boxes in whole pixels, int64 (N, 4) top, left,
    height, width, and how many cannot, for each reason."""
    files = sorted({items.paths[i] for i in kept})
    size_of = dict(zip(files, image_sizes(files).tolist()))
    sizes = np.array([size_of[items.paths[i]] for i in kept]).reshape(-1, 2)[:, ::-1]  # (N, 2) w, h
    centers, places = items.centers[kept], items.places[kept]
    if (odd := ((centers < 0) | (centers > sizes)).any(1).nonzero()[0]).size:
        (x, y), (width, height), path = centers[odd[0]], sizes[odd[0]], items.paths[kept[odd[0]]]
        raise UserError(
            f"cam_K of {path} has its center at {x:.6g}, {y:.6g}, and the image has {width} x {height} pixels: "
            "the cameras are those of larger images; take the JSON files that belong to these"
        )
    behind = np.isnan(places).any(1)
    places = np.where(behind[:, None], 0, places)
    low = np.clip(np.floor(places[:, :2]), 0, sizes).astype(np.int64)
    high = np.clip(np.ceil(places[:, 2:]), 0, sizes).astype(np.int64)
    side = (high - low).min(1, initial=2**62)  # (N,) the shorter side
    outside = ~behind & (side < 1)
    small = ~behind & ~outside & (side < least)
    unseen = {"behind the camera": behind, "outside the image": outside, f"below data.min_crop_size={least}": small}
    good = (~behind & ~outside & ~small).nonzero()[0]
    boxes = np.concatenate([low[:, ::-1], (high - low)[:, ::-1]], axis=1)[good]
    return [kept[i] for i in good], torch.from_numpy(boxes), {why: int(its.sum()) for why, its in unseen.items()}


def _by_number(name: str) -> list:
    """Sorts part10 behind part9."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", name)]
