"""Which patches of two images correspond to a backbone, and where it sees a point again.

    python eval.py task=correspondence checkpoint=runs/simclr_scavport/last.pt pairs=6
    python eval.py task=correspondence backbone.name=mobilenet_v2 backbone.weights=weights.pth images=a.png,b.png \\
        point=40,60

Pairs are two files, or images of a data set, each with the one whose features are nearest. Patches that are each
other's nearest are joined by lines; with `point` (x,y in pixels of the first image) a map has the cosine of that patch
with all patches of the second. Beside each pair stands how many patches are found again in the mirror image, where the
right answer is known. Writes pair_<n>.png, matches.csv (in pixels of the files), results.json and TensorBoard events to
eval_correspondence/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

import csv
import os
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data import DataConfig, Geometry, build_geometry
from data.dataset import Dataset
from data.loading import Loader
from data.normalize import normalize
from evaluation.features import extract
from evaluation.frozen import FrozenConfig, OpenedBackbone, open_backbone
from evaluation.inspect import correspondence, embedding
from evaluation.inspect.dense import DenseFeatures, Stage
from evaluation.tasks.data import open_splits
from plots.correspondence import Likeness, likeness_image, match_image
from plots.heatmaps import save
from runtime import distributed
from runtime.config import pick
from runtime.errors import UserError
from runtime.files import whole_file
from runtime.values import Few, NonNegativeFloat, PathText, Seed
from search.nearest import nearest

LINES = 6  # squares along a side of the first image, from each of which one line is drawn
LOOKED_AT = 2000  # images of a data set, drawn at random, that pairs are chosen from


@dataclass(kw_only=True)
class Config(FrozenConfig):
    data: DataConfig | None = None  # the images; with `images` only how they become inputs, none: 224 x 224 pixels
    images: list[PathText] = field(default_factory=list)  # two files; none: pairs of the data set
    split: str = "test"  # of the data set: train, test or another that it has
    pairs: Few = 4  # of the data set, drawn at random
    point: tuple[NonNegativeFloat, NonNegativeFloat] | None = None  # x,y in the first image's own pixels
    seed: Seed = 0  # of the pairs drawn, and of the random weights of a backbone without others
    stages: tuple[Stage, ...] = ()  # of the backbone; none: 2,3, of a ViT what comes out at its end


def run(cfg: Config) -> None:
    check(cfg)
    found = open_backbone(cfg, "correspondence")
    geometry = Geometry(224, 224) if cfg.data is None else build_geometry(cfg.data)
    dataset = Dataset("test", geometry, "", cfg.images, [0, 0], ["image"]) if cfg.images else split_of(cfg)
    pairs = [(0, 1)] if cfg.images else choose(cfg, found, dataset)
    dense = DenseFeatures(found.backbone.eval(), cfg.stages)
    found.log.say(f"eval_correspondence: {cfg.backbone.name} ({found.weights})")
    results, rows = [], []
    for old in found.folder.glob("pair_*.png") if distributed.is_main() else ():  # of a run before, of other images
        old.unlink()
    for number, pair in enumerate(pairs, 1) if distributed.is_main() else ():
        numbers, its_rows = compare(cfg, found, dense, dataset, pair, number)
        results.append(numbers)
        rows += its_rows
        text = f"{numbers['mutual']} mutual pairs of {numbers['patches']} patches, mean cosine {numbers['cosine']:.3f}"
        found.log.say(f"{numbers['first']} and {numbers['second']}: {text}; {mirror(numbers['found_in_mirror'])}")
    if distributed.is_main():
        with whole_file(found.folder / "matches.csv") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["pair", "first", "second", "x_first", "y_first", "x_second", "y_second", "cosine"])
            table.writerows(rows)
    found.write({"pairs": results})


def check(cfg: Config) -> None:
    """Refuse what cannot work, as far as the config alone tells."""
    if len(cfg.images) not in (0, 2):
        raise UserError(f"images={','.join(cfg.images)} must be two files, a,b")
    if not cfg.images and cfg.data is None:
        raise UserError("task=correspondence needs images=a.png,b.png, or a data set: data.name, data.root, data.size")
    for path in cfg.images:
        if not os.path.isfile(path):
            raise UserError(f"images: {path} is not a file")


def split_of(cfg: Config) -> Dataset:
    sets = open_splits(cfg.data)[0]
    return pick(sets, cfg.split, "split")


def choose(cfg: Config, found: OpenedBackbone, dataset: Dataset) -> list[tuple[int, int]]:
    """Positions of images drawn at random, each with the one of nearest features. All ranks call it."""
    assert cfg.data is not None
    positions = embedding.draw({cfg.split: dataset}, LOOKED_AT, cfg.seed)[cfg.split]
    if len(positions) < 2:
        raise UserError(f"split={cfg.split} has one image only, and a pair needs two")
    load = {"indices": positions, "cache": cfg.data.cache, "workers": cfg.data.workers}
    loader = Loader(dataset, cfg.batch_size, found.device, **load)
    space = embedding.unit(extract(found.backbone, loader, progress="features")[0])
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.pairs]
    _, other = nearest(space[order], space, exclude=(order, torch.arange(len(space))))
    return list(zip(positions[order].tolist(), positions[other[:, 0]].tolist()))


def compare(
    cfg: Config, found: OpenedBackbone, dense: DenseFeatures, dataset: Dataset, pair: tuple[int, int], number: int
) -> tuple[dict, list[list]]:
    """Draw one pair; its numbers for results.json, and the rows of its matches."""
    images = torch.stack([dataset.image(i) for i in pair])  # (2, 3, H, W) uint8
    sizes, names = dataset.sizes[list(pair)], tuple(cfg.images or (dataset.names[i] for i in pair))
    maps = dense(normalize(images.to(found.device), dense.normalization)).cpu()  # (2, C, h, w)
    grid, geometry = tuple(maps.shape[2:]), dataset.geometry
    first, second = (correspondence.patches(some) for some in maps)
    matches = correspondence.mutual_matches(first, second)
    places = torch.cat([correspondence.places_of(side, grid, geometry) for side in matches[:2]], 1)  # (M, 4)
    drawn = correspondence.spread(places[:, :2], max(geometry.height, geometry.width) / LINES)
    numbers = {"first": names[0], "second": names[1], "patches": len(first), "mutual": len(matches.first)}
    numbers |= {"cosine": float(matches.cosine.mean())}
    numbers |= {"found_in_mirror": correspondence.found_in_mirror(dense, images[0].to(found.device))}
    short = [os.sep.join(name.split(os.sep)[-2:]) for name in names]  # folder and file
    about = {"names": short, "title": f"Patches that correspond: {cfg.backbone.name}"}
    note = (
        f"{len(drawn)} of {numbers['mutual']} pairs that are each other's nearest; {mirror(numbers['found_in_mirror'])}"
    )
    sheets = [match_image(images[0], images[1], places[drawn], **about, note=note)]
    if cfg.point is not None:
        likeness = like_point(cfg.point, maps, dataset, pair[0])
        peak = dataset.geometry.to_original_point(torch.tensor([likeness.peak]), sizes[1:])[0].flip(0).tolist()
        numbers |= {"point": list(cfg.point), "most_like_it": peak, "its_cosine": float(likeness.cosines.max())}
        about["title"] = "Where the second image looks like a point of the first"
        sheets.append(likeness_image(images[0], images[1], likeness, **about))
    sheet = below(sheets)
    save(sheet, found.folder / f"pair_{number}.png")
    found.log.image(f"correspondence/{number}", pil_to_tensor(sheet))
    ends = [geometry.to_original_point(places[:, i : i + 2], sizes[i // 2].expand(len(places), 2)) for i in (0, 2)]
    columns = torch.cat([ends[0].flip(1), ends[1].flip(1), matches.cosine[:, None].double()], 1).tolist()  # x before y
    rows = [[number, *names, *(f"{at:.1f}" for at in row[:4]), f"{row[4]:.4f}"] for row in columns]
    return numbers, rows


def like_point(point: tuple[float, float], maps: Tensor, dataset: Dataset, first: int) -> Likeness:
    """maps (2, C, h, w) of a pair; the point is x, y in the original of image `first`.

    Raises:
        UserError: the point is not in the image, or not in what the network gets of it.
    """
    geometry, (high, wide) = dataset.geometry, dataset.sizes[first].tolist()
    y, x = correspondence.to_input_point((point[1], point[0]), geometry, (high, wide))
    if not (point[0] < wide and point[1] < high and 0 <= y < geometry.height and 0 <= x < geometry.width):
        where = f"{dataset.names[first]}, which is {wide} x {high} (width x height)"
        raise UserError(f"point={point[0]:g},{point[1]:g} lies outside {where}, or outside its crop")
    height, width = maps.shape[2:]
    row, column = int(y / geometry.height * height), int(x / geometry.width * width)
    cosines = correspondence.cosine_map(maps[1], maps[0, :, row, column])
    peak = correspondence.places_of(cosines.flatten().argmax()[None], (height, width), geometry)[0].tolist()
    return Likeness((y, x), cosines, (peak[0], peak[1]))


def mirror(share: float) -> str:
    return f"{share:.0%} found again in the mirror image"


def below(sheets: list[Image.Image]) -> Image.Image:
    paper = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    for number, sheet in enumerate(sheets):
        paper.paste(sheet, (0, sum(above.height for above in sheets[:number])))
    return paper
