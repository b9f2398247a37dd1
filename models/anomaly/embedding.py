"""The baseline: how far an image's global embedding lies from those of the normal images. It draws no maps."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.anomaly.detector import Batch, Detector, Findings, Stage
from models.anomaly.gaussian import put_left_out, shrunk_gaussian, shrunk_left_out
from models.anomaly.maps import pool
from runtime.errors import UserError
from runtime.values import PositiveInt, coerce
from search.bounds import require_finite
from search.nearest import nearest_squared, with_gradient

Distance = Literal["knn", "knn_squared", "mahalanobis"]
Combine = Literal["concat", "sum"]
Source = Literal["stages", "output"]


class Embedding(Detector):
    """Distance of globally average-pooled features, or of the backbone's output, with no training.

    `knn`: mean Euclidean distance to the k nearest training embeddings (Bergman et al. 2020, "Deep Nearest Neighbor
    Anomaly Detection", eq. 1, k = 2; SPADE takes k = 50 with the same score).
    `knn_squared`: the sum of the k squared distances, as in its authors' code (PANDA's utils.py, faiss.IndexFlatL2): of
    more than one neighbor the farther ones count more, so that it can rank images otherwise.
    `mahalanobis`: sqrt((f - mu)^T S^-1 (f - mu)) with one Gaussian and the Ledoit-Wolf shrinkage of its covariance
    (Rippel et al. 2020, "Modeling the distribution of normal data in pre-trained deep features", eq. 1). With
    combine=sum it is theirs, one Gaussian per stage.

    Args:
        backbone: any; its stages are pooled to one vector.
        distance: `knn`, `knn_squared` or `mahalanobis`.
        k: neighbors of `knn` and `knn_squared`; `mahalanobis` does not read it.
        stages: stages that are pooled; 4 alone is the embedding of a ResNet.
        combine: `concat` joins the stages to one vector; `sum` adds up the distances that each stage has by itself.
        normalize: scale every embedding (with combine=sum each stage's) to length 1 first (cosine geometry, as
            self-supervised backbones are trained); it moves results by points, so it is never implicit.
        source: `stages`, or `output`, what the backbone returns: a CNN's pooled vector, a ViT's class token; then
            `stages` and `combine` are not read.
    """

    fits = True
    leaves_out = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        distance: Distance = "knn",
        k: PositiveInt = 2,
        stages: tuple[Stage, ...] = (4,),
        combine: Combine = "concat",
        normalize: bool = False,
        source: Source = "stages",
    ):
        super().__init__(backbone, stages)
        self.distance = coerce(distance, Distance, "embedding distance")
        self.combine = coerce(combine, Combine, "embedding combine")
        self.source, self.k, self.normalize = coerce(source, Source, "embedding source"), k, normalize
        self.register_buffer("numbers", torch.empty(0, dtype=torch.int64))  # (N,) of the fitted images, ascending
        if distance != "mahalanobis":
            self.register_buffer("bank", torch.empty(0, 0))  # (N, D), the stages side by side also with combine=sum
        else:
            self.register_buffer("mean", torch.empty(0, dtype=torch.float64))  # (D,)
            self.register_buffer("cholesky", torch.empty(0, 0, dtype=torch.float64))  # (D, D) lower, a block a stage
            self.register_buffer("left_out", torch.empty(0, dtype=torch.float64))  # (N,) each from the others' Gaussian

    @torch.no_grad()
    def networks(self, images: Tensor) -> list[Tensor]:
        """The chosen stages [(B, C_i, H_i, W_i)], or the backbone's output [(B, D)], in float32."""
        if self.source == "stages":
            return self.features(images)
        output = self.backbone(images).float()
        if output.dim() != 2:
            raise UserError(f"embedding source=output: the backbone gives {tuple(output.shape)}, not (B, D)")
        return [output]

    def embed(self, outputs: list[Tensor], valid: Tensor | None = None) -> list[Tensor]:
        """What `networks` returned -> embeddings [(B, D)], with combine=sum one of every stage; padding is left out."""
        if self.source == "stages":
            parts = [pool(stage, valid) for stage in outputs]
        elif valid is None or valid.all():
            parts = outputs
        else:
            raise UserError(
                "embedding source=output pools padding, too: fit it with source=stages, or data.fit=squash or crop"
            )
        if self.combine == "concat":
            parts = [torch.cat(parts, dim=1)]
        return [F.normalize(part) for part in parts] if self.normalize else parts

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """Learn the normal images of all processes; all hold all of them.

        Raises:
            UserError: NaN features, fewer images than k, or a singular covariance (1 or 2 images, or all alike).
        """
        rows, indices = [], []
        for batch in batches:
            parts = self.embed(self.networks(batch.images), batch.valid)
            rows.append(torch.cat(parts, dim=1))  # (B, D)
            indices.append(batch.indices)
        embeddings, numbers = self.in_order(rows, indices)  # (N, D), (N,)
        require_finite(embeddings, "embeddings of the training images")
        if self.distance != "mahalanobis":
            if len(embeddings) < self.k:
                raise UserError(f"embedding k={self.k}, but there are {len(embeddings)} training images: lower k")
            self.bank, self.numbers = embeddings, numbers
            return
        widths = [part.shape[1] for part in parts]
        stages = embeddings.double().split(widths, dim=1)
        means, factors, failed = zip(*map(shrunk_gaussian, stages))
        if any(failed):  # with 2 images the shrinkage is exactly 0, with equal ones the covariance is
            raise UserError(
                f"mahalanobis: the covariance of {len(embeddings)} training image(s) is singular; "
                "give more, and different, images or set distance=knn"
            )
        self.mean, self.cholesky, self.numbers = torch.cat(means), torch.block_diag(*factors), numbers
        self.left_out = sum(map(shrunk_left_out, stages))  # inf where the others are too few or alike

    def can_leave_out(self, count: int) -> bool:
        """More than k images, or with `mahalanobis` four at least, any three of which have a covariance."""
        return count > self.k if self.distance != "mahalanobis" else bool(self.left_out.isfinite().all())

    def measure(
        self,
        outputs: list[Tensor],
        size: tuple[int, int],  # noqa: ARG002
        valid: Tensor | None = None,
        leave_out: Tensor | None = None,
    ) -> Findings:
        """`images` is the nearest training image, with combine=sum that of the last stage.

        `leave_out` with `mahalanobis`: the images must be those left out: `fit` found their distances, as refits
        would (`shrunk_left_out`).
        """
        self.require_fitted(self.numbers)
        parts = self.embed(outputs, valid)
        widths = [part.shape[1] for part in parts]
        if self.distance != "mahalanobis":
            if leave_out is not None and len(self.bank) <= self.k:
                left = len(self.bank) - 1
                raise UserError(f"embedding k={self.k}: without one training image there are {left} left: lower k")
            exclude = None if leave_out is None else (leave_out, self.numbers)
            banks = self.bank.split(widths, dim=1)
            found = [nearest_squared(part, bank, self.k, exclude=exclude) for part, bank in zip(parts, banks)]
            if parts[0].requires_grad:
                found = [(with_gradient(part, bank[i]), i) for part, bank, (_, i) in zip(parts, banks, found)]
            if self.distance == "knn":
                scores = sum(squared.sqrt().float().mean(1) for squared, _ in found)  # (B,)
            else:
                scores = sum(squared.sum(1) for squared, _ in found).float()  # (B,)
            return Findings(scores, nearest_image=self.numbers[found[-1][1][:, 0]])
        require_finite(torch.cat(parts, dim=1), "embeddings of the images")
        scores, first = torch.zeros(parts[0].shape[0], dtype=torch.float64, device=parts[0].device), 0
        for part in parts:
            span = slice(first, first + part.shape[1])
            centred = (part.double() - self.mean[span]).T  # (C, B)
            scores += torch.linalg.solve_triangular(self.cholesky[span, span], centred, upper=False).norm(dim=0)
            first = span.stop
        if leave_out is not None:
            scores = put_left_out(scores, self.left_out, self.numbers, leave_out)
        return Findings(scores.float())
