"""Draw the demo set: procedural images in the layouts of ScavPort, ScavPortAnom and Condition.

    python -m data.demo datasets/demo [seed=0] [scale=1.0]

    scavport/{train,test}/<class>/NNNN.jpg                       8 classes, 100 + 40 images each
    scavport_anom/train/good, test/{good,outlier}/NNNN.jpg       160, 60 + 60 images, no masks
    condition/<subset>/train/good, test/{good,<defect>}/NNNN.png 120, 50 + 3 x 20 images, subsets liner and rings
    condition/<subset>/ground_truth/<defect>/NNNN_mask.png       0 or 255

An image depends on the seed and its own path only: any number of processes draws the same bytes, and a smaller `scale`
draws the first images of every folder. Images are 96 x 128 to 144 x 160 pixels (height x width).
"""

from runtime.threads import cpu_count

import io
import json
import multiprocessing
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.demo.canvas import Canvas
from data.demo.condition import CONDITIONS, draw
from data.demo.light import expose, sense, soil
from data.demo.outliers import outlier
from data.demo.parts import PARTS, SEEN_PARTS
from data.worker_processes import START
from runtime import signals
from runtime.checkpoint import read_object
from runtime.errors import UserError, cut, reason
from runtime.files import remove_unfinished, temporary_name

VERSION = 1  # raise it when the images change
VIEWS = {"scavport": {"turn": 0.6, "zoom": (0.75, 1.5), "shift": 0.3, "tilt": 0.25},
         "scavport_anom": {"turn": 0.35, "zoom": (0.85, 1.25), "shift": 0.2, "tilt": 0.2}}  # fmt: skip


def layout(scale: float) -> list[str]:
    """The paths of all images, masks aside, relative to the set's root."""
    folders = {}
    for name in sorted(PARTS):
        folders |= {f"scavport/train/{name}": 100, f"scavport/test/{name}": 40}
    folders |= {"scavport_anom/train/good": 160, "scavport_anom/test/good": 60, "scavport_anom/test/outlier": 60}
    for subset, defects in CONDITIONS.items():
        folders |= {f"condition/{subset}/train/good": 120, f"condition/{subset}/test/good": 50}
        folders |= {f"condition/{subset}/test/{defect}": 20 for defect in defects}
    return [f"{folder}/{k:04d}.{'png' if folder.startswith('condition') else 'jpg'}"
            for folder, count in folders.items() for k in range(max(2, round(count * scale)))]  # fmt: skip


def render(path: str, seed: int) -> tuple[Image.Image, Image.Image | None]:
    """The image that belongs at `path` (relative to the root) and its mask, if it has one."""
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    size = int(rng.integers(96, 145)), int(rng.integers(128, 161))
    task, *folders, name, file = path.split("/")
    if task == "condition":
        subset = folders[0]
        _, image, mask = draw(subset, None if name == "good" else name, rng, size)
        return sense(image, rng), None if name == "good" else Image.fromarray(mask.astype(np.uint8) * 255)
    canvas = Canvas(rng, size, **VIEWS[task])
    if name == "outlier":
        outlier(canvas, rng, int(file[:4]))
    else:
        PARTS[str(rng.choice(SEEN_PARTS)) if name == "good" else name](canvas, rng)
        soil(canvas, rng)
    return expose(canvas, rng), None


def write(path: str, root: Path, seed: int) -> None:
    """Render one image and save it, with its mask, under `root`."""
    image, mask = render(path, seed)
    place = root / path
    images = {place: image}
    if mask is not None:
        images[place.parents[2] / "ground_truth" / place.parent.name / f"{place.stem}_mask.png"] = mask
    for place, image in images.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()  # Pillow does not notice when a full disk takes only a part of a JPEG file
        image.save(packed, "JPEG" if place.suffix == ".jpg" else "PNG", quality=92)  # which PNG does not have
        place.write_bytes(packed.getvalue())


def generate(root: str | Path, *, seed: int = 0, scale: float = 1.0, workers: int | None = None) -> Path:
    """Write the demo set to `root` with `workers` processes (None: one per core; 0: this one) and return `root`.

    The folder appears only when complete; a complete set of the same seed, scale and version is left alone. Raises
    `UserError` when `root` holds anything else, or cannot be written.
    """
    if seed < 0 or not scale > 0:
        raise UserError(f"demo set: seed={seed} scale={scale}: the seed must be at least 0 and the scale above 0")
    root = Path(root)
    identity = {"version": VERSION, "seed": seed, "scale": scale}
    if is_there(root, identity):
        return root
    if workers is None:
        workers = cpu_count()
    paths = layout(scale)
    unfinished = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(root.parent)
        unfinished = temporary_name(root)
        unfinished.mkdir()
        job = partial(write, root=unfinished, seed=seed)
        bar = partial(tqdm, total=len(paths), desc=f"drawing {root}", unit=" images")
        if workers:
            start = multiprocessing.get_context(START)
            pool = ProcessPoolExecutor(workers, start, initializer=signals.obey_parent)
            try:
                with signals.blocked():  # its processes leave it to this one to end them, also while they start
                    drawn = pool.map(job, paths, chunksize=8)
                for _ in bar(drawn):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
        else:
            for path in bar(paths):
                job(path)
        (unfinished / "demo.json").write_text(json.dumps(identity) + "\n")
        if not is_there(root, identity):  # another process may have been quicker
            unfinished.rename(root)
    except OSError as error:
        raise UserError(f"cannot write the demo set {cut(str(root))}: {reason(error)}; nothing is left of it") from None
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def is_there(root: Path, identity: dict) -> bool:
    """Whether `root` holds the complete set `identity`; raises `UserError` when it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if (found := read_object(root / "demo.json")) is None:
        raise UserError(f"{root} exists and is not a demo set: move it away or name another folder")
    if found != identity:
        what = f"{cut(str(found))}, wanted {identity}"
        raise UserError(f"{root} holds another demo set ({what}): remove it or name another folder")
    return True


def main(argv: list[str]) -> None:
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise UserError("no folder given: python -m data.demo ROOT [seed=0] [scale=1.0]")
    options = {"seed": 0, "scale": 1.0}
    for word in argv[1:]:
        key, _, value = word.partition("=")
        if key not in options:
            raise UserError(f"unknown option {word!r}: python -m data.demo ROOT [seed=0] [scale=1.0]")
        try:
            options[key] = type(options[key])(value)
        except ValueError:
            raise UserError(f"{word}: {key} must be of type {type(options[key]).__name__}") from None
    print(f"demo set in {generate(argv[0], **options)}")
