"""CutPaste (Li et al. 2021, "CutPaste: Self-supervised learning for anomaly detection and localization")."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment.random_numbers import KINDS
from data.defects import DEFECTS
from data.defects.blend import JITTER_DRAWS, blend, draw, jittered
from data.normalize import normalize
from models.anomaly.detector import Batch, Detector, Findings, TrainingBatch
from models.anomaly.gaussian import shrunk_gaussian
from models.anomaly.maps import grid_valid, image_score, peak, pool, render
from models.backbones.stages import stage_shapes, train_stages
from models.gradcam import grad_cam
from models.heads import normed_mlp
from runtime.config import pick
from runtime.errors import UserError
from runtime.memory import send
from runtime.precision import at_least_float32
from runtime.values import FewOrZero, coerce
from search.bounds import require_finite

# the defects of each variant; those of `union` are one class, of which an image gets either
VARIANTS = {"normal": ("cutpaste",), "scar": ("scar",), "union": ("cutpaste", "scar"), "3way": ("cutpaste", "scar")}
JITTER = 0.1  # of brightness, contrast, saturation and hue of the whole image
Density = Literal["gaussian", "kde"]
Score = Literal["density", "max", "top1", "mean"]


class CutPaste(Detector):
    """A classifier learns to tell good images from the same with a patch of themselves pasted elsewhere; the density
    of the good ones' embeddings is the score.

    The authors published no code; this follows github.com/Runinho/pytorch-cutpaste, whose checkpoints can be tested
    with `detector.weights=... epochs=0`. Every image is jittered in color and goes in three times (twice but for
    3way): good, with a pasted rectangle, with a scar, all in one pass, so that BatchNorm sees them together. The loss
    is the classes' cross-entropy. The embedding is the average-pooled last stage, before the head, of length 1.

    Map: Grad-CAM at the last stage, of the squared distance or minus the log density, enlarged without aligned corners,
    sigma 4. The paper shows such maps, but not of which layer and target; pytorch-cutpaste has none. Padding enters
    neither embedding nor map.

    Different from them: images are resized by `data.resample`, there bicubically; pytorch-cutpaste decays biases and
    norms, too, and leaves the weights of a pretrained backbone as they are for 20 steps (`optim.warmup_epochs` spares
    them here). The paper also translates images randomly, pytorch-cutpaste does not. What differs in the defects,
    `data/defects/cutpaste.py` says. The last epoch is reported.

    Official training, 256 x 256 images, ResNet-18 from random weights: SGD, learning rate 0.03, momentum 0.9, cosine,
    weight decay 3e-5, 32 images per step (64 or 96 with their defects); 65,536 steps in the paper, 10,000 for
    pytorch-cutpaste's results.

    Args:
        backbone: any whose last stage is maps; it is trained, as far as that stage depends on it.
        variant: the defects: `normal` rectangles, `scar`, `union` (either, as one class) or `3way` (both, two classes).
        head_layers: hidden layers of 512 before one of 128; pytorch-cutpaste's results are with 1.
        density: of the normal embeddings. `gaussian`: the score is the Mahalanobis distance with Ledoit and Wolf's
            covariance; `kde`: minus the logarithm of a density of Gaussian kernels of bandwidth 1.
        image_score: `density`, as in paper and code, or what of the map is the score.

    Raises:
        UserError: bad options, a backbone whose last stage is no map; at the first batch, images too small for a
            scar; in `fit`, features that are NaN, or a singular covariance.
    """

    by_gradient = True
    fits = True
    frozen = False

    def __init__(
        self,
        backbone: nn.Module,
        *,
        variant: Literal["normal", "scar", "union", "3way"] = "3way",
        head_layers: FewOrZero = 1,
        density: Density = "gaussian",
        image_score: Score = "density",
    ):
        super().__init__(backbone, (4,))
        self.defects = [DEFECTS[name]() for name in pick(VARIANTS, variant, "cutpaste variant")]
        self.variant, self.density = variant, coerce(density, Density, "cutpaste density")
        self.image_score = coerce(image_score, Score, "cutpaste image_score")
        shape = stage_shapes(backbone, 4)[-1]
        if len(shape) != 3:
            raise UserError(f"cutpaste pools a map (C, H, W), this backbone gives {shape}: set backbone.name to a CNN")
        train_stages(backbone, last=4)
        self.head = normed_mlp(shape[0], [512] * head_layers + [128])
        self.out = nn.Linear(128, 3 if variant == "3way" else 2)
        if density == "gaussian":
            self.register_buffer("mean", torch.empty(0, dtype=torch.float64))  # (D,)
            self.register_buffer("cholesky", torch.empty(0, 0, dtype=torch.float64))  # (D, D) lower
        else:
            self.register_buffer("bank", torch.empty(0, 0, dtype=torch.float64))  # (N, D)

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Also pytorch-cutpaste's checkpoint, whose density is still to be fitted."""
        if "resnet18.conv1.weight" in state:
            state = {name.replace("resnet18.", "backbone."): value for name, value in state.items()}
        return super().load_trained(state, path)

    def networks(self, images: Tensor) -> list[Tensor]:
        """The last stage, [(B, C, h, w)], in float32 (float64, if given)."""
        stage = self.backbone.forward_stages(images, last=4)[-1]
        return [stage.to(torch.promote_types(stage.dtype, torch.float32))]

    def steps(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """The good images, then those with each defect, normalized, (V B, 3, H, W), and their classes (V B,)."""
        images, ids = batch.images, batch.ids
        numbers = draw(images, (batch.seed, batch.epoch, 0, ids, *KINDS["cutpaste_good"]), JITTER_DRAWS + 1)
        everywhere = torch.ones_like(images[:, 0], dtype=torch.bool)
        good = blend(images, jittered(images, everywhere, JITTER, numbers[:, :JITTER_DRAWS]), everywhere)
        bad = [defect(good, ids, batch.epoch, seed=batch.seed)[0] for defect in self.defects]
        if self.variant == "union":
            first = send(numbers[:, JITTER_DRAWS] < 0.5, images.device)
            bad = [torch.where(first[:, None, None, None], *bad)]
        classes = torch.arange(1 + len(bad), device=images.device).repeat_interleave(len(images))
        yield normalize(torch.cat([good, *bad]), self.normalization), classes

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on what `steps` gives; stats: the share of images whose class is the likeliest."""
        logits = self.out(self.head(pool(*self.networks(images), None)))  # (V B, classes)
        loss = at_least_float32(F.cross_entropy)(logits, classes)
        return loss, {"accuracy": (logits.argmax(1) == classes).float().mean()}

    def check_count(self, n_images: int) -> None:
        if self.density == "gaussian" and n_images < 3:  # with 2 the shrinkage is exactly 0
            raise UserError(
                f"cutpaste density=gaussian needs 3 training images for a covariance, there are {n_images}: "
                "add some, lower holdout or set detector.density=kde"
            )

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], n_images: int) -> None:  # noqa: ARG002
        """Learn the embeddings of the normal images of all processes, in eval mode, in which it stays."""
        self.eval()
        rows, indices = [], []
        for batch in batches:
            rows.append(pool(*self.networks(batch.images), batch.valid))
            indices.append(batch.indices)
        embeddings, _ = self.in_order(rows, indices)  # (N, D)
        require_finite(embeddings, "embeddings of the training images")
        embeddings = F.normalize(embeddings.double())
        if self.density == "kde":
            self.bank = embeddings
            return
        self.mean, self.cholesky, failed = shrunk_gaussian(embeddings)
        if failed:  # fewer than 3 images, or all alike
            raise UserError(
                f"cutpaste: the covariance of {len(embeddings)} training image(s) is singular; "
                "give more, and different, images or set density=kde"
            )

    def unlikeliness(self, embeddings: Tensor) -> Tensor:
        """(B, D) -> (B,) float64: squared Mahalanobis distance, or minus the logarithm of the kernel density, as
        sklearn's KernelDensity(bandwidth=1)."""
        x = F.normalize(embeddings.double())
        if self.density == "gaussian":
            return torch.linalg.solve_triangular(self.cholesky, (x - self.mean).T, upper=False).square().sum(0)
        count, dimensions = self.bank.shape
        kernels = x @ self.bank.T - 1  # (B, N): -|x - b|^2 / 2 of unit vectors
        return math.log(count) + dimensions / 2 * math.log(2 * math.pi) - kernels.logsumexp(1)

    def slope(self, embeddings: Tensor) -> Tensor:
        """The gradient of each `unlikeliness` with respect to its embedding, written out: (B, D) -> (B, D) float32."""
        length = embeddings.double().norm(dim=1, keepdim=True)  # (B, 1)
        x = embeddings.double() / length
        if self.density == "gaussian":
            along = 2 * torch.cholesky_solve((x - self.mean).T, self.cholesky).T  # (B, D)
        else:
            along = -(x @ self.bank.T - 1).softmax(1) @ self.bank  # (B, D)
        return ((along - (along * x).sum(1, keepdim=True) * x) / length).float()

    def measure(
        self,
        outputs: list[Tensor],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: None = None,  # noqa: ARG002
    ) -> Findings:
        self.require_fitted(self.cholesky if self.density == "gaussian" else self.bank)
        if torch.compiler.is_exporting():  # which traces no backward pass
            embeddings = pool(outputs[0], valid)
            unlikely, slope = self.unlikeliness(embeddings), self.slope(embeddings)
            heat = F.relu(torch.einsum("bc,bchw->bhw", slope, outputs[0]) / outputs[0][0, 0].numel())  # (B, h, w)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                stage = outputs[0].clone().requires_grad_()  # a copy, since predict.py's tensors never have gradients
                unlikely = self.unlikeliness(pool(stage, valid))
                heat = grad_cam(stage, unlikely)  # (B, h, w)
        maps = render(heat, size, None if valid is None else grid_valid(valid, heat.shape[1:]))
        if self.image_score == "density":
            scores = (unlikely.sqrt() if self.density == "gaussian" else unlikely).detach().float()
        else:
            scores = image_score(maps, valid, self.image_score)
        return Findings(scores, maps, peak(maps, valid))
