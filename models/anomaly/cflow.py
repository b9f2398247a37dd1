"""CFlow-AD (Gudovskiy et al. 2022, "CFLOW-AD: real-time unsupervised anomaly detection with localization via
conditional normalizing flows")."""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from data.augment.random_numbers import KINDS, between, stream
from data.defects.blend import draw, moved
from data.normalize import normalize
from losses.flow_likelihood import flow_likelihood, log_density
from models.anomaly.cflow_networks import ConditionalFlow, encode_positions
from models.anomaly.detector import Batch, Detector, Findings, Stage, TrainingBatch
from models.anomaly.maps import ImageScore, grid_valid, image_score, peak, upsample
from models.backbones.mobilenet_v3 import MobileNetV3
from runtime.distributed import gather_rows, world_size
from runtime.errors import UserError
from runtime.values import Few, PositiveInt, Range, coerce
from search.bounds import require_finite

ENCODING = 128  # numbers that describe a position, the official condition_vec
Split = Literal["train", "test"]
ROWS = 2**14  # vectors that are scored at a time


class CFlow(Detector):
    """A normalizing flow per stage learns how likely a feature vector is at its position in a normal image.

    **Score.** With log p the log-likelihood of a position of stage l, C its channels and m_l a constant of the stage:

        likelihood_l = exp(min(log p / C - m_l, 0)),    map = number of stages - sum_l enlarge(likelihood_l)

    bilinear with aligned corners, without a blur: 0 (as normal as can be) to the number of stages. `normalize` says
    what m_l is. `train`: the largest log p / C of the normal training images, found after training, so that a
    image's score depends on no other test image. `test`: the largest of the whole test set, as in the official
    code, which subtracts the sum from its maximum and not from the number of stages: one constant for all pixels, so
    all metrics are the official ones, but no image can be scored before all are there. From `train` to `test` each
    stage's likelihood changes by one factor, exp(m_l of train - m_l of test), beside positions that are likelier than
    any in training: those count as the likeliest. Heat maps and thresholds of `test` know the test set too.

    **Training.** In the official code every stage's vectors of a batch, shuffled, make fibers of 256, and each fiber an
    optimizer step of its flow. Here a fiber has equally many positions of every image of the batch, each image's in a
    random order of its own, so that processes train as one: a stratified draw instead of a uniform one. What is left
    over is dropped, as in the official code. Padding is trained on like the image; no map shows it. Positions count
    from the top left corner, so whole images of the trained size alone make sense.

    **Different from the official code**, beside that: images are resized by `data.resample`, there by Lanczos. A flow
    rests while others train; with torch before 2.0 Adam's momentum went on moving it, as zeroed gradients are
    gradients. The learning rate follows its curve batch by batch: in the official code it is constant for 8 of 200
    epochs at a time, warms up from a tenth of it and not from 0, and goes on from there along a cosine that began with
    the warm-up. The last epoch is reported, not each metric's best on the test set. Official recipe: Wide-ResNet-50-2
    with `reflect`, batch 32, Adam with learning rate 2e-4, 25 x 8 epochs, squashed images of 512 pixels, but 256 for
    cable, capsule, hazelnut, metal nut, pill and 128 for transistor.

    Args:
        backbone: the encoder, any whose stages are maps; it is frozen and stays in eval mode.
        stages: each has a flow; the last three in the official code.
        blocks: couplings of a flow.
        fiber: vectors of an optimizer step, at most: rounded down to equally many of every image, at least one.
        rotation: training images are turned by up to so many degrees, black where nothing is left.
        reflect: the backbone's convolutions continue a map by its mirror image, not by zeros, as the official ResNets
            do though ImageNet's weights learned with zeros; with `backbone.padding=tensorflow` on TensorFlow's sides.
            Needs maps of at least 2 x 2.
        before_norm: the flows see what the last convolution of each stage gives, before its batch norm and the
            shortcut, as behind the official MobileNetV3s; for a MobileNetV3.
        normalize: set whose extremes scale each stage's likelihoods: `train` or `test`, above.
        image_score: what of an image's map is its score; the paper's is `max`.

    Raises:
        UserError: bad options, or a backbone that they do not suit; a stage that is no map or has one channel; at the
            first batch, a stage with too few positions for a fiber, or maps too small for `reflect`.
    """

    by_gradient = True
    fits = True
    partial = True
    positional = True
    trained_with = ("reflect", "before_norm")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: tuple[Stage, ...] = (2, 3, 4),
        blocks: Few = 8,
        fiber: PositiveInt = 256,
        rotation: Annotated[float, Range(least=0, most=180)] = 5.0,
        reflect: bool = False,
        before_norm: bool = False,
        normalize: Split = "train",
        image_score: ImageScore = "max",
    ):
        super().__init__(backbone, stages)
        if before_norm and not isinstance(backbone, MobileNetV3):
            raise UserError(
                "cflow before_norm=true is what the official MobileNetV3s need: set backbone.name=mobilenet_v3_large "
                "or mobilenet_v3_small, or detector.before_norm=false"
            )
        self.fiber, self.rotation, self.image_score = fiber, rotation, image_score
        self.reflect, self.before_norm = reflect, before_norm
        self.fitted_on = coerce(normalize, Split, "cflow normalize")
        padded = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.padding != (0, 0)] if reflect else []
        if reflect and not padded:
            raise UserError(
                "cflow reflect=true changes nothing: this backbone's convolutions do not pad; set it to false"
            )
        for layer in padded:
            layer.padding_mode = "reflect"
        shapes = [tuple(f.shape) for f in self.features(next(backbone.parameters()).new_zeros(1, 3, 224, 224))]
        if any(len(shape) != 4 or shape[1] < 2 for shape in shapes):
            raise UserError(
                f"cflow needs stages that are maps (B, C, H, W) of 2 channels or more, but stages {list(stages)} of "
                f"this backbone give {shapes}: set detector.stages or backbone.name"
            )
        self.flows = nn.ModuleList(ConditionalFlow(shape[1], ENCODING, blocks) for shape in shapes)
        self.register_buffer("likeliest", torch.empty(0))  # m_l, (L,)

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Also an official checkpoint, {"encoder_state_dict": ..., "decoder_state_dict": [...]}, of its ResNets and
        MobileNetV3s. The inverses of the rotations, which FrEIA keeps, are not used.

        Raises:
            UserError: as Detector's; `reflect` and `before_norm` are not those of the official encoder.
        """
        unused = []
        if {"encoder_state_dict", "decoder_state_dict"} <= state.keys():
            encoder = state["encoder_state_dict"]
            mobile = "0.0.weight" in encoder  # MobileNetV3's `features` alone
            if mobile or "conv1.weight" in encoder:
                self.require_encoder("MobileNetV3s" if mobile else "ResNets", path, reflect=not mobile)
            parts = {"backbone.features" if mobile else "backbone": encoder}
            parts |= {f"flows.{i}": flow for i, flow in enumerate(state["decoder_state_dict"])}
            state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
            unused = [name for name in state if name.endswith("w_perm_inv")]
            state = {name: value for name, value in state.items() if not name.endswith("w_perm_inv")}
        return super().load_trained(state, path) + unused

    def require_encoder(self, kind: str, path: str, *, reflect: bool) -> None:
        """The official ResNets mirror at the border, the MobileNetV3s do not and feed the flows before the norm."""
        if (self.reflect, self.before_norm) != (reflect, not reflect):
            right = "before_norm=false detector.reflect=true" if reflect else "before_norm=true detector.reflect=false"
            raise UserError(f"detector.weights={path} is of one of the official {kind}: set detector.{right}")

    def features(self, images: Tensor) -> list[Tensor]:
        try:
            return self.projections(images) if self.before_norm else super().features(images)
        except RuntimeError as error:
            if "adding size should be less" not in str(error):
                raise
            raise UserError(
                f"cflow reflect=true cannot mirror maps as small as images of {tuple(images.shape[-2:])} make: "
                "set a larger data.size, or reflect=false"
            ) from None

    @torch.no_grad()
    def projections(self, images: Tensor) -> list[Tensor]:
        """What the last convolution of each chosen stage of a MobileNetV3 gives, as `features`."""
        seen: dict[int, Tensor] = {}
        ends = {stage: self.backbone.features[self.backbone.stage_ends[stage - 1]] for stage in self.stages}
        hooks = [
            end.block[-1][0].register_forward_hook(lambda *about, stage=stage: seen.update({stage: about[2].float()}))
            for stage, end in ends.items()
        ]
        try:
            self.backbone.forward_stages(images, last=max(self.stages))
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[stage] for stage in self.stages]

    def steps(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Fiber by fiber, stage by stage: vectors (n, C), their positions (n, P), the number of their flow.

        The encoder sees the batch once, before this returns.
        """
        images = turn(batch.images, batch.ids, batch.epoch, seed=batch.seed, degrees=self.rotation)
        features = self.features(normalize(images, self.normalization))
        n_images = len(images) * world_size()
        share = max(1, self.fiber // n_images)  # positions of each image in a fiber
        for stage, feature in zip(self.stages, features):
            height, width = feature.shape[-2:]
            if height * width < share:
                raise UserError(
                    f"cflow fiber={self.fiber}: {share} positions of each of {n_images} images, but stage {stage} "
                    f"has {height} x {width}: set a larger batch_size or data.size, or detector.fiber to at most "
                    f"{height * width * n_images}"
                )
        return self.fibers(features, batch, share)

    def fibers(self, features: list[Tensor], batch: TrainingBatch, share: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        for number, (stage, feature) in enumerate(zip(self.stages, features)):
            key = batch.seed, batch.epoch, 0, batch.ids, *KINDS["cflow"], stage
            vectors, positions = rows_of(feature)  # (B, H W, C), (H W, P)
            order = stream(key, len(positions), feature.device).argsort(dim=1, stable=True)  # (B, H W)
            for chosen in order.split(share, dim=1)[: len(positions) // share]:  # (B, share)
                taken = vectors.gather(1, chosen[..., None].expand(-1, -1, vectors.shape[2]))  # (B, share, C)
                yield taken.flatten(0, 1), positions[chosen].flatten(0, 1), number

    def forward(self, vectors: Tensor, positions: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a flow on what `steps` gives; stats: the stage's mean log p / C."""
        density = log_density(*self.flows[number](vectors, positions))  # (n,)
        return flow_likelihood(density), {f"log_density_stage{self.stages[number]}": density.detach().mean()}

    def networks(self, images: Tensor) -> list[Tensor]:
        """log p / C of every position of the stages, [(B, H_l, W_l)] in float32."""
        grids = []
        for flow, feature in zip(self.flows, self.features(images)):
            vectors, positions = rows_of(feature)  # (B, H W, C), (H W, P)
            both = vectors.flatten(0, 1), positions.repeat(images.shape[0], 1)  # (B H W, C), (B H W, P)
            # a program for any batch size cannot have a number of pieces that depends on it
            pairs = [both] if torch.compiler.is_exporting() else zip(*(part.split(ROWS) for part in both))
            found = torch.cat([log_density(*flow(*pair)) for pair in pairs])  # (B H W,)
            grids.append(found.view(images.shape[0], *feature.shape[-2:]))  # (B, H, W)
        return grids

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """Find m_l, in the images that `fitted_on` names.

        Raises:
            UserError: a process has no image; features that are not finite.
        """
        found = []
        for batch in batches:
            grids = self.networks(batch.images)
            if batch.valid is not None:
                insides = [grid_valid(batch.valid, grid.shape[1:]) for grid in grids]
                grids = [grid[inside] for grid, inside in zip(grids, insides)]
            found.append(torch.stack([grid.amax() for grid in grids]))  # (L,)
        self.require_images(len(found) > 0)
        found = gather_rows(torch.stack(found))  # (batches, L)
        require_finite(found, "log-likelihoods of the images, batch by batch")
        self.likeliest = found.amax(0)

    def measure(
        self,
        grids: list[Tensor],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: None = None,  # noqa: ARG002
    ) -> Findings:
        self.require_fitted(self.likeliest)
        likelihoods = [(grid - most).clamp(max=0).exp() for grid, most in zip(grids, self.likeliest)]
        maps = len(grids) - sum(upsample(each, size, align_corners=True) for each in likelihoods)  # (B, H, W)
        return Findings(image_score(maps, valid, self.image_score), maps, peak(maps, valid))

    def facts(self) -> dict[str, str]:
        return {"normalized_on": self.fitted_on}


def rows_of(feature: Tensor) -> tuple[Tensor, Tensor]:
    """A map (B, C, H, W) as vectors (B, H W, C), and their positions (H W, P)."""
    positions = encode_positions(feature.shape[-2:], ENCODING, feature.device).flatten(0, 1)  # (H W, P)
    return feature.flatten(2).mT, positions.to(feature.dtype)


def turn(images: Tensor, ids: Tensor, epoch: int, *, seed: int, degrees: float) -> Tensor:
    """Each image (B, 3, H, W) uint8 turned about its middle by a uniform angle in [-degrees, degrees], to the nearest
    pixel and black where there is none: torchvision's RandomRotation(degrees)."""
    if degrees == 0:
        return images
    numbers = draw(images, (seed, epoch, 0, ids, *KINDS["cflow"]), 1)[:, 0]
    angles = between(numbers, (-degrees, degrees)) * math.pi / 180  # (B,)
    size = torch.tensor(images.shape[2:]).expand(len(images), -1)  # (B, 2)
    pixels, inside = moved(images, torch.zeros_like(size), size, size / 2, angles)
    return pixels * inside[:, None]
