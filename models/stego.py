"""What STEGO trains on a frozen backbone: codes of its patches, and clusters of the codes.

Letters: B images, h x w patches, C channels of the features, D of the codes, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegmentationHead(nn.Module):
    """Features (B, C, h, w) -> the features that the loss compares, and codes (B, D, h, w).

    A linear map plus one with a hidden layer, patch by patch. In training a tenth of the channels is dropped, anew for
    the two maps and for the features of the loss, as in the official code (DinoFeaturizer).
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.linear = nn.Conv2d(channels, dim, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, dim, 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.linear(self.dropout(features)) + self.nonlinear(self.dropout(features))  # (B, D, h, w)
        return self.dropout(features), codes


class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent: centers (K, D), each code belongs to the most similar one."""

    def __init__(self, dim: int, clusters: int):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(clusters, dim))

    def forward(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) -> cosines with the centers (B, K, h, w)."""
        units = F.normalize(codes, dim=1), F.normalize(self.centers, dim=1)
        return torch.einsum("bdhw,kd->bkhw", *units)  # (B, K, h, w)

    def loss(self, codes: Tensor) -> Tensor:
        """Minus the mean cosine with the own center; the codes get no gradient."""
        return -self(codes.detach()).amax(1).mean()
