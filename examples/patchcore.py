"""PatchCore (Roth et al. 2022), whole: how far the patches of an image lie from a bank of normal patches.

    python -m examples.patchcore datasets/demo/condition/liner/train/good datasets/demo/condition/liner/test
    python -m examples.patchcore <folder of normal images> <folder of others> resnet18.pth

Prints the score of each image of the second folder, the most anomalous first, and draws that one's map over it. Copy it
and change it. models/anomaly/patchcore.py is the same for more images than fit into memory, several processes, padding
and the other published forms; train_anomaly.py adds metrics and thresholds.
"""

import runtime.threads  # before torch

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.image_files import find_images
from data.images import decode
from data.normalize import normalization_of, normalize
from models.anomaly.maps import render
from models.backbones.resnet import ResNet18
from models.weights.load import load_weights
from plots.heatmaps import overlay, save, to_pil
from search.coreset import greedy_coreset
from search.nearest import nearest

SIZE = 224  # pixels of an image's side
BATCH = 16  # images that pass the backbone at once
WIDEST = 1024  # channels of a patch; more are averaged over
CORESET = 0.1  # fraction of the normal patches to keep
PROJECTION = 128  # numbers of a patch while the coreset is chosen
NEIGHBORS = 9  # b of equation 7


@torch.no_grad()
def patches_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images uint8 (N, 3, S, S) -> the local means of stages 2 and 3 side by side, (N, h, w, D)."""
    found = []
    for batch in images.split(BATCH):
        pixels = normalize(batch, normalization_of(backbone))
        stages = backbone.forward_stages(pixels, last=3)[1:]  # 2 x (B, C_i, h_i, w_i)
        means = [F.avg_pool2d(stage, 3, stride=1, padding=1) for stage in stages]
        size = means[0].shape[-2:]
        aligned = [F.interpolate(mean, size, mode="bilinear", align_corners=False) for mean in means]
        patches = torch.cat(aligned, dim=1).permute(0, 2, 3, 1)  # (B, h, w, D)
        if patches.shape[-1] > WIDEST:
            patches = F.adaptive_avg_pool1d(patches.flatten(1, 2), WIDEST).unflatten(1, size)  # (B, h, w, D)
        found.append(patches)
    return torch.cat(found)


def fit(backbone: nn.Module, images: Tensor, seed: int = 0) -> Tensor:
    """Normal images uint8 (N, 3, S, S) -> the bank (M, D): their patches' greedy k-center coreset (algorithm 1)."""
    patches = patches_of(backbone, images).flatten(0, 2)  # (N h w, D)
    drawn = torch.randn(patches.shape[1], PROJECTION, generator=torch.Generator().manual_seed(seed))
    start = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed + 1))[0]
    points = patches @ (drawn / PROJECTION**0.5)  # (N h w, PROJECTION), which keeps distances (Johnson-Lindenstrauss)
    count = max(1, int(CORESET * len(patches)))
    return patches[greedy_coreset(points, count, start=int(start)).picks]


def score(backbone: nn.Module, bank: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, S, S) -> how anomalous each is (N,), and each of its pixels (N, S, S)."""
    patches = patches_of(backbone, images)  # (N, h, w, D)
    distances, owners = nearest(patches.flatten(0, 2), bank)  # (N h w, 1)
    grid = distances.view(patches.shape[:3])
    largest, worst = grid.flatten(1).max(1)  # (N,) equation 6
    each = torch.arange(len(images))
    owner = owners.view(len(images), -1)[each, worst]  # (N,)
    around = nearest(bank[owner], bank, min(NEIGHBORS, len(bank)))[1]  # (N, b), the owner itself first
    away = (patches.flatten(1, 2)[each, worst][:, None] - bank[around]).norm(dim=2)  # (N, b)
    weights = 1 - away.softmax(1)[:, 0]  # (N,) equation 7: more where the bank is sparse
    return largest * weights, render(grid, images.shape[-2:])


def main(normal_folder: str, folder: str, weights: str | None = None) -> None:
    torch.manual_seed(0)
    backbone = ResNet18().eval()
    if weights is not None:
        load_weights(backbone, weights)
    normal, paths = (find_images(place) for place in (normal_folder, folder))
    bank = fit(backbone, torch.stack([decode(path, SIZE) for path in normal]))
    images = torch.stack([decode(path, SIZE) for path in paths])
    scores, maps = score(backbone, bank, images)
    order = scores.argsort(descending=True).tolist()
    for i in order:
        print(f"{scores[i]:9.4f}  {paths[i]}")
    worst = order[0]
    drawn = overlay(images[worst], maps[worst], float(maps.median()), float(maps.max()))  # uint8 (3, S, S)
    save(to_pil(drawn), "most_anomalous.png")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
