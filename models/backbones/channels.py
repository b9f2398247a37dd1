"""One channel of an image for a backbone: gray images, or one of the colors, for weights trained on three."""

from typing import Literal

from torch import Tensor, nn

from runtime.errors import UserError

Channel = Literal["all", "red", "green", "blue"]
OneChannel = Literal["copy", "learned"]


def take_channel(backbone: nn.Module, channel: Channel, how: OneChannel) -> None:
    """Let every stem of `backbone`, a convolution of the images (B, 3, H, W), see one of their channels alone.

    A stem of one channel (`in_channels=1`) sees it as it is; for it, models/weights/load.py sums the weights of the
    three, which gives the output of `copy` with a third of the stem's work. A stem of three sees it as

        copy: repeated three times;
        learned: three channels from a 1x1 convolution, `to_rgb` in the stem, which starts as a copy and is trained
            whenever the backbone is.

    The channels of a gray image are equal before they are normalized and, by ImageNet's mean and deviation of each
    color, not quite afterwards; any of them can be taken.

    Raises:
        UserError: `learned` for a stem of one channel.
    """
    number = ("red", "green", "blue").index(channel)

    def pick(stem: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor:
        one = inputs[0][:, number : number + 1]  # (B, 1, H, W)
        if how == "learned":
            return stem.to_rgb(one)  # (B, 3, H, W)
        return one.expand(-1, stem.in_channels, -1, -1)  # (B, 1 or 3, H, W)

    stems = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels in (1, 3)]
    for name, stem in stems:
        stem.register_forward_pre_hook(pick)
        if how == "learned":
            if stem.in_channels == 1:
                raise UserError("backbone.one_channel=learned makes three channels: set backbone.in_channels=3")
            stem.to_rgb = nn.Conv2d(1, 3, 1)
            nn.init.ones_(stem.to_rgb.weight)
            nn.init.zeros_(stem.to_rgb.bias)
            backbone.may_lack = (*getattr(backbone, "may_lack", ()), f"{name}.to_rgb")
