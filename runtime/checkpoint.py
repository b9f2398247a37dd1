"""Run folders and checkpoints: written atomically, read without running code, resumed when configs agree."""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import yaml

from runtime import distributed
from runtime.config import completed, flatten
from runtime.errors import UserError
from runtime.files import LOCK, REMOVING, empty, lock, unlock, whole_file
from runtime.text import first_few
from runtime.version import another_version, code_version, goes_on_from

LAST = "last.pt"
# Keys that cannot change weights or metrics, so that they may differ when a run is resumed, and so may `device` between
# auto and what it is here, or another GPU. (`loss` alone, the mean since the last point of the curves, may move.)
CHANGES_NOTHING = (
    "runs",  # where things are
    "run_name",
    "data.root",  # as long as the images' names below it are the same, which the scripts check
    "data.on_error",  # likewise: an image that is left out is a name less
    "data.cache",  # how much memory things take
    "data.workers",
    "detector.memory_limit",
    "log_every",  # where the curves have points, and when checkpoints are written
    "save_every",
    "save.every",
    "save.keep_last",
    "resume",
)


def save(path: str | Path, parts: dict, **about) -> None:
    """Write {name: part.state_dict()} and `about` (step, config, ...) on rank 0, atomically.

    Every rank calls it: a part that is spread over processes is gathered by its state_dict. A temporary file, fsync,
    then rename: a process killed in between leaves the old checkpoint or the new one.
    """
    state = {name: part.state_dict() for name, part in parts.items()} | about | {"version": code_version()}
    if not distributed.is_main():
        return
    with whole_file(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer loses the system's error, which the next write meets again
            file.write(bytes(2**20))
            raise UserError(f"cannot write {path}: {error}; nothing under that name was changed") from None
        file.flush()
        os.fsync(file.fileno())


def file_of(path: str | Path) -> Path:
    """The checkpoint that a path names: the file itself, or last.pt of a run folder."""
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def folder_of(path: str | Path) -> Path:
    """The run folder that a path names: the folder itself, or that of its last.pt."""
    return Path(path).parent if Path(path).name == LAST else Path(path)


def restore(state: dict, parts: dict) -> None:
    """The inverse of `save` for its parts."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


def read(path: str | Path):
    """What a file of torch.save holds, on the CPU; of a run folder its last.pt. `weights_only` unpickles tensors and
    plain values and runs nothing.

    Raises:
        UserError: no such file, not a file of torch.save, or one that holds more than data.
    """
    if Path(path).is_dir():
        path = file_of(path)
        if not path.exists():
            raise UserError(f"{path.parent} is a folder without {LAST}: name a file, or a run's folder that has one")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official DINO's `args`: attributes, no code
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # for a damaged file torch.load raises any of eight types, KeyError among them
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds a Python object ({forbidden[1]}), and reading it could run code: refused; "
                "save the state_dict alone with torch.save"
            ) from None
        raise UserError(f"{path} was not written by torch.save or is truncated; download or copy it again") from None


def load(path: str | Path) -> dict:
    """One of our checkpoints, as `save` wrote it."""
    state = read(path)
    if not isinstance(state, dict) or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of train_ssl.py or train_anomaly.py")
    return state


def config_changes(old: dict, new: dict) -> list[str]:
    """The dotted keys, sorted, in which two resolved configs differ and that may change the result."""

    def settings(config: dict) -> dict:
        flat = {key: value for key, value in flatten(config).items() if key not in CHANGES_NOTHING}
        if flat.get("device") == "auto":
            flat["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return flat | ({"device": flat["device"].partition(":")[0]} if "device" in flat else {})

    old, new = settings(old), settings(new)
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))


IMAGES = {  # of a run, under these keys of its checkpoint
    "names": "training images",
    "learned": "numbers of the training images that are not held out",
    "elsewhere": "images of another set that it learns from",
    "tested": "test images",
    "masks": "masks of the test images, or their sizes in bytes,",
}


def require_same_images(state: dict, images: dict[str, list], folder: Path) -> None:
    """UserError when a run that resumes was begun with other images, or has results of others.

    `images` are names, by the keys of `IMAGES`; the test images and their masks are compared once there are results.
    """
    finished = (folder / "results.json").exists()
    for key, now in images.items():
        before = state.get(key, now)  # an older checkpoint does not have them
        if before == now or (key in ("tested", "masks") and not finished):
            continue
        changes = []
        for change, names in (("added", {*now} - {*before}), ("removed", {*before} - {*now})):
            if names:
                changes.append(f"{len(names)} {change}: {first_few(sorted(names))}")
        update = f" (with update={folder / LAST} where the detector can)" if "calibration" in state else ""
        raise UserError(
            f"the {IMAGES[key]} of {folder} changed since {'its results' if finished else 'it began'} "
            f"({'; '.join(changes) or 'their order'}): choose another run_name{update}, "
            "or resume=never to start this one from the beginning"
        )


def open_run(
    folder: str | Path,
    config: dict,
    *,
    schema: type | None = None,
    resume: str = "auto",
    images: dict[str, list] | None = None,
) -> dict | None:
    """Make and lock the run folder and write config.yaml; returns the state to go on from, or None for a fresh start.

    resume `auto`: a folder with a checkpoint of the same config goes on; one that `config_changes` tells apart is an
    error that names the keys, and so are other `images` (`require_same_images`). resume `never`: a run that is there
    is removed first. With `schema`, the config's dataclass, keys that the checkpoint is older than have their defaults.
    Call it when everything else in the config has been checked, since it may delete files. The folder stays locked
    until `Log.results`, `files.unlock` or the end of the process.
    """
    folder = Path(folder)
    if distributed.is_main():
        lock(folder)
    try:
        return _open_locked(folder, config, schema, resume, images or {})
    except BaseException:
        unlock(folder)
        raise


def _open_locked(folder: Path, config: dict, schema: type | None, resume: str, images: dict[str, list]) -> dict | None:
    distributed.barrier()  # no rank reads before the folder is this run's
    state, half_removed = None, os.path.exists(folder / REMOVING)
    if resume == "auto" and not half_removed and os.path.exists(folder / LAST):
        state = load(folder / LAST)
        before = completed(schema, state["config"]) if schema else state["config"]
        if keys := config_changes(before, config):
            old, new = flatten(before), flatten(config)
            changes = first_few([f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys], 4)
            raise UserError(
                f"{folder} holds a run with another config ({changes}); "
                "choose another run_name, or resume=never to start this one from the beginning"
            )
        require_same_images(state, images, folder)
    goes_on_from(state.get("version") if state else None)
    other = another_version(state.get("version")) if state else ""
    # of a finished run, Log.repeat_results reports it
    if other and distributed.is_main() and not (folder / "results.json").exists():
        print(f"{folder} resumes from a checkpoint of {other}; resume=never starts from the beginning", file=sys.stderr)
    distributed.barrier()  # all ranks must have looked before rank 0 changes anything
    if distributed.is_main():
        try:
            if resume == "never" or half_removed:
                if {*os.listdir(folder)} - {LOCK} and not half_removed and not (folder / "config.yaml").exists():
                    raise UserError(f"{folder} is not a run folder (it has no config.yaml), so it is not removed")
                empty(folder)
            with whole_file(folder / "config.yaml") as file:
                yaml.safe_dump(config, file, sort_keys=False)
        except OSError as error:
            raise UserError(f"cannot write run folder {folder}: {error.strerror}") from None
    distributed.barrier()
    return state


def last_good(folder: Path) -> str:
    """What a failed run can go back to, in words."""
    return f"the last good checkpoint is {folder / LAST}" if (folder / LAST).exists() else "there is no checkpoint yet"


def keep_copy(folder: str | Path, step: int, count: int) -> None:
    """Keep this step's last.pt as step_<step>.pt and, with it, the `count` newest such copies."""
    if count and distributed.is_main():
        copy = Path(folder) / f"step_{step:08d}.pt"
        with open(Path(folder) / LAST, "rb") as last, whole_file(copy, "wb") as file:
            shutil.copyfileobj(last, file)
        for path in sorted(Path(folder).glob("step_*.pt"))[:-count]:
            path.unlink()
