"""RegAD (Huang et al. 2022, "Registration based few-shot anomaly detection")."""

import inspect
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from data.augment.random_numbers import uniform
from data.normalize import standardize_, unnormalize
from losses.registration import symmetric_negative_cosine
from models.anomaly.detector import Batch, TrainingBatch
from models.anomaly.maps import ImageScore
from models.anomaly.padim import PaDiM
from models.anomaly.regad_networks import N_VIEWS, SpatialTransformer, inverse, support_views, warp
from models.backbones.resnet import conv1x1
from models.backbones.stages import stage_shapes, train_stages
from runtime.distributed import gather_rows, rank, world_size
from runtime.errors import UserError
from runtime.memory import send
from runtime.values import Few, PositiveFloat

SIDES = (14, 7, 4)  # of what the transformers' linear layers see behind stages 1 to 3


class RegAD(PaDiM):
    """Learns on other categories to align images of one category, then is PaDiM on the aligned features of few.

    Networks, initialization, loss and score of the official code (github.com/MediaBrain-SJTU/RegAD). A spatial
    transformer behind each of the stages 1 to 3 turns and scales its maps for the next one; all is trained, the
    backbone too. Loss: the last maps of a query image and the mean of those of K others of its category, encoded,
    predict each other. `fit`: Gaussians at every position over 22 views of each support image, whose maps of every
    stage are warped back by the inverses of all thetas so far; all channels, sigma 4. The map of cosines between query
    and supports, which the official test computes, enters no score there; here it is not computed. Images are in
    [0, 1]: what the caller normalized is undone, since the official code leaves that step out, so `backbone.mean`
    and `backbone.std` are refused.

    Different from it: images are resized by `data.resample`, there by Lanczos; the supports of a query are drawn from
    the other images of its batch (all processes), there from all of its category; both with repetition, so each
    single one is as likely, but two are alike more often. The official learning rate falls once per epoch, to 0 in the
    last, here at every step. The last epoch is reported, there the one with the best test AUROC. Official support sets
    are files of images, here `data.datasets.few_shot` draws.

    The official recipe: 224 x 224 images, ImageNet's ResNet-18, batches of at most 32 images of one category, SGD
    with learning rate 1e-4 and momentum 0.9, cosine to 0, 50 epochs over the 14 other categories.

    Args:
        backbone: any whose `forward_stages` lets something happen `after` each stage, as our CNNs; it is trained.
        supports: K, for each query in training; in the official code equal to `data.shots`.
        regularization: what is added to the covariances' diagonal, above 0; in the official code 0.01.
        image_score: what of an image's map is its score; the paper's is `max`.

    Raises:
        UserError: bad options, another backbone or one with a normalization of the user's, at a training batch of one
            image, or as PaDiM.
    """

    name = "regad"
    by_gradient = True  # and `fits`, as PaDiM
    leaves_out = False
    frozen = False
    learns_from = "others"
    by_label = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        supports: Few = 2,
        regularization: PositiveFloat = 0.01,
        image_score: ImageScore = "max",
    ):
        super().__init__(backbone, regularization=regularization, image_score=image_score)
        if "after" not in inspect.signature(backbone.forward_stages).parameters:
            raise UserError(
                f"regad warps maps between the stages, which {type(backbone).__name__} does not allow: set "
                "backbone.name to a ResNet, MobileNet, ConvNeXt or ViT"
            )
        if "normalization" in vars(backbone):
            raise UserError(
                "regad gives its backbone pixels in [0, 1], as the official code: remove backbone.mean and backbone.std"
            )
        self.supports = supports
        channels = [shape[0] for shape in stage_shapes(backbone, last=3)]
        train_stages(backbone, last=3)
        self.transformers = nn.ModuleList(SpatialTransformer(c, side) for c, side in zip(channels, SIDES))
        self.encoder, self.predictor = RegADEncoder(channels[-1]), Predictor(channels[-1])

    def register(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) in [0, 1] -> transformed stages 1 to 3 [(B, C_i, H_i, W_i)] and their thetas [(B, 2, 3)]."""
        thetas = []

        def transform(stage: int, x: Tensor) -> Tensor:
            x, theta = self.transformers[stage - 1](x)
            thetas.append(theta)
            return x

        return self.backbone.forward_stages(pixels, last=3, after=transform), thetas

    def steps(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries (B, 3, H, W) and the supports of each (B, K, 3, H, W), pixels in [0, 1]."""
        counts = gather_rows(torch.tensor([len(batch.images)], device=batch.images.device))  # (W,)
        gathered = gather_rows(batch.images)  # (G, 3, H, W)
        if len(gathered) < 2:
            raise UserError("regad compares images of a batch with each other: set batch_size to at least 2")
        own = counts[: rank()].sum() + torch.arange(len(batch.images), device=counts.device)  # (B,) of these images
        numbers = send(uniform((batch.seed, batch.epoch, batch.ids), self.supports), counts.device)
        drawn = (numbers * (len(gathered) - 1)).long()  # (B, K), the number among the others
        drawn += drawn >= own[:, None]
        yield batch.images.float() / 255, gathered[drawn].float() / 255

    def forward(self, queries: Tensor, supports: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on what `steps` gives; stats: how far apart encoded queries point, 0 when collapsed, at most 1."""
        query = self.register(queries)[0][-1]  # (B, C, h, w)
        support = self.register(supports.flatten(0, 1))[0][-1]  # (B K, C, h, w)
        support = support.unflatten(0, supports.shape[:2]).mean(1)  # (B, C, h, w)
        z1, z2 = self.encoder(query), self.encoder(support)
        loss = symmetric_negative_cosine(self.predictor(z1), z1, self.predictor(z2), z2)
        directions = nn.functional.normalize(z1.detach().float())
        return loss, {"spread": directions.var((0, 2, 3), unbiased=False).sum()}

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalized -> stages 1 to 3 as they lie in the image [(B, C_i, H_i, W_i)], float32."""
        maps, thetas = self.register(unnormalize(images, self.normalization))
        for stage in range(3):
            maps[stage] = maps[stage].float()
            for theta in reversed(thetas[: stage + 1]):
                maps[stage] = warp(maps[stage], inverse(theta))
        return maps

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """Gaussians over the 22 views of each support image, in eval mode. Every process takes some of the views."""
        batches, device = list(batches), self.mean.device
        for batch in batches:
            self.refuse_padding(batch.valid)
        sizes = torch.tensor([b.images.shape[-2:] for b in batches], dtype=torch.int64, device=device).view(-1, 2)
        sizes = gather_rows(sizes)
        self.require_images(len(sizes) > 0)
        height, width = sizes[0].tolist()
        none = torch.empty(0, 3, height, width, device=device)  # there may be fewer supports than processes
        images = gather_rows(torch.cat([none, *(b.images for b in batches)]))  # (K, 3, H, W)
        order = gather_rows(torch.cat([none[:, 0, 0, 0].long(), *(b.indices for b in batches)])).argsort()
        pixels, numbers = unnormalize(images[order], self.normalization), torch.arange(len(order), device=device)
        views = islice(enumerate(support_views(pixels)), rank(), None, world_size())
        was_training, own = self.training, self.normalization
        self.eval()
        try:
            super().fit(
                (Batch(standardize_(view.clone(), *own), None, len(order) * i + numbers) for i, view in views),
                N_VIEWS * len(order),
            )
        finally:
            self.train(was_training)

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Also an official checkpoint, {"STN": ..., "ENC": ..., "PRED": ...}: stage 4 is then the given backbone's."""
        unused = []
        if {"STN", "ENC", "PRED"} <= state.keys():
            kept = {n: v for n, v in self.state_dict().items() if n.startswith(("backbone.layer4.", "backbone.fc."))}
            for part, prefix in (("STN", "backbone."), ("ENC", "encoder."), ("PRED", "predictor.")):
                for name, value in state[part].items():
                    if name.startswith("stn"):
                        kept[f"transformers.{int(name[3]) - 1}{name[4:]}"] = value
                    elif name.startswith("bn3."):  # which the official encoder has and does not use
                        unused.append(prefix + name)
                    else:
                        kept[prefix + name] = value
            state = kept
        return super().load_trained(state, path) + unused


class RegADEncoder(nn.Module):
    """Three 1x1 convolutions: (B, C, H, W) -> the same; official models/siamese.py."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv1x1(channels, channels), nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.conv3(x)


class Predictor(nn.Module):
    """Two 1x1 convolutions: (B, C, H, W) -> the same; official models/siamese.py."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(channels, channels), nn.BatchNorm2d(channels)
        self.conv2 = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn1(self.conv1(x)).relu())
