"""The baseline: how far a picture's global embedding lies from those of the normal pictures. It draws no maps."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.anomaly.detector import Detector
from models.anomaly.nearest import nearest
from training.errors import UserError


class Embedding(Detector):
    """Distance of globally average-pooled features, with no training.

    `knn`: mean Euclidean distance to the k nearest training embeddings (Bergman et al. 2020, "Deep Nearest Neighbor
    Anomaly Detection", k = 2; SPADE takes k = 50 with the same score).
    `mahalanobis`: sqrt((f - mu)^T S^-1 (f - mu)) with one Gaussian and the Ledoit-Wolf shrinkage of its covariance
    (Rippel et al. 2020, "Modeling the distribution of normal data in pre-trained deep features", eq. 1). They sum the
    distances of one Gaussian per stage; here several stages are concatenated under one Gaussian.

    Args:
        backbone: any; its stages are pooled to one vector.
        distance: `knn` or `mahalanobis`.
        k: neighbours of `knn`; `mahalanobis` does not read it.
        stages: stages that are pooled and concatenated; 4 alone is the embedding of a ResNet.
        normalize: scale every embedding to length 1 first (cosine geometry, as self-supervised backbones are trained);
            it moves results by points, so it is never implicit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        distance: Literal["knn", "mahalanobis"] = "knn",
        k: int = 2,
        stages: tuple[int, ...] = (4,),
        normalize: bool = False,
    ):
        super().__init__(backbone, stages)
        if distance not in ("knn", "mahalanobis"):
            raise UserError(f"embedding distance={distance}: it is knn or mahalanobis")
        if k < 1:
            raise UserError(f"embedding k={k}: the number of neighbours is at least 1")
        self.distance, self.k, self.normalize = distance, k, normalize
        if distance == "knn":
            self.register_buffer("bank", torch.empty(0, 0))  # (N, D)
        else:
            self.register_buffer("mean", torch.empty(0, dtype=torch.float64))  # (D,)
            self.register_buffer("cholesky", torch.empty(0, 0, dtype=torch.float64))  # (D, D) lower factor of S

    def embed(self, features: list[Tensor]) -> Tensor:
        """Stages [(B, C_i, H_i, W_i)] -> embeddings (B, D = sum of C_i)."""
        pooled = torch.cat([feature.mean((2, 3)) for feature in features], dim=1)  # (B, D)
        return F.normalize(pooled) if self.normalize else pooled

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Learn the normal pictures from normalised (B, 3, S, S) batches of this process; all ranks get all pictures.

        Raises:
            UserError: fewer pictures than k, or a covariance that stays singular (2 pictures, or all alike).
        """
        embeddings = self.gather_images([self.embed(self.features(images)) for images in batches])  # (N, D)
        if self.distance == "knn":
            if len(embeddings) < self.k:
                raise UserError(f"embedding k={self.k}, but there are {len(embeddings)} training pictures: lower k")
            self.bank = embeddings
            return
        samples = embeddings.double()
        from sklearn.covariance import ledoit_wolf  # here, for it takes seconds to import and only this needs it

        covariance = torch.from_numpy(ledoit_wolf(samples.cpu().numpy())[0])  # (D, D)
        cholesky, failed = torch.linalg.cholesky_ex(covariance)
        if failed:  # with 2 pictures the shrinkage is exactly 0, with equal ones the covariance is
            raise UserError(
                f"mahalanobis: the covariance of {len(samples)} training picture(s) is singular; "
                "give more, and different, pictures or set distance=knn"
            )
        self.mean, self.cholesky = samples.mean(0), cholesky.to(samples.device)

    def measure(self, features: list[Tensor], size: tuple[int, int]) -> tuple[None, Tensor]:  # noqa: ARG002
        embeddings = self.embed(features)
        self.require_fitted(self.bank if self.distance == "knn" else self.mean)
        if self.distance == "knn":
            return None, nearest(embeddings, self.bank, self.k)[0].mean(1)
        centred = (embeddings.double() - self.mean).T  # (D, B)
        return None, torch.linalg.solve_triangular(self.cholesky, centred, upper=False).norm(dim=0).float()
