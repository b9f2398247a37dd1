"""Backbones, detectors and classifiers for notebooks and other programs: images in, features, verdicts or classes out.

    import scavenge

    backbone = scavenge.load_backbone("runs/simclr")
    features = backbone(["a.png", "b.png"])  # (2, D)
    detector = scavenge.load_detector("runs/patchcore_own")
    for result in detector(["a.png", "b.png"]):
        print(result.path, result.score, result.is_anomalous, result.p_value)
    classifier = scavenge.load_classifier("runs/classifier_own")
    probabilities = classifier(["a.png", "b.png"])  # (2, C), of classifier.classes
    for result in classifier.classify(["a.png", "b.png"]):
        print(result.path, result.verdict, result.probability)

Images are a list of paths (files of any sizes), a uint8 array (N, H, W, 3) or a uint8 tensor (N, 3, H, W), all in RGB;
they are fitted into the input as in the run. Results lie on the CPU. Nothing is printed; what is doubtful is a Python
warning, mistakes are a `UserError` or `ValueError`. docs/python.md has more.
"""

import runtime.threads  # before torch

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import DataConfig, Geometry, build_geometry
from data.images import fitted
from data.normalize import normalization_of, normalize
from evaluation.anomaly.prediction import (
    LoadedImage,
    Precision,
    Prediction,
    ahead,
    examine,
    load_image,
    load_run,
    predicted,
)
from evaluation.classify import Classified, classify, load_classifier_run
from evaluation.export.exported import Exported, is_exported, load_exported
from evaluation.features import stored_sections
from runtime import config, distributed
from runtime.errors import UserError
from runtime.values import coerce
from runtime.version import another_version

if TYPE_CHECKING:  # what imports models/ is imported where it is needed, as exported programs do without
    from evaluation.inspect.attention import Attention
    from evaluation.inspect.correspondence import Matches
    from evaluation.inspect.faithfulness import Faithfulness

Images = list[str | Path] | np.ndarray | Tensor
THREADS = min(16, runtime.threads.cpu_count())  # that decode


