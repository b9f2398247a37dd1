"""What task=attention and task=gradcam have in common: the network of a run, the images, the numbers beside each map,
and what is written."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import DataConfig, build_dataset, build_geometry, settled
from data.dataset import Dataset
from data.image_files import find_images
from data.images import decode, image_size
from data.normalize import normalization_of, normalize
from data.splits import evenly
from evaluation.anomaly.prediction import load_run
from evaluation.classify import load_classifier_run
from evaluation.features import stored_sections
from evaluation.frozen import task_folder
from evaluation.inspect.faithfulness import center_map, enlarged, faithfulness, localization, random_map
from evaluation.inspect.gradcam import Target, backbone_of, target_of
from evaluation.tables import csv_table, markdown_table
from models.backbones.build import BackboneConfig, build_backbone
from plots.heatmaps import save
from plots.saliency import Panel, Row, saliency_sheet
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.files import whole_file
from runtime.log import Log
from runtime.values import Few, PathText, PositiveInt, Seed
from runtime.version import code_version

REPLICATES = 1000  # of the bootstrap over images
RANDOM, CENTER = "random", "center"  # the baselines


@dataclass(kw_only=True)
class SaliencyConfig:
    task: str  # this one
    data: DataConfig  # the images, those of its split test, and how they become inputs
    backbone: BackboneConfig  # of a run: its own
    checkpoint: PathText | None = None  # a run folder of any training script, or a checkpoint in it
    images: PathText | None = None  # an image or a folder, in place of the data set
    most: PositiveInt = 64  # images that are measured, spread evenly over all
    shown: Few = 8  # of these, on the sheet
    batch_size: PositiveInt = 32  # images per forward
    seed: Seed = 0  # of random maps, equally salient pixels, the bootstrap, and random weights
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it, where no checkpoint says another


class Loaded(NamedTuple):
    """What is looked at: a backbone, or the classifier or detector of a run with its checkpoint's other values."""

    network: nn.Module  # in eval mode
    state: dict
    normals: Dataset | None = None  # the training set of a detector


class Seen(NamedTuple):
    """An image that is looked at."""

    name: str
    pixels: Tensor  # uint8 (3, H, W)
    valid: Tensor | None  # bool (1, H, W) on the network's device, False in padding; None: there is none
    mask: Tensor | None  # bool (H, W), of its defect, where that is known


class Looked(NamedTuple):
    """What a task makes of an image: maps that are measured, and panels that are drawn alone."""

    maps: dict[str, Tensor]  # float (h, w) or (H, W)
    parts: list[Panel]  # before them on the sheet


def look(
    cfg: SaliencyConfig,
    title: str,
    look_at: Callable[[Loaded, Target, Tensor, Seen], Looked],
    class_name: str | None = None,
    reference: str | None = None,
) -> None:
    """Measure and draw the maps that `look_at` makes of each image, and write them into the run folder.

    Args:
        title: of the sheet.
        look_at: (what is looked at, target, normalized image (1, 3, H, W), the image) -> maps.
        class_name, reference: what the maps should explain, as for `target_of`; the reference is a file.
    """
    began, device = time.perf_counter(), distributed.setup(cfg.device)
    if distributed.world_size() > 1:
        raise UserError(f"task={cfg.task} runs in one process: start it without torchrun")
    if cfg.data.tile:
        raise UserError(f"task={cfg.task} looks at whole images, not at tiles: set data.tile=0")
    cfg.data, folder = settled(cfg.data), task_folder(cfg, cfg.task)
    loaded, (count, images) = load_network(cfg), images_of(cfg, device)
    loaded.network.to(device, memory_format=torch.channels_last)
    own, other = normalization_of(loaded.network), None
    if reference is not None:
        other = normalize(decode(reference, build_geometry(cfg.data))[None].to(device), own)  # (1, 3, H, W)

    def see(seen: Seen) -> tuple[Tensor, Target, Looked]:
        image = normalize(seen.pixels[None].to(device), own)
        explained = {"class_name": class_name, "reference": other, "valid": seen.valid}
        if loaded.normals is not None and reference is None:
            explained["texture"] = normal_texture(loaded, image, seen)
        target = target_of(loaded.network, image, state=loaded.state, **explained)
        return image[0], target, look_at(loaded, target, image, seen)

    see(first := next(images))  # so that a mistake is met before the folder is opened
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    names = " on ".join(dict.fromkeys(type(part).__name__ for part in (loaded.network, backbone_of(loaded.network))))
    log.say(f"{cfg.task}: {count} images, {names}")
    numbers: list[dict[str, Any]] = []
    rows: list[Row] = []
    drawn = {*evenly(count, cfg.shown).tolist()}
    for i, seen in enumerate(tqdm(chain([first], images), total=count, desc=cfg.task, unit="image", leave=False)):
        image, target, looked = see(seen)
        maps, measured = measure(looked.maps, image, target, seen, cfg, i)
        numbers += [{"image": seen.name, "explains": target.what, "map": name} | measured[name] for name in measured]
        if i in drawn:
            panels = [Panel(maps[name], None, [name, *numbers_of(measured, name)]) for name in looked.maps]
            rows.append(Row(seen.pixels, seen.mask, seen.name, target.what.split(", "), [*looked.parts, *panels]))
    summary = summarize(numbers, cfg.seed)
    write(log, cfg.task, numbers, summary, saliency_sheet(rows, title, sheet_lines(summary)))
    about = {"task": cfg.task, "network": names, "n_images": count, "maps": summary}
    log.results(about | {"seconds": time.perf_counter() - began, "version": code_version()})
    distributed.cleanup()


