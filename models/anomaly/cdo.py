"""CDO (Cao et al. 2023, "Collaborative discrepancy optimization for reliable image anomaly localization")."""

from copy import deepcopy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize, unnormalize
from data.noise_patches import covered, rectangles
from losses.cdo import collaborative_discrepancy, discrepancy
from models.anomaly.detector import Detector, Findings
from models.anomaly.maps import ImageScore, image_score, peak, smooth_inside, upsample
from training.errors import UserError


class Version(NamedTuple):
    """What differs between the authors' two codes, beside the optimiser and the map (`CDO.measure`)."""

    enlarged: int  # noise patches are drawn on a picture so many times larger and shrunk with it
    image_score: ImageScore


VERSIONS = {"v1": Version(1, "max"), "v2": Version(4, "top1")}


class CDO(Detector):
    """An apprentice learns its expert's features on normal pictures and departs from them on patches of noise.

    Both of the authors' codes are here (github.com/caoyunkang/CDO). Map of v1: squared distances of the unit features,
    all at the first stage's resolution, summed over stages, enlarged without aligned corners. v2: one minus cosine of
    every stage at its own resolution, enlarged with aligned corners, averaged. Both: sigma 4.

    Different from them: the official backbone is HRNet-W32; v1 also names ResNets and v2 reads them as done here.
    v2 enlarges pictures to 1024 x 1024, here to 4 times their size, which is that for 256; its mean over stages is
    divided by 3 once more, which changes no ranking. Weight decay spares biases and norms. The last epoch is reported.

    Official training, 256 x 256 pictures. v1: AdamW, learning rate 4e-4 times 0.95 after every epoch, weight decay
    1e-4, batch 16, 50 epochs. v2: Adam with betas (0.5, 0.999), 1e-3, a tenth of it after 80 of 100 epochs, gradients
    cut to norm 5, batch 32.

    Args:
        backbone: the expert, any with stages 1 to 3; it is frozen and stays in eval mode.
        version: `v1` or `v2`.
        skip_background: with v1 only, patches keep off what is dark or bright, as for MVTec's bottle, hazelnut, metal
            nut, pill, screw, toothbrush and zipper in the official code.
        gamma: how much hard positions count, 0 (all alike) to 5; 2 in both codes.
        image_score: what of a picture's map is its score; none: `max` for v1, `top1` for v2.

    Raises:
        UserError: bad options, a backbone without three stages of maps, or with weights that cannot be drawn anew; at
            the first batch, pictures too small for a patch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        version: Literal["v1", "v2"] = "v2",
        skip_background: bool = False,
        gamma: float = 2.0,
        image_score: ImageScore | None = None,
    ):
        super().__init__(backbone, (1, 2, 3))
        if version not in VERSIONS:
            raise UserError(f"cdo version={version}: it is v1 or v2")
        if skip_background and version != "v1":
            raise UserError("cdo skip_background is of version v1: set version=v1 or skip_background=false")
        if not 0 <= gamma <= 5:
            raise UserError(f"cdo gamma={gamma}: from 0 (all positions weigh the same) to 5; the paper's is 2")
        self.version, self.skip_background, self.gamma = version, skip_background, gamma
        self.image_score = image_score or VERSIONS[version].image_score
        self.apprentice = beginner(backbone, last=3)

    def networks(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1-3 of the expert and the apprentice, twice [(B, C_i, H_i, W_i)] in float32."""
        return self.features(images), [f.float() for f in self.apprentice.forward_stages(images, last=3)]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on normalised (B, 3, H, W) normal pictures, on which it puts noise; stats: mean discrepancies."""
        images, abnormal = with_noise(images, VERSIONS[self.version].enlarged, self.skip_background)
        loss, means = collaborative_discrepancy(*self.networks(images), abnormal, self.gamma)
        return loss, {f"discrepancy_{name}": mean for name, mean in means.items()}

    def measure(
        self,
        outputs: tuple[list[Tensor], list[Tensor]],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: None = None,  # noqa: ARG002
    ) -> Findings:
        if self.version == "v1":
            maps = upsample(discrepancy(*outputs).sum(0), size, align_corners=False)  # (B, H, W)
        else:
            levels = [1 - F.cosine_similarity(expert, apprentice) for expert, apprentice in zip(*outputs)]
            maps = sum(upsample(level, size, align_corners=True) for level in levels) / len(levels)  # (B, H, W)
        maps = smooth_inside(maps, valid)  # what convolutions saw of padding is in the features
        return Findings(image_score(maps, valid, self.image_score), maps, peak(maps, valid))


def beginner(backbone: nn.Module, last: int) -> nn.Module:
    """A copy of the backbone with new random weights, of which those that stages 1 to `last` depend on are trainable.

    Convolutions start as our and torchvision's CNNs, other layers by their `reset_parameters`. The rest stays without
    gradient, for DistributedDataParallel waits for every trainable parameter.

    Raises:
        UserError: the stages are no maps, or a layer has weights and no `reset_parameters`.
    """
    copy = deepcopy(backbone).requires_grad_(True)
    parameters = list(copy.parameters())
    maps = copy.forward_stages(parameters[0].new_zeros(1, 3, 224, 224), last=last)
    shapes = [tuple(feature.shape) for feature in maps]
    if len(shapes) != last or any(len(shape) != 4 for shape in shapes):
        raise UserError(
            f"cdo compares {last} stages of maps (B, C, H, W), this backbone gives {shapes}: set backbone.name to a CNN"
        )
    gradients = torch.autograd.grad(sum(feature.sum() for feature in maps), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)
    for name, layer in copy.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        elif list(layer.parameters(recurse=False)):
            raise UserError(f"cdo cannot draw new weights for '{name}' of this backbone: set backbone.name to a CNN")
    return copy.train()


def with_noise(images: Tensor, enlarged: int, skip_background: bool = False) -> tuple[Tensor, Tensor]:
    """Pictures with patches of uniform colour noise on them, and where: (B, 3, H, W) and bool (B, H, W).

    Intensities are 0 to 254, independent at every pixel and channel of a picture `enlarged` times as high and wide,
    which is then shrunk (bilinear, antialiased): at 4, as in v2, the noise becomes weaker and its edges soft. Random
    numbers come from torch's generator of the images' device.
    """
    size = [enlarged * side for side in images.shape[-2:]]
    if min(size) < 40:
        raise UserError(
            f"cdo draws patches of a fortieth of the side and more, none on {tuple(images.shape[-2:])}: raise data.size"
        )
    away = background(images) if skip_background else None
    patches = patch_mask(len(images), size, images.device, away)[:, None]  # (B, 1, h, w)
    noise = torch.randint(255, (len(images), 3, *size), dtype=torch.uint8, device=images.device)
    noise, share = normalize(noise) * patches, patches.to(images.dtype)
    if enlarged > 1:
        noise, share = (
            F.interpolate(x, images.shape[-2:], mode="bilinear", antialias=True) for x in (noise, share)
        )  # (B, 3, H, W) and (B, 1, H, W)
    return images * (1 - share) + noise, share[:, 0] > 0


def background(images: Tensor) -> Tensor:
    """Where a normalised picture is dark (gray below 30 of 255) or bright (above 220), as official v1: specks taken out
    by the median of 7 x 7, the rest grown by 9 pixels; (B, 3, H, W) -> bool (B, H, W)."""
    summed = (255 * unnormalize(images)).sum(1, keepdim=True).round()  # (B, 1, H, W) whole numbers, three times gray
    found = ((summed < 3 * 30) | (summed > 3 * 220)).to(images.dtype)
    share = F.avg_pool2d(F.pad(found, (3, 3, 3, 3), mode="replicate"), 7, stride=1)  # above 1/2 where the median is 1
    return F.max_pool2d((share > 0.5).to(images.dtype), 19, stride=1, padding=9)[:, 0] > 0  # (B, H, W)


def patch_mask(count: int, size: list[int], device: torch.device, away: Tensor | None = None) -> Tensor:
    """0 to 4 of the rectangles of data/noise_patches.py a picture: bool (B, h, w).

    `away`: bool (B, h, w), where no centre may lie: of 200 rectangles the first that obeys is taken, or none.
    """
    shown = torch.arange(4, device=device) < torch.randint(5, (count, 1), device=device)  # (B, 4)
    tries = 1 if away is None else 200
    numbers = torch.rand(2, count, 4, tries, 2, dtype=torch.float64, device=device)
    ends = rectangles(*numbers, size)  # (B, 4, tries, 2 axes, 2 ends)
    if away is not None:
        y, x = (ends.sum(4) // 2).long().unbind(3)  # (B, 4, tries)
        free = ~away.flatten(1).gather(1, (y * size[1] + x).flatten(1)).view_as(y)  # (B, 4, tries)
        shown = shown & free.any(2)
        first = free.to(torch.uint8).argmax(2)[..., None, None, None].expand(-1, -1, 1, 2, 2)
        ends = ends.gather(2, first)  # (B, 4, 1, 2, 2)
    return covered(ends[:, :, 0] * shown[..., None, None], size)
