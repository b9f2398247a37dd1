"""SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual representations")."""

import torch
from torch import Tensor, nn

from losses.nt_xent import nt_xent
from models.heads import projection_head
from models.ssl.method import Encoder, SSLMethod, spread
from training.errors import UserError


class SimCLR(SSLMethod):
    """Two views of a picture attract each other, all other pictures of the batch repel.

    Args:
        temperature: 0.1 for ImageNet at batch 4096, 0.5 for CIFAR-10 at batch 512 (official README); smaller batches
            want 0.2 to 0.5.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features, as the paper does.
        out: width of the embedding that the loss sees.
    """

    def __init__(self, backbone: nn.Module, *, temperature: float = 0.5, hidden: int = 0, out: int = 128):
        super().__init__()
        self.temperature = temperature
        head = projection_head(backbone.num_features, hidden or backbone.num_features, out)
        self.online = Encoder(backbone, head)

    def forward(self, views: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        if len(views) != 2:
            raise UserError(f"simclr compares 2 views, and the augment recipe makes {len(views)}: use augment=simclr")
        # Both views in one pass, so that BatchNorm sees them together, as in the TensorFlow original
        z1, z2 = self.online(torch.cat(views)).chunk(2)  # (2B, D) -> 2 x (B, D)
        loss = nt_xent(z1, z2, self.temperature)
        return loss, {"embedding_spread": spread(z1)}