@dataclass(repr=False, eq=False)
class LoadedBackbone:
    """A backbone with its weights; calling it gives features."""

    network: Any  # a backbone, in eval mode
    geometry: Geometry  # fits images into its input
    device: torch.device
    batch_size: int

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Features of N images: float32 (N, D)."""
        return torch.cat([self._features(pixels).float().cpu() for pixels in self._batches(images)])

    @torch.no_grad()
    def stages(self, images: Images) -> list[Tensor]:
        """The maps of the four stages, the finest first: float32 [(N, C_i, H_i, W_i)] * 4."""
        parts = [[s.float().cpu() for s in self.network.forward_stages(batch)] for batch in self._normalized(images)]
        return [torch.cat(stage) for stage in zip(*parts)]

    @torch.no_grad()
    def patches(self, images: Images, stages: tuple[int, ...] = ()) -> Tensor:
        """Features of every patch, as eval.py task=correspondence and segment compare them: float32 (N, C, h, w).

        stages: of `stages`, beside each other; empty: those that these tasks take."""
        from evaluation.inspect.dense import DenseFeatures

        dense = DenseFeatures(self.network, stages)
        return torch.cat([dense(batch).cpu() for batch in self._normalized(images)])

    def correspondence(self, images: Images, stages: tuple[int, ...] = ()) -> "Matches":
        """The patches of two images that are each other's nearest (evaluation/inspect/correspondence.py).

        Raises:
            ValueError: there are not two images.
        """
        from evaluation.inspect.correspondence import mutual_matches
        from evaluation.inspect.correspondence import patches as patches_of

        maps = self.patches(images, stages)
        if len(maps) != 2:
            raise ValueError(f"correspondence is of two images, not of {len(maps)}")
        return mutual_matches(*map(patches_of, maps))

    def plane(self, images: Images, *, perplexity: float = 30.0, learning_rate: float | None = None) -> Tensor:
        """Images as points by t-SNE, as eval.py task=embedding draws them with seed=0: float64 (N, 2)."""
        from evaluation.inspect import embedding

        return embedding.tsne(embedding.unit(self(images)), perplexity=perplexity, learning_rate=learning_rate, seed=0)

    def attention(self, images: Images) -> "Attention":
        """Of a vision transformer: `heads` (N, heads, h, w), the class token's attention to the patches in the last
        block, and `rollout` (N, h, w), that over all blocks (evaluation/inspect/attention.py)."""
        from evaluation.inspect.attention import Attention, attention

        # one by one: every block's map of one image of 480 pixels, cut into patches of 8, takes 0.6 GB
        found = [attention(self.network, image) for batch in self._normalized(images) for image in batch.split(1)]
        return Attention(*(torch.cat(parts).float().cpu() for parts in zip(*found)))

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network(normalize(pixels, normalization_of(self.network)))

    def _normalized(self, images: Images) -> Iterator[Tensor]:
        for pixels in self._batches(images):
            yield normalize(pixels, normalization_of(self.network))

    def _batches(self, images: Images) -> Iterator[Tensor]:
        loaded = load(images, self.geometry, self.batch_size)
        while batch := list(islice(loaded, self.batch_size)):
            yield torch.stack([item.image for item in batch]).to(self.device)  # uint8 (B, 3, H, W)


class ExportedBackbone(LoadedBackbone):
    """The program of a backbone: features alone."""

    network: Exported

    def _alone(self, *_, **__):
        raise ValueError(f"{self.network.path} gives features alone: load the run that it was exported from")

    stages = patches = attention = _alone  # correspondence takes patches

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)["features"]


@dataclass(repr=False, eq=False)
class LoadedDetector:
    """The detector of a run; calling it gives a `Prediction` per image (evaluation/anomaly/prediction.py)."""

    network: Any  # a detector in eval mode, or an `Exported`
    geometry: Geometry  # fits images into its input
    state: dict  # of the run: config, calibration, names of the training images
    threshold: float | None  # of the score
    device: torch.device
    precision: Precision
    batch_size: int

    def __call__(self, images: Images) -> list[Prediction]:
        """What predict.py says of the images. Every result holds a map of its image's size, so give a few at a time.

        Raises:
            UserError: a file that cannot be read, a score that is not finite.
        """
        tiles = {key: self.state["config"]["data"].get(key, 0) for key in ("tile", "overlap")}
        loaded = load(images, self.geometry, self.batch_size, whole=bool(tiles["tile"]))
        about: dict[str, Any] = {"batch_size": self.batch_size, "precision": self.precision, **tiles}
        examined = examine(self.network, loaded, self.device, **about)
        return [predicted(item, found, self.state, self.threshold) for item, found in examined]


@dataclass(repr=False, eq=False)
class LoadedClassifier:
    """The classifier of a run; calling it gives the probability of each class, with the run's temperature."""

    network: Any  # a classifier in eval mode, or an `Exported`
    geometry: Geometry  # fits images into its input
    state: dict  # of the run: config, classes, calibration
    threshold: float | None  # of the score, above which an image is none of the classes
    device: torch.device
    precision: Precision
    batch_size: int

    @property
    def classes(self) -> list[str]:
        return self.state["classes"]

    def __call__(self, images: Images) -> Tensor:
        """Of N images and C classes: float32 (N, C)."""
        return torch.stack([result.probabilities for result in self.classify(images)])

    def classify(self, images: Images) -> list[Classified]:
        """What predict.py says of the images (evaluation/classify.py).

        Raises:
            UserError: a file that cannot be read, logits that are not finite.
        """
        loaded = load(images, self.geometry, self.batch_size)
        about: dict[str, Any] = {"batch_size": self.batch_size, "precision": self.precision}
        results = classify(self.network, loaded, self.state, self.device, threshold=self.threshold, **about)
        return [result for _, result in results]


def load_backbone(
    path: str | Path,
    *,
    name: str | None = None,
    size: int | tuple[int, int] | None = None,
    device: str = "auto",
    batch_size: int = 64,
    **options,
) -> LoadedBackbone:
    """The backbone of a run, or one with published weights.

    Args:
        path: a run folder or a checkpoint in it; with `name` any file that `backbone.weights` takes.
        name: which backbone the weights are of, if they are not a run's.
        size: side of the input in pixels, or (height, width); None: the run's `data.size`, with `name` 224.
        device: auto, cpu, cuda or cuda:1; auto: CUDA where there is one.
        batch_size: images per forward.
        options: further keys of the `backbone` section, such as part="target".

    Raises:
        UserError: a file that cannot be read or does not fit, an unknown backbone or option.
    """
    if is_exported(path):
        for key, value in ({"name": name, "size": size} | options).items():
            if value is not None:
                raise ValueError(
                    f"{key}={value!r} is for runs and weights, and {path} is an exported program: remove it"
                )
        exported = load_exported(path, "backbone")
        return ExportedBackbone(exported, exported.geometry, device_of(exported, device), batch_size)
    from models.backbones.build import BackboneConfig, build_backbone  # here, for exported programs do without

    if name is None:
        try:
            sections = stored_sections(path)
        except UserError as error:
            raise UserError(f"{error} (of weights that are not a run's, give the backbone: name='resnet50')") from None
        backbone, data = sections["backbone"], sections["data"]
        data = config.build(DataConfig, data if size is None else data | {"size": size}, "data.")
        geometry = build_geometry(data)
    else:
        backbone = {"name": name, "weights": str(path)}
        geometry = Geometry(*np.broadcast_to(size or 224, 2).tolist())
    network, _ = build_backbone(config.build(BackboneConfig, backbone | options, "backbone."))
    device = find_device(device)
    network.to(device).to(memory_format=torch.channels_last).eval()
    return LoadedBackbone(network, geometry, device, batch_size)


