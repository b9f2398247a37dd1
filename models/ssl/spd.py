"""SPot-the-Difference (Zou et al., ECCV 2022): SPD beside the loss of any pretraining method."""

from torch import Tensor, nn

from losses.spd import spd
from models.ssl.method import SSLMethod, all_views
from runtime.errors import UserError


class SPD(nn.Module):
    """method(views, labels) + weight * spd of the projections of three further views: anchor, positive, negative.

    The projection is what `method.online` makes of a view: SimCLR's embedding; for DINO the K logits, whose cosine is
    about that of the bottleneck before them (with 4096 random prototypes in 256 dimensions 0.008 off on average). An
    EMA target takes no part.

    The three views pass in one forward of their own: the method's batch norm sees the method's views alone, and
    positives and negatives are normalized together, so that nothing but the defect tells them apart. Running statistics
    take the three like any batch. No parameters, no buffers: the loop works with `method`, and checkpoints do not
    contain it.
    """

    def __init__(self, method: SSLMethod, weight: float):
        super().__init__()
        if not method.projects:
            name = type(method).__name__
            raise UserError(f"spd compares projections, and {name} makes none: remove spd, or take another method")
        self.method, self.weight = method, weight

    def check_views(self, number: int) -> None:
        self.method.check_views(number - 3)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        embeddings = self.method.embed(views[:-3])
        projections = all_views(self.method.online, views[-3:])  # (B, 3, D)
        return *embeddings, projections

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.method.criterion(embeddings[:-1], labels)
        term, similarity = spd(*embeddings[-1].unbind(1))
        return loss + self.weight * term, stats | {"spd": term.detach(), "defect_cosine": similarity.detach()}

    def forward(self, views: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_views(len(views))
        return self.criterion(self.embed(views), labels)
