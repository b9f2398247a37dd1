"""SimSiam (Chen & He 2021, "Exploring simple siamese representation learning"; official simsiam/builder.py)."""

from typing import Literal

import torch
from torch import Tensor, nn

from losses.siamese import simsiam
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, each_view
from runtime.values import Few, Width, WidthOrZero


class SimSiam(SSLMethod):
    """The network predicts, from one view, what it makes of the others, where no gradient flows: no negatives, no
    moving average.

    In the official code the predictor's learning rate stays as it is (`optim.fix_predictor_lr=true`) and the backbone's
    residual blocks start as identities (`backbone.zero_init_residual=true`).

    Args:
        head: `mlp` or `linear`, of the projector.
        layers: of the projector; 3 for ImageNet, 2 for CIFAR-10.
        hidden: width of the projector's hidden layers; 0 takes the backbone's number of features, as in the official
            code.
        out: width of the embedding.
        bottleneck: the predictor's hidden width, a quarter of `out` in the official code.
    """

    takes = (2, MANY, "moco")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        head: Literal["mlp", "linear"] = "mlp",
        layers: Few = 3,
        hidden: WidthOrZero = 0,
        out: Width = 2048,
        bottleneck: Width = 512,
    ):
        super().__init__()
        widths = head_widths(backbone.num_features, head, hidden, out, layers=layers)
        self.online = Encoder(backbone, mlp(widths, last_norm=True))
        self.predictor = mlp([out, bottleneck, out], last_bias=True)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        projections = each_view(self.online, views)  # (B, V, D)
        predictions = torch.stack([self.predictor(z) for z in projections.unbind(1)], dim=1)  # (B, V, D)
        return predictions, projections.detach()

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        predictions, projections = embeddings
        return simsiam(predictions, projections), {"embeddings": projections}