def load_detector(
    run: str | Path,
    *,
    threshold: float | None = None,
    category: str | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    batch_size: int = 16,
) -> LoadedDetector:
    """The detector of a finished run of train_anomaly.py.

    Args:
        run: its folder, or the last.pt in it.
        threshold: of the score; None: the run's own.
        category: of a run of several: what the images show; it has thresholds of its own. None: those of all together.
        device: auto, cpu, cuda or cuda:1; auto: CUDA where there is one.
        precision: None: the run's own, with which its thresholds were measured.
        batch_size: images per forward.

    Raises:
        UserError: there is no such run or category, or this is one process of several.
    """
    if distributed.world_size() > 1:
        raise UserError("load_detector works in one process: call it without torchrun")
    if is_exported(run):
        exported = load_exported(run, "detector", category=category)
        return LoadedDetector(
            exported, exported.geometry, exported.state, *settled(exported, threshold, device, precision), batch_size
        )
    network, geometry, state = load_run(Path(run), category)
    if other := another_version(state.get("version"), with_script=False):
        warnings.warn(f"{run} was made by {other}, so scores may differ from its own", stacklevel=2)
    root = state["config"]["data"]["root"]
    state["names"] = [os.path.join(root, name) for name in state["names"]]
    threshold = state["calibration"]["threshold"] if threshold is None else threshold
    precision = coerce(precision or state["config"]["precision"], Precision, "precision")
    device = find_device(device)
    return LoadedDetector(network.to(device), geometry, state, threshold, device, precision, batch_size)


def load_classifier(
    run: str | Path,
    *,
    threshold: float | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    batch_size: int = 64,
) -> LoadedClassifier:
    """The classifier of a run of train_classifier.py: of a finished one the weights that were tested.

    Args:
        run: its folder, or a checkpoint in it.
        threshold: of the score, above which an image is none of the classes; None: the run's own.
        device: auto, cpu, cuda or cuda:1; auto: CUDA where there is one.
        precision: None: the run's own, with which temperature and threshold were measured.
        batch_size: images per forward.

    Raises:
        UserError: a file that cannot be read, or is not of such a run; a threshold for a run that has not finished.
    """
    if is_exported(run):
        exported = load_exported(run, "classifier")
        return LoadedClassifier(
            exported, exported.geometry, exported.state, *settled(exported, threshold, device, precision), batch_size
        )
    network, geometry, state = load_classifier_run(run)
    if other := another_version(state.get("version"), with_script=False):
        warnings.warn(f"{run} was made by {other}, so probabilities may differ from its own", stacklevel=2)
    if threshold is not None and state["bank"] is None:
        raise UserError(f"the run in {run} has not finished, so no image has a score: leave out threshold={threshold}")
    threshold = state["calibration"]["threshold"] if threshold is None else threshold
    precision = coerce(precision or state["config"]["precision"], Precision, "precision")
    where = find_device(device)
    return LoadedClassifier(network.to(where), geometry, state, threshold, where, precision, batch_size)


@dataclass(kw_only=True, eq=False)
class Explained:
    """Where in an image a class, a similarity or a score comes from."""

    path: str  # of the file
    explains: str  # what, in words
    map: Tensor = field(repr=False)  # float32 (H, W), of the input's size; 0 where nothing speaks for it
    faithfulness: "Faithfulness" = field(repr=False)  # whether it goes when what the map shows goes


