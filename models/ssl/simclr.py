"""SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual representations")."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.nt_xent import nt_xent
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, all_views
from models.ssl.queue import Queue
from runtime.distributed import world_size
from runtime.values import NonNegativeFloat, PositiveFloat, Width, WidthOrZero


class SimCLR(SSLMethod):
    """The views of an image attract each other, all other images of the batch repel.

    In the official code the backbone's residual blocks start as identities (`backbone.zero_init_residual=true`), and a
    batch norm with a gain follows the head's last layer, too; here none does, as in solo-learn.

    Args:
        temperature: 0.1 for ImageNet at batch 4096, 0.5 for CIFAR-10 at batch 512 (official README); smaller batches
            want 0.2 to 0.5.
        head: `mlp`, two layers, or `linear`.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features, as the paper does.
        out: width of the embedding that the loss sees.
        bank: embeddings of so many earlier views repel, too (a memory bank); 0: none, as in the paper.
        gamma: of a focal term, see losses/focal.py; 0: none, as in the paper.
    """

    takes = (2, MANY, "simclr")
    least_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: PositiveFloat = 0.5,
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 0,
        out: Width = 128,
        bank: WidthOrZero = 0,
        gamma: NonNegativeFloat = 0.0,
    ):
        super().__init__()
        self.temperature, self.gamma = temperature, gamma
        widths = head_widths(backbone.num_features, head, hidden, out)
        self.online = Encoder(backbone, mlp(widths, bias=True, last_bias=True))
        self.bank = Queue(bank, out) if bank else None

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return (all_views(self.online, views),)  # together, as in the TensorFlow original

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        (z,) = embeddings  # (B, V, D)
        others = z.shape[0] * z.shape[1] * world_size() - 1
        if self.bank is None:
            loss = nt_xent(z, self.temperature, gamma=self.gamma)
        else:
            loss = nt_xent(z, self.temperature, bank=self.bank.rows, gamma=self.gamma)
            self.bank.hold(z.flatten(0, 1))  # (B V, D)
            others += len(self.bank.rows)
        chance = (1 - 1 / others) ** self.gamma * math.log(others)
        return loss, {"embeddings": z.detach(), "chance_loss": torch.tensor(chance)}

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        if self.bank is not None:
            self.bank.push()
