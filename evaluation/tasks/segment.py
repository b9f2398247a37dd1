"""Segments without labels by STEGO: patches that correspond get one code; codes are clustered.

    python eval.py task=segment checkpoint=runs/dino/last.pt data=mvtec data.root=/mvtec data.category=tile learn=test
    python eval.py configs/eval_folder.yaml task=segment data.root=/images backbone.weights=weights.pth clusters=6

The backbone is frozen and images are not augmented, so features are computed once. What is trained is a small head, in
the loop below, and the centers of the clusters. Where the set has masks, clusters are matched with what they show
(Hungarian matching, on the tested masks themselves), and their IoU stands beside that of k-means on the same features
and of calling everything normal. The same command resumes a run that was killed. Writes last.pt, segments.png,
metrics.jsonl, results.json and TensorBoard events to eval_segment/ in the checkpoint's folder (without one: in
runs/<run_name>/).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data import settled
from data.dataset import Dataset
from data.loading import Loader
from data.normalize import normalization_of, normalize
from evaluation.frozen import FrozenConfig, task_folder
from evaluation.inspect import embedding, segmentation
from evaluation.inspect.dense import DenseFeatures, Stage
from evaluation.inspect.segmentation import Segmenter
from evaluation.tasks.data import open_splits
from losses.stego import StegoConfig, stego
from models.backbones.build import build_backbone
from models.stego import ClusterProbe, SegmentationHead
from plots.heatmaps import save
from plots.segments import segments_over
from plots.sheets import contact_sheet
from runtime import distributed
from runtime.config import pick
from runtime.errors import UserError
from runtime.memory import send
from runtime.run import Run
from runtime.values import PositiveFloat, PositiveInt, Range, Seed, Width
from training.optim import clip_gradients

CLASSES = ["normal", "defect"]  # of masks
SHOWN = 12  # images in segments.png
ONE_CODE = 0.95  # mean cosine of codes of different images from which on they are reported as all alike
Clusters = Annotated[int, Range(least=2, most=256)]


@dataclass(kw_only=True)
class Config(FrozenConfig):
    learn: str = "train"  # split that is learned from, without its masks: train, test or another that the set has
    images: Width = 2000  # of it at most, drawn at random
    clusters: Clusters | None = None  # none: 2 where the test images have masks, else 8
    stages: tuple[Stage, ...] = ()  # of the backbone; none: 2,3, of a ViT what comes out at its end
    dim: Width = 70  # of the codes
    stego: StegoConfig = field(default_factory=StegoConfig)  # its loss
    steps: PositiveInt = 5000  # of training
    batch_size: PositiveInt = 16  # images per step
    lr: PositiveFloat = 5e-4  # of the head, by Adam
    cluster_lr: PositiveFloat = 5e-3  # of the clusters' centers, likewise
    linear: bool = False  # also test a linear classifier of codes that learns from the masks of other test images
    log_every: PositiveInt = 50  # steps between points of the curves
    save_every: PositiveInt = 500  # steps between checkpoints
    seed: Seed = 0  # of the images drawn, their order, the head, and of a backbone without other weights
    resume: Literal["auto", "never"] = "auto"  # auto: resume a killed run; never: remove what is there


def run(cfg: Config) -> None:
    run = Run(cfg)
    run.folder, cfg.data = task_folder(cfg, "segment"), settled(cfg.data)
    learned, tested = open_sets(cfg, run)
    cfg.clusters = cfg.clusters or (2 if has_masks(tested.dataset) else 8)
    dense, head, probe, weights = build_networks(cfg, run, learned.dataset, tested)
    optimizers = [torch.optim.Adam(head.parameters(), cfg.lr), torch.optim.Adam(probe.parameters(), cfg.cluster_lr)]
    parts = {"head": head, "probe": probe, "optimizer": optimizers[0], "probe_optimizer": optimizers[1]}
    names = learned.dataset.names
    about = {"names": [names[i] for i in learned.indices.tolist()], "tested": tested.dataset.names}
    state = run.open(parts, cfg.steps, about, {"curves": {}})
    run.log.say(f"eval_segment: {cfg.backbone.name} ({weights}), {len(learned.indices)} images of {cfg.learn}")
    if run.is_finished():
        return

    maps = segmentation.all_maps(dense, learned)  # (N, C, h, w)
    near, batches = segmentation.near_images(maps).cpu(), numbers(cfg, run, len(maps))
    off = torch.amp.GradScaler(run.device.type, enabled=False)
    for step in run.steps():
        (ids,) = run.window.next(batches)
        torch.manual_seed(cfg.seed + 1_000_003 * step)
        others = near[ids, torch.randint(near.shape[1], (len(ids),))]  # (B,)
        features, codes = head(maps[send(ids, run.device)])  # (B, C, h, w), (B, D, h, w)
        near_features, near_codes = head(maps[send(others, run.device)])
        loss, stats = stego(features, codes, near_features, near_codes, cfg.stego)
        cluster_loss = probe.loss(codes)
        (loss + cluster_loss).backward()
        run.window.add(loss)
        grad_norm = clip_gradients(head.parameters(), None)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done = step + 1
        save_due, log_due = run.due(done, cfg.save_every) or run.stops(done), run.due(done, cfg.log_every)
        if save_due or log_due:
            run.check(done, cfg.lr, grad_norm, off)
        if log_due:
            values = {f"stats/{key}": value for key, value in stats.items()}
            values |= {"stats/cluster_loss": cluster_loss.detach(), "grad_norm": grad_norm}
            state["curves"] = run.curves(done, values)
        if save_due:
            run.save(done, **state)
    segmentation.share(head, probe)
    centers = segmentation.k_means(maps, cfg.clusters, cfg.seed)
    finish(cfg, run, Segmenter(dense, head.eval(), probe.centers.detach(), centers), tested, state["curves"])


def open_sets(cfg: Config, run: Run) -> tuple[Loader, Loader]:
    """The images that are learned from, and the test images: of a set without any the same split."""
    sets = open_splits(cfg.data)[0]
    dataset = pick(sets, cfg.learn, "learn")
    positions = embedding.draw({cfg.learn: dataset}, cfg.images, cfg.seed)[cfg.learn]
    if len(positions) < max(2, cfg.batch_size):
        raise UserError(
            f"learn={cfg.learn} has {len(positions)} images, and a step needs batch_size={cfg.batch_size}, at least 2: "
            "lower batch_size, or add images"
        )
    load: dict[str, Any] = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    test_set = sets.get("test", dataset)
    if cfg.linear and not has_masks(test_set):
        raise UserError("linear=true learns from masks, and the test images have none: set linear=false")
    learned = Loader(dataset, cfg.batch_size, run.device, indices=positions, **load)
    known = test_set.mask_known.nonzero()[:, 0] if has_masks(test_set) else None  # (N,)
    return learned, Loader(test_set, cfg.batch_size, run.device, indices=known, **load)


def has_masks(dataset: Dataset) -> bool:
    """Whether its items have masks, of which some mark a defect."""
    return dataset.defects is not None and dataset.split == "test" and dataset.has_masks


def build_networks(
    cfg: Config, run: Run, dataset: Dataset, tested: Loader
) -> tuple[DenseFeatures, SegmentationHead, ClusterProbe, str]:
    """The frozen backbone, what is trained on it, and in words where the backbone's weights come from. One image has
    passed through it, so that what cannot work is found before the run folder is touched."""
    torch.manual_seed(cfg.seed)
    backbone, weights = build_backbone(cfg.backbone)
    backbone.to(run.device, memory_format=torch.channels_last).requires_grad_(False)
    dense = DenseFeatures(backbone.eval(), cfg.stages)
    image = dataset.image(0)[None].to(run.device)
    _, channels, *grid = dense(normalize(image, normalization_of(dense))).shape
    if cfg.linear:
        segmentation.halves_with_masks(tested.dataset, tested.indices, (grid[0], grid[1]), cfg.seed)
    assert cfg.clusters is not None
    head, probe = SegmentationHead(channels, cfg.dim), ClusterProbe(cfg.dim, cfg.clusters)
    return dense, head.to(run.device), probe.to(run.device), weights


def numbers(cfg: Config, run: Run, count: int) -> Iterator[tuple[Tensor]]:
    """The images of each step that is still to do."""
    for step in range(run.start, run.total):
        yield (segmentation.batch_numbers(count, cfg.batch_size, step, cfg.seed),)


def collapse_warning(cosine: float) -> str | None:
    """One line where the mean cosine of codes of different images says that all patches have one code, or None."""
    if cosine < ONE_CODE:
        return None
    return (
        f"codes of different images have a mean cosine of {cosine:.3f}: all patches have nearly one code; raise "
        "stego.intra_shift and stego.inter_shift, or set all three shifts to none, the mean cosine of their features"
    )


def finish(cfg: Config, run: Run, segmenter: Segmenter, tested: Loader, curves: dict) -> None:
    """Test, draw, and write the results."""
    run.log.warn_now(run.total, collapse_warning(curves["stats/negative_code_cosine"]))
    dataset, results = tested.dataset, {"task": "segment", "backbone": cfg.backbone.name, "clusters": cfg.clusters}
    results |= {"steps": run.total, "loss": curves["loss"], "seconds_training": run.seconds}
    found: dict[str, dict] = {}
    if has_masks(dataset):
        counts = segmentation.confusion(segmenter, tested)
        found = {name: segmentation.scores(its, CLASSES) for name, its in counts.items()}
        truth = counts["stego"].sum(0)  # (2,)
        found["all_normal"] = segmentation.scores(torch.stack([truth, 0 * truth]), CLASSES, [0, 1])
        if cfg.linear:
            linear = segmentation.cross_tested(segmenter, tested, cfg.seed)
            found["linear"] = segmentation.scores(linear, CLASSES, [0, 1])
        for name, its in found.items():
            values = its["miou"], its["accuracy"], its["iou"]["defect"] or 0
            run.log.say("{}: mIoU {:.3f}, accuracy {:.3f}, IoU of defects {:.3f}".format(name, *values))
    if distributed.is_main():
        draw(cfg, run, segmenter, tested, found)
    run.finish(results | {"n_learned": len(run.images["names"]), "n_tested": len(tested.indices)} | found)


def draw(cfg: Config, run: Run, segmenter: Segmenter, tested: Loader, found: dict[str, dict]) -> None:
    """segments.png: some test images, of sets with masks defective ones, and both methods' clusters over them."""
    dataset, positions = tested.dataset, tested.indices
    if found:
        positions = positions[dataset.labels[positions] == 1]
    chosen = positions[torch.linspace(0, len(positions) - 1, min(SHOWN, len(positions)), dtype=torch.float64).long()]
    tiles = []
    for i in chosen.tolist():
        image, mask = dataset.image(i), dataset.mask(i) if found else None
        clusters = segmenter(image[None].to(run.device))
        caption = "\n".join(dataset.names[i].split(os.sep)[-2:])  # folder and file
        tiles.append((caption, segments_over(image, None, None, mask)))
        for name, title in (("stego", "STEGO"), ("k_means", "k-means")):
            labels, bare = clusters[name][0].cpu(), None
            if found:  # classes first, so that a color means the same in both
                assigned = found[name]["matching"]
                spare = iter(range(len(CLASSES), len(assigned)))
                labels = torch.tensor([next(spare) if its is None else its for its in assigned])[labels]
                bare = 0
            tiles.append((title, segments_over(image, labels, bare, mask)))
    about = "blue: true defect; color: cluster matched with it" if found else f"{cfg.clusters} clusters of patches"
    sheet = contact_sheet(tiles, f"{cfg.backbone.name}, {about}")
    save(sheet, run.folder / "segments.png")
    run.log.image("segments", pil_to_tensor(sheet))