def grad_cam(
    model: LoadedBackbone | LoadedDetector | LoadedClassifier,
    images: Images,
    *,
    class_name: str | None = None,
    reference: str | Path | None = None,
    normal: str | Path | None = None,
) -> list[Explained]:
    """Grad-CAM of each image, as eval.py task=gradcam draws it, in float32.

    Args:
        class_name: of a classifier's classes; None: each image's likeliest.
        reference: an image, the similarity with which is explained, and not a class or score.
        normal: an image without a defect, whose texture stands where pixels are removed to measure the faithfulness of
            a detector's maps; None: what is around them, which is itself an anomaly to most detectors.

    Raises:
        UserError: a file that cannot be read, no such class, or a detector whose score has no gradient.
        ValueError: an exported program.
    """
    if isinstance(model.network, Exported):
        raise ValueError(f"{model.network.path} has no gradients: explain the run that it was exported from")
    network, own, results = model.network, normalization_of(model.network), []

    from evaluation.inspect.faithfulness import enlarged, faithfulness
    from evaluation.inspect.gradcam import explain, target_of

    def one(path: str | Path | None) -> Tensor | None:  # (1, 3, H, W)
        return None if path is None else normalize(next(load([path], model.geometry, 1)).image[None].to(device), own)

    device, state = model.device, getattr(model, "state", None)
    about: dict[str, Any] = {"class_name": class_name, "reference": one(reference), "state": state}
    texture = one(normal)
    about["texture"] = None if texture is None else texture[0]
    for item in load(images, model.geometry, model.batch_size):
        image = normalize(item.image[None].to(device), own)
        valid = item.geometry.inside(torch.tensor([item.size]), device)  # (1, H, W)
        target = target_of(network, image, valid=valid, **about)
        heat = enlarged(explain(target, image), (item.image.shape[1], item.image.shape[2]))  # (H, W)
        heat = heat if valid is None else heat.where(valid[0], heat.min())
        options: dict[str, Any] = {"texture": target.texture, "batch_size": model.batch_size}
        found = faithfulness(image[0], heat, target.value, **options)
        results.append(Explained(path=item.path, explains=target.what, map=heat.cpu(), faithfulness=found))
    return results


# -------------------------------------------------------------------- what is given


def load(images: Images, geometry: Geometry, batch_size: int, *, whole: bool = False) -> Iterator[LoadedImage]:
    """The images fitted into the input, or `whole`, in order; threads decode somewhat more than a batch ahead.

    Raises:
        ValueError: what is given is no images.
        UserError: while they are taken, a file that cannot be read.
    """
    if isinstance(images, list | tuple) and all(isinstance(path, str | os.PathLike) for path in images):
        items, one = [os.fspath(path) for path in images], partial(from_file, geometry=geometry, whole=whole)
    else:
        pixels = as_array(images)
        items, one = range(len(pixels)), partial(from_array, pixels=pixels, geometry=geometry, whole=whole)
    if not len(items) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1" if len(items) else "there are no images")
    return decoded(one, items, THREADS + batch_size)


def decoded(one: Callable, items: Sequence, count: int) -> Iterator[LoadedImage]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from ahead(one, items, pool, count)


def from_file(path: str, geometry: Geometry, whole: bool) -> LoadedImage:
    _, item = load_image(path, geometry, whole=whole)
    if isinstance(item, UserError):
        raise item
    return item


def from_array(number: int, pixels: np.ndarray, geometry: Geometry, whole: bool) -> LoadedImage:
    image = Image.fromarray(pixels[number])
    geometry = geometry.whole((image.height, image.width)) if whole else geometry
    return LoadedImage(f"images[{number}]", (image.height, image.width), geometry, fitted(image, geometry))


def as_array(images: Images) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3:
        return images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3:
        return images
    given = f"{getattr(images, 'dtype', '')} {tuple(getattr(images, 'shape', ()))}".removesuffix(" ()")
    raise ValueError(
        "images must be a list of paths, a uint8 array (N, H, W, 3) or a uint8 tensor (N, 3, H, W), not "
        f"{type(images).__name__} {given}".rstrip()
    )


def settled(
    exported: Exported, threshold: float | None, device: str, precision: Precision | None
) -> tuple[float | None, torch.device, Precision]:
    """Of an exported program threshold, device and precision, of which the last two are what they are."""
    own = exported.state["config"]["precision"]
    if precision not in (None, own):
        raise ValueError(
            f"precision={precision!r}: {exported.path} was exported with {own}; remove it, or name the run"
        )
    threshold = exported.state["calibration"]["threshold"] if threshold is None else threshold
    return threshold, device_of(exported, device), own


def device_of(exported: Exported, name: str) -> torch.device:
    if name not in ("auto", "cpu"):
        raise ValueError(
            f"device={name!r}: {exported.path} was exported for the CPU; use device='cpu', or name the run"
        )
    return torch.device("cpu")


def find_device(name: str) -> torch.device:
    """Unlike `distributed.setup` it joins no process group and leaves CUDA's current device alone."""
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is not known: choose auto, cpu, cuda or cuda:1")
    there = torch.cuda.is_available()
    device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not there:
        raise UserError(f"device={name}, but torch finds no CUDA device here; use device='cpu'")
    return device