def write(log: Log, task: str, numbers: list[dict], summary: dict, sheet: Image.Image) -> None:
    """The sheet and a row for each image and map as files, the sheet and the means in TensorBoard and the terminal."""
    table = markdown_table(*summary_table(summary))
    log.say(table)
    log.text(task, table)
    save(sheet, log.folder / f"{task}.png")
    log.image(task, pil_to_tensor(sheet))
    with whole_file(log.folder / f"{task}.csv") as file:
        file.write(csv_table([{key: v for key, v in row.items() if not isinstance(v, list)} for row in numbers]))


def load_network(cfg: SaliencyConfig) -> Loaded:
    """That of the checkpoint's run, else the backbone of the keys.

    Raises:
        UserError: keys of a backbone beside a run that has one inside its classifier or detector.
    """
    state = {"config": {}} if cfg.checkpoint is None else checkpoint.load(cfg.checkpoint)
    if not {"head", "detector"} & {*state["config"]}:
        torch.manual_seed(cfg.seed)
        return Loaded(build_backbone(cfg.backbone)[0].eval(), state)
    stored = config.build(BackboneConfig, stored_sections(cfg.checkpoint)["backbone"], "backbone.")
    if cfg.backbone != stored:
        what = "classifier" if "head" in state["config"] else "detector"
        raise UserError(f"{cfg.checkpoint} holds a {what} with a backbone of its own: remove the keys backbone.*")
    load = load_classifier_run if "head" in state["config"] else load_run
    network, _, state = load(Path(cfg.checkpoint), state=state)
    return Loaded(network, state, build_dataset(cfg.data, "train") if "detector" in state["config"] else None)


def images_of(cfg: SaliencyConfig, device: torch.device) -> tuple[int, Iterator[Seen]]:
    """How many images are looked at, and they: `most` of those below `images`, or of the data set's split test, in a
    set of normal and anomalous ones of the latter."""
    if cfg.images is None:
        dataset = build_dataset(cfg.data, "test")
        if dataset.defects is not None and dataset.labels.any():
            dataset = dataset.only(dataset.labels.nonzero()[:, 0].tolist())
        chosen = evenly(len(dataset), cfg.most).tolist()
        known = dataset.has_masks & dataset.mask_known & (dataset.labels > 0)  # (N,)

        def of_dataset() -> Iterator[Seen]:
            for i in chosen:
                mask = dataset.mask(i) if known[i] else None
                valid = dataset.inside(torch.tensor([i]), device)
                yield Seen(dataset.names[i], dataset.image(i), valid, mask)

        return len(chosen), of_dataset()
    place, geometry = Path(cfg.images), build_geometry(cfg.data)
    paths = find_images(place) if place.is_dir() else [str(place)]
    if not paths:
        raise UserError(f"there are no images in {place}")
    paths = [paths[i] for i in evenly(len(paths), cfg.most).tolist()]
    top = place if place.is_dir() else place.parent

    def of_files() -> Iterator[Seen]:
        for path in paths:
            valid = geometry.inside(torch.tensor([image_size(path)]), device)
            yield Seen(str(Path(path).relative_to(top)), decode(path, geometry), valid, None)

    return len(paths), of_files()


