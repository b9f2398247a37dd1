"""PatchCore (Roth et al. 2022, "Towards total recall in industrial anomaly detection"): a thinned bank of patches."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.anomaly.coreset import greedy_coreset
from models.anomaly.detector import Detector
from models.anomaly.maps import smooth, upsample
from models.anomaly.nearest import Prepared, nearest, prepare
from training.distributed import is_main
from training.errors import UserError


class PatchCore(Detector):
    """Distance of every patch of a picture to the nearest patch of a coreset of the normal pictures' patches.

    Patches are locally averaged features of several stages at the finest one's resolution; the bank is their greedy
    k-center coreset (Algorithm 1), chosen under a random projection but kept unprojected. Map: Euclidean distances to
    the nearest bank patch, bilinearly upsampled, sigma 4. Score: the largest of these distances (eq. 6), weighted (7).

    Deviations from the authors' code, which differs from their paper: distances are Euclidean as in the paper, not
    squared (faiss); eq. 7 is applied (their code has none, and neighbors=1 gives that); the projection is Gaussian, not
    uniform, and the greedy search starts at one random patch, as in the paper, not at the mean of ten. Channels are
    pooled once, after concatenation, where their code pools each stage and then both: no channel is ever replicated.

    Args:
        backbone: any.
        stages: 2 and 3 are strides 8 and 16 of a ResNet or MobileNetV2 with the ImageNet stem.
        neighborhood: side of the local average (odd), stride 1, zeros around the border counted in the mean as
            avg_pool2d and the authors' unfold do; 1 switches it off.
        embed_dim: more channels than this are averaged over (adaptive average pooling) to this many.
        coreset: fraction of the patches to keep, in (0, 1]; at least one patch is kept, 1 keeps all in order.
        projection: width of the projection under which the coreset is chosen; 0, or patches no wider: none.
        neighbors: b of eq. 7, the bank patches around the nearest one; 1 gives the plain maximum.
        seed: draws the projection and the coreset's first patch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: tuple[int, ...] = (2, 3),
        neighborhood: int = 3,
        embed_dim: int = 1024,
        coreset: float = 0.1,
        projection: int = 128,
        neighbors: int = 9,
        seed: int = 0,
    ):
        super().__init__(backbone, stages)
        if neighborhood < 1 or neighborhood % 2 == 0:
            raise UserError(f"patchcore neighborhood={neighborhood}: the side of the local average is odd: 1, 3, 5")
        if not 0 < coreset <= 1:
            raise UserError(f"patchcore coreset={coreset}: it is the fraction of patches to keep, above 0, at most 1")
        for name, value, least in (
            ("embed_dim", embed_dim, 1),
            ("projection", projection, 0),
            ("neighbors", neighbors, 1),
        ):
            if value < least:
                raise UserError(f"patchcore {name}={value}: it is at least {least}")
        self.neighborhood, self.embed_dim = neighborhood, embed_dim
        self.coreset, self.projection, self.neighbors, self.seed = coreset, projection, neighbors, seed
        self.register_buffer("bank", torch.empty(0, 0))  # (M, D)
        self._prepared: tuple[Tensor, Prepared] | None = None

    def patches(self, features: list[Tensor]) -> Tensor:
        """Stages [(B, C_i, H_i, W_i)] -> patch features (B, H, W, D), H x W of the finest stage, D <= embed_dim."""
        size, k = max(feature.shape[-2:] for feature in features), self.neighborhood
        pooled = [F.avg_pool2d(feature, k, stride=1, padding=k // 2) for feature in features]
        aligned = [F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in pooled]
        patches = torch.cat(aligned, dim=1).permute(0, 2, 3, 1)  # (B, H, W, sum of C_i)
        if patches.shape[-1] > self.embed_dim:
            patches = F.adaptive_avg_pool1d(patches.flatten(1, 2), self.embed_dim).unflatten(1, size)  # (B, H, W, D)
        return patches

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Build the bank from normalised (B, 3, S, S) batches of this process.

        Every rank gathers the patches of all processes, in the order one process would have them, and picks the same
        coreset, so that W processes hold the bank of one. Memory per process: N images x H x W x D x 4 bytes, twice
        while they are joined, and four times where there are several processes.
        """
        patches = self.gather_images([self.patches(self.features(images)) for images in batches])  # (N, H, W, D)
        patches = patches.flatten(0, 2)  # (N H W, D)
        n_picks = max(1, int(self.coreset * len(patches)))
        if n_picks < len(patches):
            patches = patches[self.select(patches, n_picks)]
        self.bank = patches

    def select(self, patches: Tensor, n_picks: int) -> Tensor:
        """Indices (n_picks,) of the coreset of patches (P, D), in pick order; a bar shows if it takes long."""
        generator = torch.Generator().manual_seed(self.seed)
        start = int(torch.randint(len(patches), (), generator=generator))
        if 0 < self.projection < patches.shape[1]:
            directions = torch.randn(patches.shape[1], self.projection, generator=generator)  # (D, projection)
            with torch.autocast(patches.device.type, enabled=False):
                patches = patches @ directions.to(patches) / self.projection**0.5  # (P, projection)
        with tqdm(total=n_picks, desc="coreset", unit="patch", delay=5, leave=False, disable=not is_main()) as bar:
            return greedy_coreset(patches, n_picks, start=start, progress=bar.update)

    def prepared(self) -> Prepared:
        """The bank's half of the nearest-neighbour search, made once for each bank."""
        if self._prepared is None or self._prepared[0] is not self.bank:
            self._prepared = self.bank, prepare(self.bank)
        return self._prepared[1]

    def measure(self, features: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        self.require_fitted(self.bank)
        patches = self.patches(features)  # (B, H, W, D)
        found = nearest(patches.flatten(0, 2), self.bank, prepared=self.prepared())
        distances, owners = (x[:, 0].view(patches.shape[:3]) for x in found)  # (B, H, W)
        scores, peaks = distances.flatten(1).max(1)  # (B,)
        each = torch.arange(len(patches), device=peaks.device)
        weights = self.reweight(patches.flatten(1, 2)[each, peaks], scores, owners.flatten(1)[each, peaks])
        return smooth(upsample(distances, size, align_corners=False)), weights * scores

    def reweight(self, patches: Tensor, distances: Tensor, owners: Tensor) -> Tensor:
        """The factor of eq. 7: w = 1 - exp |p - m*| / sum over m in N_b(m*) of exp |p - m|, (B,).

        A far patch whose nearest bank patch m* is itself far from the rest of the bank counts for more. N_b(m*) holds
        m* itself. A bank of one patch has no neighbours to weigh by: 1, as with b = 1.

        Args:
            patches: p, (B, D), each image's most distant patch.
            distances: |p - m*|, (B,).
            owners: index of m* in the bank, (B,).
        """
        count = min(self.neighbors, len(self.bank))
        if count == 1:
            return torch.ones_like(distances)
        around = self.bank[nearest(self.bank[owners], self.bank, count, prepared=self.prepared())[1]]  # (B, b, D)
        to_around = torch.linalg.vector_norm(patches[:, None] - around, dim=2)  # (B, b)
        return 1 - torch.exp(distances - to_around.logsumexp(1))
