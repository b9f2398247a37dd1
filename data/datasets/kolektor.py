"""KolektorSDD and KolektorSDD2: images beside their masks, of which a black one means a good image."""

import os
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import Dataset
from data.geometry import Geometry
from data.image_files import find_images
from data.images import OnError, in_threads, mask_values
from data.splits import Draw
from runtime.errors import UserError
from runtime.values import BelowOne, PathText


class KolektorSDD(Dataset):
    """50 electrical commutators (Tabernik et al. 2020): `<root>/kos01/Part0.jpg` and its mask `Part0_label.bmp`.

    There is no published split for detectors. `test` are all defective images and `test_fraction` of the good ones,
    drawn by a fixed seed over the sorted paths. Nearly every commutator has a defective image, so the good images of
    one, which do not overlap, are on both sides.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder of kos01 to kos50.
        test_fraction: of the good images, the others are trained on; none: 0.2.
        splits: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: another layout, an image without its mask or a mask without its image.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        test_fraction: BelowOne | None = None,
        splits: PathText | None = None,
        on_error: OnError = "fail",
    ):
        layout = "expected <root>/kos<number>/Part<number>.jpg and Part<number>_label.bmp"
        paths, masks = _pairs(root, Path(root).glob("kos*"), "_label", layout)
        good = torch.tensor([mask is None for mask in masks])
        share = 0.2 if test_fraction is None else test_fraction
        draw = Draw(test_fraction=test_fraction, splits=splits)
        division = draw.divide(root, paths, share=share, tested=(~good).tolist(), splits=self.splits)
        kept = torch.tensor(division.of(split), dtype=torch.int64)
        super().__init__(split, size, root, *_chosen(paths, masks, kept, split), on_error=on_error)
        self.left_out |= division.left_out(split, f" (data.test_fraction={share})")
        self.division = division


class KolektorSDD2(Dataset):
    """Surfaces of one product (Božič et al. 2021): `<root>/train/<number>.png`, its mask `<number>_GT.png`, and `test`.

    The defective images of `train` are left out, for detectors learn from normal images alone.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder with `train` and `test`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: another layout, an image without its mask or a mask without its image.
    """

    def __init__(self, split: str, size: int | Geometry, *, root: PathText, on_error: OnError = "fail"):
        layout = f"expected <root>/{split}/<number>.png and <number>_GT.png"
        paths, masks = _pairs(root, [Path(root) / split], "_GT", layout)
        kept = torch.tensor([i for i, mask in enumerate(masks) if mask is None or split == "test"], dtype=torch.int64)
        super().__init__(split, size, root, *_chosen(paths, masks, kept, split), on_error=on_error)
        self.left_out["defective"] = len(paths) - len(kept)


def _pairs(root: PathText, folders, suffix: str, layout: str) -> tuple[list[str], list[str | None]]:
    """All images of the folders, and for each its mask, or None where that is black."""
    found = [os.path.splitext(path) for folder in sorted(folders) for path in find_images(folder)]
    mask_of = {stem.removesuffix(suffix): stem + extension for stem, extension in found if stem.endswith(suffix)}
    images = {stem: stem + extension for stem, extension in found if not stem.endswith(suffix)}
    if not images:
        there = sorted(os.listdir(root)) if os.path.isdir(root) else []
        raise UserError(f"data.root={root}: {layout}, found {', '.join(there[:8]) or 'nothing'}")
    if alone := sorted(images.keys() ^ mask_of.keys()):
        path, what = (images[alone[0]], "mask") if alone[0] in images else (mask_of[alone[0]], "image")
        raise UserError(f"{len(alone)} files have no partner, the first: {path} has no {what}; {layout}")
    masks = [mask_of[stem] for stem in images]
    defective = in_threads(lambda mask: bool((mask_values(mask) != 0).any()), masks, "reading masks")
    return list(images.values()), [mask if is_defective else None for mask, is_defective in zip(masks, defective)]


def _chosen(paths: list[str], masks: list[str | None], kept: Tensor, split: str) -> tuple:
    """What `Dataset` takes after its root: paths, labels, classes, defects and masks of the images to keep."""
    chosen = [(paths[i], masks[i]) for i in kept.tolist()]
    defects = ["good" if mask is None else "defect" for _, mask in chosen]
    return [path for path, _ in chosen], None, None, defects, [m for _, m in chosen] if split == "test" else None
