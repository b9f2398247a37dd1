"""Scenes in BOP's layout (Hodan et al. 2020): which there are, what their files say of each image, and where its
parts lie.

Letters: N images or parts, M images or parts of one scene. Lengths are in mm, and in pixels in images.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data.image_files import find_images, is_folder, is_junk
from data.images import OnError, in_threads
from runtime.errors import UserError, cut, shown
from runtime.files import open_regular
from runtime.text import first_few

GT, CAMERA, INFO, MODELS = "scene_gt.json", "scene_camera.json", "scene_info.json", "models/models_info.json"
LAYOUT = f"expected <root>/<sub-set>/<scene>/ with rgb/000000.png, {GT}, {CAMERA}, {INFO}, and <root>/{MODELS}"
DEPTH = 3  # of scenes below the root: downloads come in parts, each perhaps in a folder of its own
OTHERS = 100  # object numbers from here on are carriers and background
Label = Literal["part", "carrier", "lighting", "composition"]
KEYS = {  # in scene_info.json: of the README beside the official loader, and of the official page
    "carrier": ("carrier_id", "carrier"),
    "lighting": ("light_id", "light"),
    "composition": ("composition_type", "parts"),
}
WRONG = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of JSON of another kind


@dataclass
class Items:
    """What the scenes show: N images, or N parts in them."""

    paths: list[str]
    names: list[str]  # of their classes
    groups: list[str]  # of each the number of its scene without that of the variant
    places: np.ndarray  # (N, 4) of parts the left, top, right and bottom end in pixels; NaN behind the camera
    centers: np.ndarray  # (N, 2) of parts the camera's principal point x, y


def read_scenes(folders: list[Path], kind: Label, models: dict[int, np.ndarray] | None, on_error: OnError) -> Items:
    """The images of all scenes, or with `models` (`read_models`) the parts in them.

    Args:
        kind: what the classes are.
        on_error: `skip` lets images be missing that the files name; they are found with the broken ones.

    Raises:
        UserError: a scene without images or one of its files, a file that is damaged or names other images, a part
            without a model.
    """
    read = partial(_read_scene, kind=kind, models=models, on_error=on_error)
    scenes = list(in_threads(read, folders, "reading scenes"))
    paths, names, groups = (
        [x for scene in scenes for x in getattr(scene, key)] for key in ("paths", "names", "groups")
    )
    places, centers = (np.concatenate([getattr(scene, key) for scene in scenes]) for key in ("places", "centers"))
    return Items(paths, names, groups, places, centers)


def find_scenes(root: Path, subsets: tuple[str, ...]) -> list[Path]:
    """All scenes, sorted; those of the `subsets` if there are any."""
    if not is_folder(root):
        raise UserError(f"data.root={root} is not a folder: {LAYOUT}")
    folders = list(_below(root, DEPTH))
    if not folders:
        there = first_few(sorted(entry.name for entry in root.iterdir()), 6) or "nothing"
        raise UserError(f"data.root={root} has no scenes, but {there}: {LAYOUT}")
    names = {os.path.relpath(folder.parent, root) for folder in folders}
    if unknown := [name for name in subsets if name not in names]:
        raise UserError(
            f"data.subsets={','.join(unknown)} is not in {root}; sub-sets there: {first_few(sorted(names), 8)}"
        )
    return [folder for folder in folders if not subsets or os.path.relpath(folder.parent, root) in subsets]


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """A scene has images or one of the files, so that one that lacks the rest is named and not passed over."""
    if depth < DEPTH and any((folder / name).exists() for name in ("rgb", GT, CAMERA, INFO)):
        yield folder
    elif depth:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir() and not is_junk(entry.name):
                yield from _below(Path(entry.path), depth - 1)


def read_models(root: Path) -> dict[int, np.ndarray]:
    """{number of a part: the eight corners of its model's box, (8, 3)}"""
    return _parsed(root / MODELS, _corners, "min_x, size_x and so on of each model")


def _read_scene(folder: Path, kind: Label, models: dict[int, np.ndarray] | None, on_error: OnError) -> Items:
    """The images of a scene, or with `models` the parts in them."""
    about: dict[str, dict[int, Any]] = {}
    if kind != "part":
        about[INFO] = _parsed(
            folder / INFO, partial(_class_name, kind=kind), f"{' or '.join(KEYS[kind])} of each image"
        )
    if models is not None:
        about[GT] = _parsed(folder / GT, _poses, "a list of obj_id, cam_R_m2c (9 numbers), cam_t_m2c (3) of each image")
        about[CAMERA] = _parsed(
            folder / CAMERA, lambda entry: _numbers(entry["cam_K"], 3, 3), "cam_K (9 numbers) of each image"
        )
    images = _images(folder, about, on_error)
    variant = re.fullmatch(r"(\d+)_\d+", folder.name)
    group = variant[1] if variant else folder.name
    if models is None:
        names, nothing = [about[INFO][number] for number in images], np.zeros((len(images), 4))
        return Items([*images.values()], names, [group] * len(names), nothing, nothing[:, :2])
    parts = [(number, pose) for number in images for pose in about[GT][number]]
    if unknown := sorted({pose.part for _, pose in parts} - models.keys()):
        raise UserError(
            f"{folder / GT} has part {unknown[0]}, of which {MODELS} says nothing; it has {first_few(models, 8)}"
        )
    names = [f"part{pose.part}" if kind == "part" else about[INFO][number] for number, pose in parts]
    cameras = np.array([about[CAMERA][number] for number, _ in parts]).reshape(-1, 3, 3)
    rotations = np.array([pose.rotation for _, pose in parts]).reshape(-1, 3, 3)
    translations = np.array([pose.translation for _, pose in parts]).reshape(-1, 3)
    corners = np.array([models[pose.part] for _, pose in parts]).reshape(-1, 8, 3)
    places = project(corners, rotations, translations, cameras)
    return Items([images[number] for number, _ in parts], names, [group] * len(parts), places, cameras[:, :2, 2])


def project(corners: np.ndarray, rotations: np.ndarray, translations: np.ndarray, cameras: np.ndarray) -> np.ndarray:
    """Where the rectangle around the corners of each part's box lies in its image: left, top, right, bottom, (M, 4).

    A point x of the model is at R x + t before the camera, and at u = K (R x + t), divided by its third coordinate, in
    the image (BOP's format). NaN of a part that is not wholly before the camera.

    Args:
        corners: (M, 8, 3). rotations: R, (M, 3, 3). translations: t, (M, 3). cameras: K, (M, 3, 3).
    """
    points = np.einsum("mij,mcj->mci", rotations, corners) + translations[:, None]  # (M, 8, 3)
    pixels = np.einsum("mij,mcj->mci", cameras, points)  # (M, 8, 3)
    before = ((points[..., 2:] > 0) & (pixels[..., 2:] > 0)).all(1)  # (M, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = pixels[..., :2] / pixels[..., 2:]  # (M, 8, 2)
    return np.where(before, np.concatenate([pixels.min(1), pixels.max(1)], axis=1), np.nan)


def _parsed(path: Path, parse: Callable[[Any], Any], expected: str) -> dict[int, Any]:
    """{number: what `parse` makes of its entry} of a JSON file of entries by number."""
    where = ""
    try:
        with open_regular(path) as file:
            entries, parsed = json.load(file), {}
        for key, entry in entries.items():
            where = f" of {key}"
            parsed[int(key)] = parse(entry)
        return parsed
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {LAYOUT}") from None
    except WRONG as error:
        raise UserError(f"cannot read {path}{where}: {cut(repr(error))}; expected {expected}") from None


def _corners(model: dict) -> np.ndarray:
    """The eight corners of the model's box, (8, 3)."""
    low, size = (_numbers([model[f"{end}_{axis}"] for axis in "xyz"], 3) for end in ("min", "size"))
    return low + size * np.array([*product((0, 1), repeat=3)])


class Pose(NamedTuple):
    """How a part lies before the camera."""

    part: int
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,)


