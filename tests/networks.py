"""Networks that tests share."""

from torch import Tensor, nn


class Tokens(nn.Module):
    """A backbone whose stages are no maps."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return [self.embed(x).flatten(2)] * last  # (B, 8, N)
