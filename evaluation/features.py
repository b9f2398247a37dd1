"""Frozen features of a data set: what kNN, the linear probe and every other measurement on a checkpoint start from."""

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.loading import Loader
from data.normalize import normalization_of, normalize
from runtime import checkpoint
from runtime.distributed import gather_rows, is_main
from runtime.errors import UserError


def stored_sections(path: str | Path) -> dict[str, dict]:
    """The raw `data` and `backbone` sections of a run's config, the latter with the checkpoint itself as its weights.

    Args:
        path: a checkpoint, or a run folder, whose last.pt is meant.

    Raises:
        UserError: it is none of our checkpoints.
    """
    state = checkpoint.load(path)
    weights = {"weights": str(checkpoint.file_of(path)), "part": "auto"}
    data, backbone = (checkpoint.section(state, name, path) for name in ("data", "backbone"))
    return {"data": data, "backbone": backbone | weights}


@torch.no_grad()
def extract(backbone: nn.Module, loader: Loader, *, progress: str = "") -> tuple[Tensor, Tensor]:
    """Features and labels of every image of `loader`, in data set order and equal on all ranks.

    The backbone runs in eval mode (BatchNorm uses its running statistics and leaves them alone); afterwards every
    module is back in the mode it was in. Each rank computes its shard; the shards are gathered and sorted by image.

    Args:
        backbone: images (B, 3, S, S) -> (B, D); not wrapped in DistributedDataParallel.
        loader: on the backbone's device, without `drop_last`; shuffled or not.
        progress: the text of a progress bar on rank 0; without it there is none.

    Returns:
        features (N, D) float32 and labels (N,) int64, both on the loader's device, by ascending index.

    Raises:
        UserError: features that are not finite: the checkpoint has diverged.
        ValueError: the loader gave an image twice.
    """
    modes = {module: module.training for module in backbone.modules()}
    features, labels, indices, normalization = [], [], [], normalization_of(backbone)
    backbone.eval()
    bar = {"desc": progress, "unit": "batch", "leave": False, "disable": not (progress and is_main())}
    try:
        for images, *_, label, index in tqdm(loader.epoch(0), total=len(loader), **bar):
            features.append(backbone(normalize(images, normalization)).float())  # (B, D)
            labels.append(label)
            indices.append(index.to(label.device))
    finally:
        for module, mode in modes.items():
            module.training = mode

    # A rank without any image learns D from the others.
    own_width = torch.tensor([features[0].shape[1] if features else 0], device=loader.device)
    width = int(gather_rows(own_width).max())
    nothing = torch.empty(0, dtype=torch.int64, device=loader.device)
    all_features = gather_rows(torch.cat([*features, torch.empty(0, width, device=loader.device)]))  # (N, D)
    all_labels = gather_rows(torch.cat([*labels, nothing]))  # (N,)
    all_indices, order = gather_rows(torch.cat([*indices, nothing])).sort()  # (N,)

    if (all_indices.diff() == 0).any():
        twice = int(all_indices[1:][all_indices.diff() == 0][0])
        raise ValueError(f"the loader gave image {twice} twice: {len(all_indices)} images in all")
    all_features, all_labels = all_features[order], all_labels[order]
    bad = ~all_features.isfinite().all(1)  # (N,)
    if bad.any():
        raise UserError(
            f"the backbone's features of {int(bad.sum())} of {len(bad)} images are not finite (first: image "
            f"{int(all_indices[bad][0])}): the checkpoint has diverged; use an earlier one or a lower learning rate"
        )
    return all_features, all_labels
