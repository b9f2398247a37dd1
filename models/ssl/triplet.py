"""Triplets with synthetic defects: a view, another view, and a view with a defect."""

from typing import Literal

import torch
from torch import Tensor, nn

from losses.triplet import Mining, triplet
from models.heads import head_widths, mlp
from models.ssl.method import Encoder, SSLMethod, all_views
from runtime.errors import UserError
from runtime.values import NonNegativeFloat, Width, WidthOrZero


class Triplet(SSLMethod):
    """Another view of an image lies nearer to it than views with a synthetic defect, by a margin.

    The anchor is the first view, the positive the second, the negative the last one with a defect (`defect=cutpaste`,
    see data/defects). The loss is FaceNet's (Schroff et al. 2015); defects as negatives are this project's. Other
    images are no negatives: images of good parts may all look the same.

    Args:
        margin: on distances between unit vectors, which lie between 0 and 2; 0.2 in FaceNet, of squared ones.
        mining: which of the batch's defective views an anchor takes: `semi_hard`, `hardest`, or `own`.
        head: `mlp`, two layers, or `linear`.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features.
        out: width of the embedding that the loss sees; 128 in FaceNet.
    """

    needs_defect = True
    takes = (3, 3, "simclr with defect=cutpaste")
    advice = "the loss is the margin: defects move no embedding; use larger defects, or mining=semi_hard"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        margin: NonNegativeFloat = 0.2,
        mining: Mining = "semi_hard",
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 0,
        out: Width = 128,
    ):
        super().__init__()
        if mining not in ("semi_hard", "hardest", "own"):
            raise UserError(f"method.mining={mining!r} is unknown; one of: semi_hard, hardest, own")
        self.margin, self.mining = margin, mining
        widths = head_widths(backbone.num_features, head, hidden, out)
        self.online = Encoder(backbone, mlp(widths, bias=True, last_bias=True))

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        # Together: normalized apart, positives and negatives would be told apart by their batch's statistics
        return (all_views(self.online, views),)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        (z,) = embeddings  # (B, 3, D)
        loss, stats = triplet(*z.unbind(1), self.margin, mining=self.mining)
        return loss, stats | {"embeddings": z[:, :2].detach(), "chance_loss": torch.tensor(self.margin)}
