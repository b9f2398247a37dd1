"""MoCo v3 (Chen, Xie & He 2021, "An empirical study of training self-supervised vision transformers")."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.info_nce import batch_nce
from models.heads import head_widths, mlp
from models.ssl.method import Encoder, SSLMethod, each_view, frozen_copy
from runtime.distributed import world_size
from runtime.values import Few, NonNegativeFloat, PositiveFloat, Width, WidthOrZero


class MoCoV3(SSLMethod):
    """A query finds its key, made by the moving average from another view, among those of the batch: no queue.

    Loss and heads of the official moco/builder.py; its ResNets have two layers in the projector and no batch norm at
    the predictor's end, its vision transformers three and one (`backbone.name=vit_moco_small` has their frozen patches
    and sine positions). A ResNet's residual blocks start as identities, in the official code
    (`backbone.zero_init_residual=true`).

    Args:
        temperature: 1.0 for ResNet-50, 0.2 for ViT.
        head: `mlp` or `linear`, of the projector.
        layers: of the projector.
        hidden: width of the hidden layers of projector and predictor; 0 takes the number of features, in the
            predictor `out`.
        out: width of the embedding that the loss sees.
        predictor_norm: batch norm at the predictor's end.
        gamma: of a focal term, see losses/focal.py; 0: none, as in the official code.
    """

    takes = (2, 2, "byol")
    least_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: PositiveFloat = 1.0,
        head: Literal["mlp", "linear"] = "mlp",
        layers: Few = 2,
        hidden: WidthOrZero = 4096,
        out: Width = 256,
        predictor_norm: bool = False,
        gamma: NonNegativeFloat = 0.0,
    ):
        super().__init__()
        self.temperature, self.gamma = temperature, gamma
        widths = head_widths(backbone.num_features, head, hidden, out, layers=layers)
        self.online = Encoder(backbone, mlp(widths, last_norm=True))
        self.predictor = mlp([out, hidden or out, out], last_norm=predictor_norm)
        self.target = frozen_copy(self.online)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        queries = torch.stack([self.predictor(self.online(view)) for view in views], dim=1)  # (B, 2, D)
        with torch.no_grad():
            keys = each_view(self.target, views)  # (B, 2, D)
        return queries, keys

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        queries, keys = embeddings
        loss = sum(
            batch_nce(queries[:, one], keys[:, other], self.temperature, gamma=self.gamma)
            for one, other in ((0, 1), (1, 0))
        )
        terms = len(queries) * world_size()
        chance = 4 * self.temperature * (1 - 1 / terms) ** self.gamma * math.log(terms)
        return loss, {"embeddings": queries.detach(), "chance_loss": torch.tensor(chance)}
