"""NSA: patches of another picture blended in by their gradients, without a seam (Schlüter et al., ECCV 2022).

After the authors' self_sup_tasks.py (github.com/hmsch/natural-synthetic-anomalies), with the solver of data/poisson.py
in place of cv2.seamlessClone. The call is that of `data/defects.py`, plus `sources`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.special import gammaincinv
from torch import Tensor

from data import poisson
from data.pasting import draw, large_enough, require, whole
from data.random_numbers import send

PATCH_DRAWS = 8  # two sizes, place in the source (2), scale, place in the picture (2), whether there is one at all
LEAST = 50  # pixels that must change, as in the authors' code: smaller patches are left out


@dataclass(frozen=True, kw_only=True)
class NSA:
    """Up to `patches` rectangles: the first always, each further one with probability 1/2, later ones over earlier.

    Half the height and half the width of a patch are `offset` plus Gamma(shape, scale), as shares of the picture's and
    cut to `bounds`; then it is rescaled by N(1, 0.5) cut to `resize`, its sides once more cut to `bounds`, now taken
    as shares of the whole side (as the authors do). Patches that would change fewer than 50 pixels are left out, so a
    mask can be empty.

    The mask is what lies inside the patches, all but their outermost pixels: a superset of what changes. `labels`
    gives the authors' soft labels.

    Deviations: no test whether a patch lies on the object (`skip_background`), so this is the authors' setting for
    textures; all but the outermost pixels of a patch change, where theirs keeps two; results are rounded, not cut off;
    mixed gradients are those of Pérez et al., see data/poisson.py.
    """

    gradients: Literal["source", "mixed"] = "mixed"  # cv2's NORMAL_CLONE and MIXED_CLONE
    patches: int = 3
    bounds: tuple[float, float] = (0.03, 0.4)
    offset: float = 0.03
    shape: float = 2.0
    scale: float = 0.05
    resize: tuple[float, float] = (0.5, 2.0)  # of textures; objects: 0.7, 1.3
    steepness: float = 1 / 3  # k of the logistic labels; the authors set both for each category
    middle: float = 7.0  # x0, gray levels
    kind = 4

    def __post_init__(self):
        rules = {
            "gradients must be source or mixed": self.gradients in ("source", "mixed"),
            "patches must be at least 1": self.patches >= 1,
            "bounds must lie in (0, 0.45], low first": 0 < self.bounds[0] <= self.bounds[1] <= 0.45,
            "offset must not be negative": self.offset >= 0,
            "shape and scale must be positive": min(self.shape, self.scale) > 0,
            "resize must be positive, low first": 0 < self.resize[0] <= self.resize[1],
        }
        require(self, rules)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        sample_ids: Tensor,
        epoch: int,
        *,
        seed: int,
        view: int = 0,
        sources: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sources` (B, 3, H, W) uint8: where each picture's patches come from (the authors: the picture loaded before
        it); None: the picture itself."""
        numbers = draw(images, (seed, epoch, view, sample_ids, self.kind), self.patches * PATCH_DRAWS)
        sources = images if sources is None else sources
        if sources.shape != images.shape or sources.dtype != torch.uint8:
            raise ValueError(f"sources must be like the images, got {sources.dtype} {tuple(sources.shape)}")
        size = tuple(images.shape[2:])
        most = [round(self.bounds[1] * side) - 2 for side in size]
        large_enough(self, images, min(most) > 0 and most[0] * most[1] >= LEAST, f"no patch changes {LEAST} pixels")
        made, masks = images.clone(), torch.zeros(len(images), *size, dtype=torch.bool, device=images.device)
        boxes, placed = self.boxes(numbers.unflatten(1, (self.patches, PATCH_DRAWS)), size)
        for patch in range(self.patches):
            rows = placed[:, patch].nonzero()[:, 0]
            # A CPU takes each in a canvas of its own size, other devices all in one launch.
            for part in rows.split(1 if images.device.type == "cpu" else max(1, len(rows))) if len(rows) else ():
                there, box = send(part, images.device), boxes[part, patch]
                canvas = box[:, 2].amax(0).tolist()
                blended, inside = self.blend(made[there], sources[there], send(box, images.device), canvas)
                made[there], masks[there] = blended, masks[there] | inside
        return made, masks

    def boxes(self, numbers: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """numbers (B, P, 8) -> boxes int64 (B, P, 4, 2), and whether there is one, bool (B, P).

        A box is its top left corner in the source, its extents there, its extents in the picture, its corner there.
        """
        sides = torch.tensor(size)
        low, high = ((bound * sides).round().clamp(min=1) for bound in self.bounds)
        gamma = torch.from_numpy(gammaincinv(self.shape, numbers[..., :2].numpy())) * self.scale
        half = ((self.offset + gamma) * sides).maximum(low).minimum(high).floor()
        center = whole(numbers[..., 2:4], low, sides - low - 1)
        begin, end = (center - half).clamp(min=0), (center + half).minimum(sides)
        before = end - begin
        factor = (1 + 0.5 * torch.special.ndtri(numbers[..., 4])).clamp(*self.resize)
        height = (factor * before[..., 0]).clamp(low[0], high[0])
        width = (height / before[..., 0] * before[..., 1]).floor().clamp(low[1], high[1])
        height = (width / before[..., 1] * before[..., 0]).floor().clamp(low[0], high[0])
        after = torch.stack([height, width], dim=-1)
        middle = (after / 2).floor()
        place = whole(numbers[..., 5:7], middle + 1, sides - middle - 2) - middle
        placed = (numbers[..., 7] < 0.5) | (torch.arange(self.patches) == 0)
        placed &= (after - 2).clamp(min=0).prod(-1) >= LEAST
        return torch.stack([begin, before, after, place], dim=2).long(), placed

    def blend(self, images: Tensor, sources: Tensor, boxes: Tensor, canvas: list[int]) -> tuple[Tensor, Tensor]:
        """One patch for each picture (B, 3, H, W), boxes (B, 4, 2) no larger there than the canvas -> pictures uint8,
        bool (B, H, W) true where the patch may change them."""
        begin, before, after, place = boxes.unbind(1)  # each (B, 2)
        source, target = sources.double(), images.double()
        for axis in (0, 1):
            size, at = images.shape[2 + axis], torch.arange(canvas[axis], device=images.device)
            # cv2.resize: bilinear, between centers of pixels, without antialias
            position = (at + 0.5) * (before / after)[:, axis, None].double() - 0.5  # (B, canvas)
            position = position.clamp(min=0).minimum(before[:, axis, None] - 1) + begin[:, axis, None]
            left = position.floor().long()
            right = (left + 1).clamp(max=size - 1)  # beyond the patch its share is 0
            share = position - left
            share = share[:, None, :, None] if axis == 0 else share[:, None, None]
            source = torch.lerp(_take(source, left, axis), _take(source, right, axis), share)
            target = _take(target, (place[:, axis, None] + at).clamp(max=size - 1), axis)
        mixed = self.gradients == "mixed"
        divergence = poisson.mixed_divergence(source, target) if mixed else poisson.laplacian(source)
        patch = poisson.solve(target, divergence, after)  # (B, 3, *canvas)
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        for axis in (0, 1):
            at = torch.arange(images.shape[2 + axis], device=images.device) - place[:, axis, None]  # (B, H or W)
            within = (at > 0) & (at < after[:, axis, None] - 1)
            inside = inside & (within[:, :, None] if axis == 0 else within[:, None])
            patch = _take(patch, at.clamp(0, canvas[axis] - 1), axis)
        pixels = patch.round_().clamp_(0, 255).to(torch.uint8)  # (B, 3, H, W)
        return torch.where(inside[:, None], pixels, images), inside

    def labels(self, images: Tensor, made: Tensor, masks: Tensor) -> Tensor:
        """Soft labels in [0, 1), float32 (B, H, W), from pictures (B, 3, H, W) before and after and the masks.

        1 / (1 + exp(-k (x - x0))), x the change in gray levels, mean of the channels, after a median over a disk of
        radius 5; 0 where it changes by 1 or less, after a 5 x 5 median of that. Above 0 is the authors' binary label.
        """
        change = (made.float() - images.float()).abs().mean(1) * masks  # (B, H, W)
        counted = F.avg_pool2d(_padded((change > 1).float(), 2), 5, stride=1, divisor_override=1)[:, 0]
        changed = counted > 12.5
        soft = [disk_median(*one) for one in zip(change * changed, changed)]  # 81 numbers a pixel: one by one
        soft = torch.stack(soft) if soft else change
        return changed / (1 + torch.exp(-self.steepness * (soft - self.middle)))


def disk_median(values: Tensor, where: Tensor, radius: int = 5) -> Tensor:
    """Median over the pixels within `radius`, borders repeated, as skimage's median(disk): (H, W) -> (H, W).

    A CPU computes it only `where` bool (H, W) is true and leaves 0 elsewhere; other devices need not wait for a count.
    """
    size, wide = values.shape, values.shape[1] + 2 * radius
    at = torch.arange(-radius, radius + 1)
    rows, columns = (at[:, None] ** 2 + at**2 <= radius**2).nonzero().unbind(1)
    disk = send(rows * wide + columns, values.device)  # (81,): places in a padded picture
    everything = torch.arange(values.numel(), device=values.device)
    pixels = everything[where.flatten()] if values.device.type == "cpu" else everything
    first = pixels // size[1] * wide + pixels % size[1]
    around = _padded(values[None], radius).flatten()[first[:, None] + disk]  # (pixels, 81)
    return torch.zeros_like(values).flatten().index_copy_(0, pixels, around.median(1).values).view(size)


def _padded(values: Tensor, width: int) -> Tensor:
    return F.pad(values[:, None], [width] * 4, mode="replicate")  # (B, 1, H + 2 width, W + 2 width)


def _take(images: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows (axis 0) or columns (1) of images (B, C, H, W), each picture's own: index (B, K) -> K in place of H or W."""
    shape = list(images.shape)
    shape[2 + axis] = index.shape[1]
    index = index[:, None, :, None] if axis == 0 else index[:, None, None]
    return images.gather(2 + axis, index.expand(shape))
