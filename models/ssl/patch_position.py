"""Relative patch position (Doersch, Gupta & Efros 2015, "Unsupervised visual representation learning by context
prediction")."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import mlp
from models.ssl.method import Encoder, SSLMethod, all_views
from runtime.precision import at_least_float32
from runtime.values import Width


class PatchPosition(SSLMethod):
    """Where does a patch lie relative to the middle one? One of eight positions, told from the features of both.

    The views are the nine patches of a 3 x 3 grid, row by row (augment=patches has the guards against shortcuts: gaps,
    jitter, colors dropped). All eight neighbors of an image are asked for at once, in the official code one pair: nine
    passes of the backbone for eight answers instead of two for one. The official network is an AlexNet with its own
    layers; the head here is of two layers on the two patches' features, and patches share one backbone as in the
    official code.

    Args:
        hidden: width of the head's hidden layer; 4096 in the official code.
    """

    projects = False
    takes = (9, 9, "patches")
    advice = "positions are guessed at random; use larger patches, or less jitter"

    def __init__(self, backbone: nn.Module, *, hidden: Width = 4096):
        super().__init__()
        head = mlp([2 * backbone.num_features, hidden, 8], bias=True, last_bias=True)
        self.online = Encoder(backbone, head)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        features = all_views(self.online.backbone, views)  # (B, 9, F)
        middle = features[:, 4:5].expand(-1, 8, -1)  # (B, 8, F)
        around = torch.cat([features[:, :4], features[:, 5:]], dim=1)  # (B, 8, F)
        pairs = torch.cat([middle, around], dim=2)  # (B, 8, 2 F)
        return self.online.head(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2]), features.detach()  # (B, 8, 8)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        logits, features = embeddings
        logits = logits.flatten(0, 1)  # (8 B, 8)
        positions = torch.arange(8, device=logits.device).repeat(len(features))  # (8 B,)
        loss = at_least_float32(F.cross_entropy)(logits, positions)
        accuracy = (logits.detach().argmax(1) == positions).float().mean()
        stats = {"position_accuracy": accuracy, "chance_loss": torch.tensor(math.log(8))}
        return loss, stats | {"embeddings": features}
