"""BYOL (Grill et al. 2020, "Bootstrap your own latent")."""

from typing import Literal

import torch
from torch import Tensor, nn

from losses.siamese import byol
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, each_view, frozen_copy
from runtime.values import Width, WidthOrZero


class BYOL(SSLMethod):
    """The network predicts, from one view, what its own moving average makes of the others: no negatives.

    Heads of the official networks.py, without whose batch norms it collapses. In the official code the target starts
    with random weights of its own; here it is a copy, which made no significant difference there. `ema` from 0.97 (40
    epochs), 0.99 (100 and 300) or 0.996 (1000) to 1.

    Args:
        head: `mlp` or `linear`, of the projector.
        hidden: width of the hidden layers of projector and predictor; 0 takes the number of features, in the
            predictor `out`.
        out: width of the embedding that the loss sees.
    """

    takes = (2, MANY, "byol")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 4096,
        out: Width = 256,
    ):
        super().__init__()
        self.online = Encoder(backbone, mlp(head_widths(backbone.num_features, head, hidden, out), bias=True))
        self.predictor = mlp([out, hidden or out, out], bias=True)
        self.target = frozen_copy(self.online)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        projections = each_view(self.online, views)  # (B, V, D)
        predictions = torch.stack([self.predictor(z) for z in projections.unbind(1)], dim=1)  # (B, V, D)
        with torch.no_grad():
            targets = each_view(self.target, views)  # (B, V, D)
        return predictions, targets, projections.detach()

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        predictions, targets, projections = embeddings
        return byol(predictions, targets), {"embeddings": projections}
