"""SupCon (Khosla et al. 2020, "Supervised contrastive learning")."""

from typing import Literal

import torch
from torch import Tensor, nn

from losses.sup_con import sup_con
from models.heads import projection_head
from models.ssl.method import Encoder, SSLMethod, spread
from training.errors import UserError


class SupCon(SSLMethod):
    """All views of all pictures of a class attract each other, those of other classes repel: SimCLR with labels.

    Head and loss of the official code (github.com/HobbitLong/SupContrast), whose heads have no batch norm. Any number
    of views; official are two.

    Args:
        temperature: 0.1 officially, for CIFAR-10 and ImageNet.
        base_temperature: the loss is multiplied by temperature / base_temperature, officially 0.1 / 0.07.
        form: `out`, the paper's and the official code's, or `in`, which is worse; see losses/sup_con.py.
        head: `mlp`, two layers, or `linear`.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features, as officially.
        out: width of the embedding that the loss sees.

    Raises:
        UserError: another form or head.
    """

    needs_labels = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        form: Literal["out", "in"] = "out",
        head: Literal["mlp", "linear"] = "mlp",
        hidden: int = 0,
        out: int = 128,
    ):
        super().__init__()
        if form not in ("out", "in") or head not in ("mlp", "linear"):
            raise UserError(f"supcon form={form} head={head}: it is out or in, and mlp or linear")
        self.temperature, self.base_temperature, self.form = temperature, base_temperature, form
        features = backbone.num_features
        projection = (
            projection_head(features, hidden or features, out, batch_norm=False)
            if head == "mlp"
            else nn.Linear(features, out)
        )
        self.online = Encoder(backbone, projection)

    def forward(self, views: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = torch.stack(self.online(torch.cat(views)).chunk(len(views)), dim=1)  # (V B, D) -> (B, V, D)
        loss = sup_con(z, labels, self.temperature, base_temperature=self.base_temperature, form=self.form)
        return loss, {"embedding_spread": spread(z[:, 0])}