def _poses(entry: list[dict]) -> list[Pose]:
    """Of the parts in an image; `scene_gt_world.json` and the camera's own pose are not needed."""
    each = [Pose(int(o["obj_id"]), _numbers(o["cam_R_m2c"], 3, 3), _numbers(o["cam_t_m2c"], 3)) for o in entry]
    return [pose for pose in each if pose.part < OTHERS]


def _class_name(entry: dict, kind: Label) -> str:
    """A number of kind carrier becomes `carrier2`; a list is joined by +."""
    value = next((entry[key] for key in KEYS[kind] if key in entry), None)
    if value in (None, "", []):
        raise ValueError(f"it has {first_few(entry, 6)}")
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{kind}{text}" if re.match(r"-?\d", text) else text


def _numbers(values: list, *shape: int) -> np.ndarray:
    """float64 of this shape, row by row."""
    array = np.asarray(values, np.float64).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{shown(values)} is not finite")
    return array


def _images(scene: Path, about: dict[str, dict[int, Any]], on_error: OnError) -> dict[int, str]:
    """{number: path} of a scene's images, which must be those that the files name; `skip` has missing ones found with
    the broken ones."""
    folder, images = scene / "rgb", {}
    for path in find_images(folder):
        stem = Path(path).stem
        if not stem.isdecimal() or int(stem) in images:
            raise UserError(f"{path} is not called by a number of its own: {LAYOUT}")
        images[int(stem)] = path
    if not images:
        raise UserError(f"there are no images in {folder}: {LAYOUT}")
    for name, entries in about.items():
        if unnamed := sorted(images.keys() - entries.keys()):
            raise UserError(
                f"{scene / name} says nothing of rgb/{Path(images[unnamed[0]]).name} and {len(unnamed) - 1} other "
                "images: unpack the scene again"
            )
        missing = {number: str(folder / f"{number:06d}.png") for number in entries.keys() - images.keys()}
        if missing and on_error == "fail":
            first = f"rgb/{Path(min(missing.values())).name}"
            raise UserError(
                f"{len(missing)} images that {scene / name} names are not there, the first is {first}: "
                "unpack the scene again, or set data.on_error=skip"
            )
        images |= missing
    return dict(sorted(images.items()))