def normal_texture(loaded: Loaded, image: Tensor, seen: Seen) -> Tensor:
    """The training image that comes nearest, where the detector names one, else the first: (3, H, W) normalized."""
    nearest, names = loaded.network.examine(image, seen.valid).nearest_image, loaded.normals.names
    name = names[0] if nearest is None else loaded.state["names"][int(nearest)]
    pixels = loaded.normals.image(names.index(name) if name in names else 0)[None]
    return normalize(pixels.to(image.device), normalization_of(loaded.network))[0]


def measure(
    maps: dict[str, Tensor], image: Tensor, target: Target, seen: Seen, cfg: SaliencyConfig, number: int
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """The maps at the input's size (H, W) on the CPU, and of each and the baselines the numbers.

    Random maps have the grid of the first of `maps`, and a seed for each image.
    """
    size, seed = tuple(image.shape[1:]), cfg.seed + number
    grid = tuple(next(iter(maps.values())).shape)
    large = {name: enlarged(heat.float(), size).cpu() for name, heat in maps.items()}
    if seen.valid is not None:
        large = {name: heat.where(seen.valid[0].cpu(), heat.min()) for name, heat in large.items()}
    found = {}
    for name, heat in (large | {RANDOM: random_map(grid, size, seed), CENTER: center_map(size)}).items():
        about = {"texture": target.texture, "batch_size": cfg.batch_size, "seed": seed}
        numbers = faithfulness(image, heat.to(image.device), target.value, **about)
        found[name] = {"faithfulness": numbers.faithfulness} | numbers._asdict()
        if seen.mask is not None:
            found[name] |= localization(heat, seen.mask)._asdict()
    return large, found


def summarize(rows: list[dict], seed: int) -> dict[str, dict]:
    """{map: means over the images}: deletion, insertion, faithfulness with a 95 % interval of the percentile bootstrap
    over images, how often it is above the random map's, and of defects with masks `inside` and `hit`."""
    summary = {}
    for name in dict.fromkeys(row["map"] for row in rows):
        own, chance = ([row for row in rows if row["map"] == which] for which in (name, RANDOM))
        faithful = np.array([row["faithfulness"] for row in own])
        draws = np.random.default_rng(seed).integers(len(own), size=(REPLICATES, len(own)))
        low, high = np.percentile(faithful[draws].mean(1), (2.5, 97.5)).tolist()
        above = [one["faithfulness"] > other["faithfulness"] for one, other in zip(own, chance)]
        means = {key: float(np.mean([row[key] for row in own])) for key in ("deletion", "insertion", "faithfulness")}
        summary[name] = means | {"faithfulness_interval": [low, high]}
        summary[name] |= {"above_random": None if name == RANDOM else float(np.mean(above))}
        summary[name] |= {"intact": float(np.mean([row["deletion_curve"][0] for row in own]))}
        summary[name] |= {"removed": float(np.mean([row["deletion_curve"][-1] for row in own]))}
        if masked := [row for row in own if "hit" in row]:
            summary[name] |= {key: float(np.mean([row[key] for row in masked])) for key in ("inside", "hit")}
            summary[name] |= {"n_masked": len(masked)}
    return summary


def summary_table(summary: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that the terminal and TensorBoard show."""
    masked = any("hit" in found for found in summary.values())
    header = ["map", "deletion", "insertion", "faithfulness", "above random"]
    header += ["inside the mask", "peak inside"] if masked else []
    rows = []
    for name, found in summary.items():
        low, high = found["faithfulness_interval"]
        share = "-" if found["above_random"] is None else f"{found['above_random']:.0%}"
        row = [name, f"{found['deletion']:.3f}", f"{found['insertion']:.3f}"]
        row += [f"{found['faithfulness']:.3f} [{low:.3f}, {high:.3f}]", share]
        rows.append(row + ([f"{found['inside']:.3f}", f"{found['hit']:.3f}"] if masked else []))
    return header, rows


def numbers_of(measured: dict[str, dict], name: str) -> list[str]:
    """What stands below a map."""
    own, chance, middle = (rounded(measured[which]["faithfulness"]) for which in (name, RANDOM, CENTER))
    return [f"faithfulness {own}", f"(random {chance}, center {middle})"]


def rounded(number: float) -> str:
    """With two digits, and no minus before 0."""
    return f"{round(number, 2) + 0.0:.2f}"


def sheet_lines(summary: dict[str, dict]) -> list[str]:
    """Below the title: what the number beside a map means, and its means over all images."""
    means = ", ".join(f"{name} {rounded(found['faithfulness'])}" for name, found in summary.items())
    return [
        "faithfulness: area under the target as the least salient pixels go first, less that as the most salient do; "
        "0: the map knows nothing",
        f"mean over all images: {means}",
    ]
