"""CDO (Cao et al. 2023, "Collaborative discrepancy optimization for reliable image anomaly localization")."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Annotated, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from data.defects.noise import NoisePatches
from data.normalize import normalize
from losses.cdo import collaborative_discrepancy, discrepancy
from models.anomaly.detector import Detector, Findings, TrainingBatch
from models.anomaly.maps import ImageScore, image_score, peak, smooth_inside, upsample
from models.backbones import BACKBONES
from models.backbones.stages import stage_shapes, train_stages
from runtime.config import pick
from runtime.errors import UserError
from runtime.values import Range


class Version(NamedTuple):
    """What differs between the authors' two codes, beside the optimizer and the map (`CDO.measure`)."""

    enlarged: int  # noise patches are drawn on an image so many times larger and shrunk with it
    unit_levels: bool  # features have length 1 before the loss enlarges them
    image_score: ImageScore


VERSIONS = {"v1": Version(1, False, "max"), "v2": Version(4, True, "top1")}


class CDO(Detector):
    """An apprentice learns its expert's features on normal images and departs from them on patches of noise.

    Both of the authors' codes are here (github.com/caoyunkang/CDO). Map of v1: squared distances of the unit features,
    all at the first stage's resolution, summed over stages, enlarged without aligned corners. v2: one minus cosine of
    every stage at its own resolution, enlarged with aligned corners, averaged. Both: sigma 4. v2's features have unit
    length before its loss enlarges them.

    Different from them: the official backbone is HRNet-W32; v1 also names ResNets and v2 reads them as done here.
    v2 enlarges images to 1024 x 1024, here to 4 times their size, which is that for 256; its mean over stages is
    divided by 3 once more, which changes no ranking. Weight decay spares biases and norms. The last epoch is reported.

    Official training, 256 x 256 images. v1: AdamW, learning rate 4e-4 times 0.95 after every epoch, weight decay
    1e-4, batch 16, 50 epochs. v2: Adam with betas (0.5, 0.999), 1e-3, a tenth of it after 80 of 100 epochs, gradients
    cut to norm 5, batch 32.

    Args:
        backbone: the expert, any with stages 1 to 3; it is frozen and stays in eval mode.
        version: `v1` or `v2`.
        skip_background: with v1 only, patches keep off what is dark or bright, as for MVTec's bottle, hazelnut, metal
            nut, pill, screw, toothbrush and zipper in the official code.
        gamma: how much hard positions count, 0 (all alike) to 5; 2 in both codes.
        apprentice: a backbone of other depth whose stages 1-3 have the expert's shapes, as resnet18 for resnet34; none:
            the expert's own architecture, as in the official code.
        image_score: what of an image's map is its score; none: `max` for v1, `top1` for v2.

    Raises:
        UserError: bad options, a backbone without three stages of maps or unlike the apprentice, or with weights that
            cannot be drawn anew; at the first batch, images too small for a patch.
    """

    by_gradient = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        version: Literal["v1", "v2"] = "v2",
        skip_background: bool = False,
        gamma: Annotated[float, Range(least=0, most=5)] = 2.0,
        apprentice: str | None = None,
        image_score: ImageScore | None = None,
    ):
        super().__init__(backbone, (1, 2, 3))
        own = pick(VERSIONS, version, "cdo version")
        if skip_background and version != "v1":
            raise UserError("cdo skip_background is of version v1: set version=v1 or skip_background=false")
        self.version, self.gamma = version, gamma
        self.noise = NoisePatches(enlarged=own.enlarged, skip_background=skip_background)
        self.image_score = image_score or own.image_score
        other = backbone if apprentice is None else pick(BACKBONES, apprentice, "detector.apprentice")()
        shapes = [stage_shapes(network, 3) for network in (backbone, other)]
        if any(len(shape) != 3 for shape in shapes[0]):
            raise UserError(
                f"cdo compares 3 stages of maps, this backbone gives {shapes[0]}: set backbone.name to a CNN"
            )
        if shapes[0] != shapes[1]:
            raise UserError(
                f"detector.apprentice={apprentice} has stages {shapes[1]}, the expert {shapes[0]}: they must be equal"
            )
        self.apprentice = beginner(other, last=3)

    def networks(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1-3 of the expert and the apprentice, twice [(B, C_i, H_i, W_i)] in float32."""
        return self.features(images), [f.float() for f in self.apprentice.forward_stages(images, last=3)]

    def steps(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """The images with patches of noise on them, normalized, and where: (B, 3, H, W) and bool (B, H, W)."""
        noisy, abnormal = self.noise(batch.images, batch.ids, batch.epoch, seed=batch.seed)
        yield normalize(noisy, self.normalization), abnormal

    def forward(self, images: Tensor, abnormal: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on what `steps` gives; stats: mean discrepancies."""
        unit_levels = VERSIONS[self.version].unit_levels
        loss, means = collaborative_discrepancy(*self.networks(images), abnormal, self.gamma, unit_levels=unit_levels)
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

    Convolutions start as our and torchvision's CNNs, other layers by their `reset_parameters`.

    Raises:
        UserError: a layer has weights and no `reset_parameters`.
    """
    copy = deepcopy(backbone)
    train_stages(copy, last)
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
