"""NSA (Schlüter et al. 2022, "Natural synthetic anomalies for self-supervised anomaly detection and localization")."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment.random_numbers import KINDS, uniform, whole
from data.defects.blend import moved
from data.defects.nsa import Background, NSADefect, PatchSides
from data.normalize import normalize
from models.anomaly.detector import Detector, Findings, TrainingBatch
from models.anomaly.maps import ImageScore, image_score, peak
from models.backbones.stages import stage_shapes, train_stages
from runtime.distributed import gather, rank
from runtime.errors import UserError
from runtime.memory import send
from runtime.precision import at_least_float32
from runtime.values import BelowOne, Few, NonNegativeFloat, PixelsOrZero, PositiveFloat, Range, RisingFactors

ENCODER = ("conv1.", "bn1.", "layer")  # how names of the ResNet's parameters begin in an official checkpoint


ENLARGED = 32  # how many times as high and wide the logits are as the decoder's input


class TransposedBlock(nn.Module):
    """ResNet-18's block backwards: (B, inputs, H, W) -> (B, planes, 2H, 2W). The official TransposeBasicBlock."""

    def __init__(self, inputs: int, planes: int):
        super().__init__()
        double = {"stride": 2, "output_padding": 1, "bias": False}
        self.conv1, self.bn1 = nn.ConvTranspose2d(inputs, planes, 3, padding=1, **double), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.upsample = nn.Sequential(nn.ConvTranspose2d(inputs, planes, 1, **double), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.upsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class LocalizationDecoder(nn.Module):
    """The half of the official resnet18_enc_dec (model/resnet.py, `pool=True`, `preact=False`) behind its ResNet.

    Convolutions start by He initialization, fan out; transposed ones keep PyTorch's default, as there. The sigmoid is
    left to the caller.

    Args:
        inputs: channels of the backbone's last stage, 512 in the official network.
    """

    def __init__(self, inputs: int):
        super().__init__()
        to_256, to_128 = (nn.Conv2d(i, o, 1, bias=False) for i, o in ((inputs, 256), (256, 128)))
        self.nin = nn.Sequential(to_256, nn.ReLU(), to_128, nn.ReLU())
        self.uplayer1 = nn.Sequential(TransposedBlock(128, 64))
        self.uplayer2 = nn.Sequential(TransposedBlock(64, 32))
        self.uplayer3 = nn.Sequential(TransposedBlock(32, 16))
        self.convtranspose1 = nn.ConvTranspose2d(16, 1, 7, stride=2, padding=3, output_padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> logits (B, 32H, 32W)."""
        x = self.uplayer3(self.uplayer2(self.uplayer1(self.nin(x))))  # (B, 16, 8H, 8W)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.convtranspose1(x)[:, 0]


class NSA(Detector):
    """Backbone and decoder are trained together to find patches that Poisson blending put there from another image.

    Network, labels, loss and score of the official code (github.com/hmsch/natural-synthetic-anomalies). The parameters
    carry its names, so that `detector.weights=<an official checkpoint> epochs=0` tests one. The loss is the mean binary
    cross-entropy over pixels with the soft labels of `data/defects/nsa.py`; the map is the probability of each pixel,
    and its mean the image's score. As there the patches come from the image before, here of the batch of all ranks (of
    the first one the last, and a batch of one is its own source).

    The official training (Shift-Intensity for objects, Shift-Intensity-M for textures): from random weights, Adam, 1e-3
    by a cosine to 1e-6, batch 64, 320 epochs (hazelnut, metal nut, screw 560). Objects are seen 224 x 224 of 256 x 256
    (data.size=224 data.fit=crop data.resize=256) with `shift=3`, textures 256 x 256 with `shift=4 flip=true`.

    Different from them: images are resized by `data.resample`, there by Lanczos; a shifted or turned image repeats
    its edge pixels, where theirs is cut from a slightly larger one (textures at 264, so 3 % larger than in the test);
    the strip that the crop leaves out does not count in the pixel metrics, where they give it 0; the cosine falls at
    every step, not epoch; the last incomplete batch is left out; what `data/defects/nsa.py` lists.

    Args:
        backbone: the encoder, any whose stage 4 is a map at 1/32 of the input; it is trained from what it has. Weights
            that stage 4 does not depend on stay without gradient.
        gradients: of a patch: `source`, its own, or `mixed`, the steeper of its own and the image's.
        patches: at most, of an image.
        bounds: least and largest height and width of a patch, as shares of the image's.
        widths: bounds of the widths alone; none: those of the heights.
        resize: least and largest factor on a patch; 0.5,2 for textures, 0.7,1.3 for objects.
        steepness: k of the logistic labels; the authors' for each category are in configs/nsa_mvtec.yaml.
        middle: gray levels of change that the labels call 1/2, x0 of the logistic labels.
        background: gray level of the background and its tolerance; none: all is object.
        min_object: least share of object in a patch, where there is a background.
        shift: pixels that images and sources move at most, up or down and left or right.
        turn: degrees that they turn at most, either way; 5 for bottle, hazelnut, metal nut and screw.
        flip: turn half of them upside down.
        image_score: what of an image's map is its score; the paper's is `mean`.

    Raises:
        UserError: bad options, another backbone; at the first batch, images too small for a patch, or with a side
            that is no multiple of 32.
    """

    by_gradient = True
    frozen = False

    def __init__(
        self,
        backbone: nn.Module,
        *,
        gradients: Literal["source", "mixed"] = NSADefect.gradients,
        patches: Few = NSADefect.patches,
        bounds: PatchSides = NSADefect.bounds,
        widths: PatchSides | None = NSADefect.widths,
        resize: RisingFactors = NSADefect.resize,
        steepness: PositiveFloat = NSADefect.steepness,
        middle: NonNegativeFloat = NSADefect.middle,
        background: Background | None = NSADefect.background,
        min_object: BelowOne = NSADefect.min_object,
        shift: PixelsOrZero = 0,
        turn: Annotated[float, Range(least=0, most=180)] = 0.0,
        flip: bool = False,
        image_score: ImageScore = "mean",
    ):
        super().__init__(backbone, (4,))
        self.defects = NSADefect(
            gradients=gradients,
            patches=patches,
            bounds=bounds,
            widths=widths,
            resize=resize,
            steepness=steepness,
            middle=middle,
            background=background,
            min_object=min_object,
        )
        self.shift, self.turn, self.flip, self.image_score = shift, turn, flip, image_score
        last = stage_shapes(backbone, 4, size=64)[-1]
        if last[1:] != (64 // ENLARGED, 64 // ENLARGED):
            raise UserError(
                f"nsa enlarges the backbone's last stage {ENLARGED} times, but of 64 x 64 pixels it makes {last}, "
                "not (C, 2, 2): set backbone.name to a CNN, without backbone.stem=cifar"
            )
        train_stages(backbone, last=4)
        self.decoder = LocalizationDecoder(last[0])

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Also an official checkpoint, the ResNet's parameters and the decoder's side by side: plain, as the `final_`
        files, or under "model_state_dict" with the optimizer's beside it, as those that are saved in training."""
        if isinstance(state.get("model_state_dict"), dict):
            state = state["model_state_dict"]
        if "convtranspose1.weight" in state:
            state = {("backbone." if n.startswith(ENCODER) else "decoder.") + n: value for n, value in state.items()}
        return super().load_trained(state, path)

    def steps(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """The images with patches blended in, normalized, and soft labels: (B, 3, H, W) and (B, H, W) in [0, 1)."""
        before = gather(batch.images[-1:])[rank() - 1][None]  # the last image of the process before this one
        sources = self.varied(torch.cat([before, batch.images[:-1]]), batch, 1)
        images = self.varied(batch.images, batch, 0)
        made, masks = self.defects(images, batch.ids, batch.epoch, seed=batch.seed, sources=sources)
        yield normalize(made, self.normalization), self.defects.labels(images, made, masks)

    def varied(self, images: Tensor, batch: TrainingBatch, view: int) -> Tensor:
        """uint8 (B, 3, H, W), each turned, shifted and flipped by chance: nearest pixels, edges repeated."""
        if not (self.shift or self.turn or self.flip):
            return images
        numbers = uniform((batch.seed, batch.epoch, view, batch.ids, *KINDS["nsa_images"]), 4)
        size = torch.tensor(images.shape[2:]).expand(len(images), 2)
        center = size / 2 + whole(numbers[:, :2], -self.shift, self.shift)
        angles = torch.deg2rad(self.turn * (2 * numbers[:, 2] - 1))
        images, _ = moved(images, torch.zeros_like(size), size, center, angles)
        upside_down = send((numbers[:, 3] < 0.5) & self.flip, images.device)
        return torch.where(upside_down[:, None, None, None], images.flip(2), images)

    def networks(self, images: Tensor) -> Tensor:
        """Logits (B, H, W) in at least float32."""
        last = self.backbone.forward_stages(images)[-1]
        if tuple(last.shape[2:]) != tuple(side / ENLARGED for side in images.shape[2:]):
            raise UserError(
                f"nsa's decoder enlarges {ENLARGED} times, but the backbone makes {tuple(last.shape[2:])} of "
                f"{tuple(images.shape[2:])}: set data.size to multiples of {ENLARGED}"
            )
        logits = self.decoder(last)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on what `steps` gives; stats: the mean probability of pixels that are defects and of those that are not,
        0 where there are none."""
        logits = self.networks(images)
        loss = at_least_float32(F.binary_cross_entropy_with_logits)(logits, labels)
        probability, stats = logits.detach().sigmoid(), {}
        for name, pixels in (("normal", labels == 0), ("defect", labels > 0)):
            stats[f"probability_{name}"] = (probability * pixels).sum() / pixels.sum().clamp(min=1)
        return loss, stats

    def measure(
        self,
        outputs: Tensor,
        size: tuple[int, int],  # noqa: ARG002
        valid: Tensor | None = None,
        leave_out: None = None,  # noqa: ARG002
    ) -> Findings:
        maps = outputs.sigmoid()  # (B, H, W); what convolutions saw of padding is in them
        return Findings(image_score(maps, valid, self.image_score), maps, peak(maps, valid))
