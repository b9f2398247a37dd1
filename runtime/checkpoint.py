"""Run folders and checkpoints: written atomically, read without running code, resumed when configs agree."""

import argparse
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import yaml

from runtime import distributed, integrity
from runtime.config import completed, flatten
from runtime.errors import UserError, cut, reason
from runtime.files import LOCK, REMOVING, empty, lock, open_regular, unlock, whole_file
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
ANEW = "resume=never starts this run from the beginning"


def save(path: str | Path, parts: dict, **about) -> None:
    """Write {name: part.state_dict()} and `about` (step, config, ...) on rank 0, atomically, with their checksum.

    Every rank calls it: a part that is spread over processes is gathered by its state_dict. A temporary file, fsync,
    then rename: a process killed in between leaves the old checkpoint or the new one.
    """
    state = {name: part.state_dict() for name, part in parts.items()} | about | {"version": code_version()}
    if not distributed.is_main():
        return
    state |= {"checksum": integrity.checksum(state)}
    with whole_file(path, "wb", durable=True) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer loses the system's error, which the next write meets again
            file.write(bytes(2**20))
            raise UserError(f"cannot write {path}: {error}; nothing under that name was changed") from None


def file_of(path: str | Path) -> Path:
    """The checkpoint that a path names: the file itself, or last.pt of a run folder."""
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def folder_of(path: str | Path) -> Path:
    """The run folder that a path names: the folder itself, or that of its last.pt."""
    return Path(path).parent if Path(path).name == LAST else Path(path)


def restore(state: dict, parts: dict, path: str | Path, total: int | None = None) -> None:
    """The inverse of `save` for its parts.

    Args:
        path: of the checkpoint. total: steps of the run, where it has steps.

    Raises:
        UserError: a part is missing, or has other keys, types or shapes than here, or values that are not finite.
    """
    for name, part in parts.items():
        faults = [f"{name} is missing"] if name not in state else integrity.faults_of_part(part, state[name], name)
        if not faults:
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # a part of the script's own may raise anything
                faults = [f"{name}: {error}"]
        if faults:
            raise UserError(f"{path} does not fit this run: {integrity.first_two(faults)}; {ANEW}")
    if total is not None and not 0 <= state.get("step", -1) <= total:
        raise UserError(f"{path} is of step {state.get('step')}, this run has {total}; {ANEW}")


def read(path: str | Path, advice: str = ""):
    """What a file of torch.save holds, on the CPU; of a run folder its last.pt. `weights_only` unpickles tensors and
    plain values and runs nothing. A checkpoint of ours must have its checksum, which is left out of what is returned;
    other files must have those of the zip format.

    Args:
        advice: what to do about a file that is damaged, where that is not to get it again.

    Raises:
        UserError: no such file, not a file of torch.save, a damaged one, or one that holds more than data.
    """
    if Path(path).is_dir():
        path = file_of(path)
        if not path.exists():
            raise UserError(f"{path.parent} is a folder without {LAST}: name a file, or a run's folder that has one")
    instead, advice = advice or "save the state_dict alone with torch.save", advice or advice_on(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        wrong = integrity.damage(path, contents=False)
        state = None if wrong else _unpickled(path, advice, instead)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    stored = state.pop("checksum", None) if isinstance(state, dict) else None
    if not wrong and integrity.size_of(state) > 16 * size + 2**30:  # tensors may share values, but not without end
        wrong = f"claims more than its {size:,} bytes"
    elif not wrong and stored is None:
        wrong = integrity.damage(path, contents=True)
    elif not wrong and not integrity.is_checksum(stored, state):
        wrong = "is damaged or was edited: its checksum is that of other contents"
    if wrong:
        raise UserError(f"{path} {wrong}; {advice}")
    return state


def _unpickled(path: str | Path, advice: str, instead: str):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official DINO's `args`: attributes, no code
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file torch.load raises any of nine types, KeyError among them
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a position before the file's begin
            raise
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"{path} holds a Python object ({cut(forbidden[1])}), and reading it could run code: refused"
            raise UserError(f"{what}; {instead}") from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"there is not enough memory to read {path}") from None
        raise UserError(f"{path} was not written by torch.save or is truncated; {advice}") from None


