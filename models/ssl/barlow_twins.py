"""Barlow Twins (Zbontar et al. 2021, "Self-supervised learning via redundancy reduction"; official main.py)."""

from typing import Literal

from torch import Tensor, nn

from losses.barlow_twins import barlow_twins
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, each_view
from runtime.errors import UserError
from runtime.values import NonNegativeFloat, Width, WidthOrZero


class BarlowTwins(SSLMethod):
    """Each dimension of the embedding agrees between views and is uncorrelated with all other dimensions.

    In the official code the backbone's residual blocks start as identities (`backbone.zero_init_residual=true`), and
    biases and norms have a learning rate of their own (`optim.bias_lr_scale=0.024`).

    Args:
        weight: lambda, of the off-diagonal terms.
        gradient: `exact`, or `official`, which is 1 / W of it with W processes; see losses/barlow_twins.py.
        head: `mlp`, three layers, or `linear`.
        hidden: width of its hidden layers; 8192 for ImageNet.
        out: width of the embedding that the loss sees; 8192 for ImageNet.
    """

    takes = (2, MANY, "byol")
    least_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        weight: NonNegativeFloat = 0.0051,
        gradient: Literal["exact", "official"] = "exact",
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 8192,
        out: Width = 8192,
    ):
        super().__init__()
        if gradient not in ("exact", "official"):
            raise UserError(f"method.gradient={gradient!r} is unknown; one of: exact, official")
        self.weight, self.gradient = weight, gradient
        self.online = Encoder(backbone, mlp(head_widths(backbone.num_features, head, hidden, out, layers=3)))

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return (each_view(self.online, views),)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        (z,) = embeddings  # (B, V, D)
        return barlow_twins(z, self.weight, gradient=self.gradient), {"embeddings": z.detach()}
