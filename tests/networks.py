"""Networks that tests share."""

from itertools import pairwise

from torch import Tensor, nn


class Tokens(nn.Module):
    """A backbone whose stages are no maps."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return [self.embed(x).flatten(2)] * last  # (B, 8, N)


class FourStages(nn.Module):
    """A backbone of few operations: four stages of a convolution each, 8 to 64 channels at stride 2 to 16."""

    num_features = 64

    def __init__(self):
        super().__init__()
        widths = (3, 8, 16, 32, 64)
        for number, (before, after) in enumerate(pairwise(widths), 1):
            layers = nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
            setattr(self, f"layer{number}", nn.Sequential(*layers))

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        maps = [x]
        for number in range(1, last + 1):
            maps.append(getattr(self, f"layer{number}")(maps[-1]))
        return maps[1:]  # (B, 8, h/2, w/2), ...

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1].mean((2, 3))  # (B, 64)