def advice_on(path: str | Path) -> str:
    """What to do about a file that is damaged: nobody can download a checkpoint of a run here."""
    ours = os.path.exists(Path(path).parent / "config.yaml")
    return "take another checkpoint, or run it again" if ours else "download or copy it again"


def load(path: str | Path, advice: str = "") -> dict:
    """One of our checkpoints, as `save` wrote it; what `integrity.KINDS` names, config included, is of that kind."""
    state, path = read(path, advice), file_of(path)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        ending = f"; {advice}" if advice else ""
        raise UserError(f"{path} is not a checkpoint of a training script{ending}")
    kinds = {key: kind for kind, keys in integrity.KINDS.items() for key in keys if key in state}
    if wrong := [key for key, kind in kinds.items() if not integrity.is_a(kind, state[key])]:
        what = f"{path} was edited: its {first_few(wrong)} cannot be what was saved"
        raise UserError(f"{what}; {advice or advice_on(path)}")
    return state


def section(state: dict, name: str, path: str | Path) -> dict:
    """A section of a checkpoint's config, as raw values.

    Raises:
        UserError: it has none.
    """
    if not isinstance(found := state["config"].get(name), dict):
        raise UserError(f"the config in {path} has no section {name}: name a checkpoint of a script that has one")
    return found


def read_object(path: str | Path) -> dict | None:
    """The JSON object in a file; None where there is none, or a damaged one: cut, no UTF-8, with NaN, another type."""

    def number(text: str) -> float:
        if not abs(value := float(text)) < float("inf"):
            raise ValueError
        return value

    try:
        with open_regular(path) as file:
            found = json.loads(file.read().decode(), parse_constant=number, parse_float=number)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
    "validation": "validation images",
    "unlabelled": "unlabelled images",
    "classes": "names of the classes",
    "tested": "test images",
    "masks": "masks of the test images, or their sizes in bytes,",
}


def require_same_images(state: dict, images: dict[str, list], folder: Path) -> None:
    """UserError when a run that resumes was begun with other images, or has results of others.

    `images` are names, by the keys of `IMAGES`; the test images and their masks are compared once there are results.
    """
    finished = read_object(folder / "results.json") is not None
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
        state = load(folder / LAST, ANEW)
        before = completed(schema, state["config"]) if schema else state["config"]
        if keys := config_changes(before, config):
            old, new = flatten(before), flatten(config)
            changes = first_few([f"{cut(k, 40)}: {cut(str(old.get(k)), 40)} -> {new.get(k)}" for k in keys], 4)
            raise UserError(
                f"{folder} holds a run with another config ({changes}); "
                "choose another run_name, or resume=never to start this one from the beginning"
            )
        require_same_images(state, images, folder)
    goes_on_from(state.get("version") if state else None)
    other = another_version(state.get("version")) if state else ""
    # of a finished run, Log.repeat_results reports it
    if other and distributed.is_main() and read_object(folder / "results.json") is None:
        print(f"{folder} resumes from a checkpoint of {other}; resume=never starts from the beginning", file=sys.stderr)
    distributed.barrier()  # all ranks must have looked before rank 0 changes anything
    if distributed.is_main():
        try:
            if resume == "never" or half_removed:
                if {*os.listdir(folder)} - {LOCK} and not half_removed and not (folder / "config.yaml").exists():
                    raise UserError(f"{folder} is not a run folder (it has no config.yaml), so it is not removed")
                empty(folder)
            with whole_file(folder / "config.yaml", durable=True) as file:
                yaml.safe_dump(config, file, sort_keys=False)
        except OSError as error:
            raise UserError(f"cannot write run folder {cut(str(folder))}: {reason(error)}") from None
    distributed.barrier()
    return state


def last_good(folder: Path) -> str:
    """What a failed run can go back to, in words."""
    return f"the last good checkpoint is {folder / LAST}" if (folder / LAST).exists() else "there is no checkpoint yet"


def keep_copy(folder: str | Path, step: int, count: int) -> None:
    """Keep this step's last.pt as step_<step>.pt and, with it, the `count` newest such copies."""
    if count and distributed.is_main():
        copy = Path(folder) / f"step_{step:08d}.pt"
        with open(Path(folder) / LAST, "rb") as last, whole_file(copy, "wb", durable=True) as file:
            shutil.copyfileobj(last, file)
        for path in sorted(Path(folder).glob("step_*.pt"))[:-count]:
            path.unlink()
