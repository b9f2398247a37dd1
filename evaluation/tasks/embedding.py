"""Images as points by PCA and t-SNE, and in TensorBoard's projector: what is alike to a backbone.

    python eval.py task=embedding checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=embedding data.root=/images backbone.weights=weights.pth perplexity=50

Features are brought to length 1, so that near means a large cosine, as for kNN. A plane shows only a part of that:
beside each picture stand its trustworthiness and the kNN accuracy in the plane and in the space of all features.
Writes points.png, thumbnails.png, points.csv, results.json and TensorBoard events with the projector to
eval_embedding/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

import csv
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.loading import Loader
from evaluation.features import extract
from evaluation.frozen import FrozenConfig, OpenedBackbone, open_backbone
from evaluation.inspect import embedding
from evaluation.tasks.data import open_splits
from plots.heatmaps import save
from plots.scatter import Cloud, scatter_image, thumbnail_map
from runtime import distributed
from runtime.config import pick
from runtime.files import whole_file
from runtime.values import PositiveFloat, Range, Seed


@dataclass(kw_only=True)
class Config(FrozenConfig):
    split: str = "all"  # of the data set: train, test or another that it has; all: every one
    images: Annotated[int, Range(least=4, most=10000)] = 2000  # of these at most, drawn at random
    perplexity: PositiveFloat = 30.0  # of t-SNE: about how many neighbors an image keeps close
    learning_rate: PositiveFloat | None = None  # of t-SNE; none: images / 48, at least 50
    seed: Seed = 0  # of the images drawn, of t-SNE, and of the random weights of a backbone without others


def run(cfg: Config) -> None:
    found = open_backbone(cfg, "embedding")
    sets = open_splits(cfg.data)[0]
    sets = sets if cfg.split == "all" else {cfg.split: pick(sets, cfg.split, "split")}
    places = embedding.draw(sets, cfg.images, cfg.seed)
    count = sum(map(len, places.values()))
    found.log.say(f"eval_embedding: {count} images, {cfg.backbone.name} ({found.weights})")
    parts, columns = [], {"class": [], "split": [], "path": []}
    for name, positions in places.items():
        load = {"indices": positions, "cache": cfg.data.cache, "workers": cfg.data.workers}
        loader = Loader(sets[name], cfg.batch_size, found.device, **load)
        parts.append(extract(found.backbone, loader, progress=f"{name} features")[0])
        kinds = sets[name].kinds
        columns["class"] += [kinds[i] for i in positions.tolist()]
        columns["split"] += [name] * len(positions)
        columns["path"] += [sets[name].full_name(i) for i in positions.tolist()]
    results = look(cfg, found, torch.cat(parts), columns, places, sets) if distributed.is_main() else {}
    found.write({"images": count, "split": cfg.split} | results)


def look(
    cfg: Config, found: OpenedBackbone, features: Tensor, columns: dict, places: dict[str, Tensor], sets: dict
) -> dict:
    """Everything that is drawn and written of features (N, D); returns the numbers."""
    names = sorted({*columns["class"]}, key=lambda kind: (kind != "good", kind))
    labels = torch.tensor([names.index(kind) for kind in columns["class"]])
    space = embedding.unit(features)
    components, shares = embedding.principal_components(space, 2)
    planes = {
        "pca": torch.nn.functional.pad(components, (0, 2 - components.shape[1])),  # (N, 2)
        "tsne": embedding.tsne(space, perplexity=cfg.perplexity, learning_rate=cfg.learning_rate, seed=cfg.seed),
    }
    numbers = {name: embedding.trust(space, plane, labels) for name, plane in planes.items()}
    titles = {"pca": f"PCA: {shares.sum():.0%} of the variance", "tsne": f"t-SNE, perplexity {cfg.perplexity:g}"}
    clouds = [Cloud(titles[name], in_words(numbers[name]), plane) for name, plane in planes.items()]
    about = f"{len(space):,} images, {cfg.backbone.name}"
    images = torch.stack(
        [embedding.thumbnail(sets[s], i) for s, positions in places.items() for i in positions.tolist()]
    )
    drawn = {  # by their names in TensorBoard, too
        "points": scatter_image(clouds, labels, names, f"{about}: what lies near what"),
        "thumbnails": thumbnail_map(planes["tsne"], images, f"{about}, by t-SNE"),
    }
    for name, image in drawn.items():
        save(image, found.folder / f"{name}.png")
        found.log.image(name, pil_to_tensor(image))
    with whole_file(found.folder / "points.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*columns, *(f"{name}_{axis}" for name in planes for axis in "xy")])
        points = torch.cat(list(planes.values()), 1).tolist()  # (N, 4)
        table.writerows([*texts, *(f"{x:.6g}" for x in at)] for *texts, at in zip(*columns.values(), points))
    embedding.project(found.log, "images", space, columns, images)
    found.log.say("; ".join(f"{cloud.title}: {cloud.note}" for cloud in clouds))
    return {"classes": len(names), "pca_variance": float(shares.sum()), "neighbors": embedding.NEIGHBORS} | numbers


def in_words(numbers: dict[str, float]) -> str:
    text = f"trustworthiness {numbers['trustworthiness']:.3f}"
    if "knn" not in numbers:
        return text
    return f"{text}; kNN accuracy {numbers['knn']:.3f} here, {numbers['knn_space']:.3f} with all features"
