"""NSA: patches of another image blended in by their gradients, without a seam (Schlüter et al., ECCV 2022).

After the authors' self_sup_tasks.py (github.com/hmsch/natural-synthetic-anomalies), with the solver of poisson.py in
of cv2.seamlessClone. The call is that of `data/defects/__init__.py`, plus `sources`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from scipy.special import gammaincinv
from torch import Tensor

from data.augment.random_numbers import KINDS, uniform, whole
from data.defects import poisson
from data.defects.blend import draw, large_enough, resized, take
from data.defects.medians import disk_median, majority
from runtime.memory import send
from runtime.values import BelowOne, Few, NonNegativeFloat, PositiveFloat, Range, Rising, RisingFactors

PATCH_DRAWS = 8  # two sizes, place in the source (2), scale, place in the image (2), whether there is one at all
LEAST = 50  # pixels that must change, as in the authors' code: smaller patches are left out
TRIES = 199  # places that are looked at for one on an object: the authors give up at the 200th, whatever it is
OVERLAP = 0.25  # more than this share of a patch's object must come to lie on the image's, in all their categories
Side = Annotated[float, Range(above=0, most=0.45)]  # as a share of the image's
PatchSides = Annotated[tuple[Side, Side], Rising()]
Background = tuple[Annotated[float, Range(least=0, most=255)], NonNegativeFloat]


@dataclass(frozen=True, kw_only=True)
class NSADefect:
    """Up to `patches` rectangles: the first always, each further one with probability 1/2, later ones over earlier.

    Half the height and half the width of a patch are `offset` plus Gamma(shape, scale), as shares of the image's and
    cut to `bounds`; then it is rescaled by N(1, 0.5) cut to `resize`, its sides once more cut to `bounds`, now taken
    as shares of the whole side (as the authors do). Patches that would change fewer than 50 pixels are left out, so a
    mask can be empty.

    The mask is what lies inside the patches, all but their outermost pixels: a superset of what changes. `labels`
    gives the authors' soft labels.

    With `background` (theirs is `skip_background`) a pixel farther than the tolerance from its gray level, by a 7 x 7
    majority, is object. Of up to 199 places a patch is cut from the first that has more than `min_object` of object,
    and comes to the first where object meets object, see `boxes`; without one it is left out. What is background in
    patch and image is then not in the mask, though it may change a little.

    Deviations: all but the outermost pixels of a patch change, where theirs keeps two; results are rounded, not cut
    off; mixed gradients are those of Pérez et al., see data/defects/poisson.py.
    """

    gradients: Literal["source", "mixed"] = "mixed"  # cv2's NORMAL_CLONE and MIXED_CLONE
    patches: Few = 3  # at most, of an image
    bounds: PatchSides = (0.03, 0.4)  # of a patch's height and width, as shares of the image's
    widths: PatchSides | None = None  # bounds of the widths, where they are others than those of the heights
    offset: NonNegativeFloat = 0.03  # least half height and width, as shares of the image's
    shape: PositiveFloat = 2.0  # of the gamma distribution of what is added to `offset`
    scale: PositiveFloat = 0.05  # of the same
    resize: RisingFactors = (0.5, 2.0)  # of textures; objects: 0.7, 1.3
    steepness: PositiveFloat = 1 / 3  # k of the logistic labels; the authors set both for each category
    middle: NonNegativeFloat = 7.0  # x0, gray levels
    background: Background | None = None  # gray level and tolerance; none: all is object
    min_object: BelowOne = 0.25  # least share of object in a patch, where there is a background

    @property
    def both_bounds(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of heights and widths."""
        return self.bounds, self.widths or self.bounds

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
        """`sources` (B, 3, H, W) uint8: where each image's patches come from (the authors: the image loaded before
        it); None: the image itself."""
        key = seed, epoch, view, sample_ids
        numbers = draw(images, (*key, *KINDS["nsa"]), self.patches * PATCH_DRAWS)
        numbers = numbers.unflatten(1, (self.patches, PATCH_DRAWS))
        sources = images if sources is None else sources
        if sources.shape != images.shape or sources.dtype != torch.uint8:
            raise ValueError(f"sources must be like the images, got {sources.dtype} {tuple(sources.shape)}")
        size = tuple(images.shape[2:])
        most = [round(high * side) - 2 for (_, high), side in zip(self.both_bounds, size)]
        large_enough(self, images, min(most) > 0 and most[0] * most[1] >= LEAST, f"no patch changes {LEAST} pixels")
        objects, places = None, numbers[:, :, None, [2, 3, 5, 6]]
        if self.background is not None and len(images):  # FFTs of nothing are errors
            objects = torch.stack([self.objects(sources), self.objects(images)])
            places = uniform((*key, *KINDS["nsa_places"]), self.patches * TRIES * 4)
            places = places.unflatten(1, (self.patches, TRIES, 4))
        made, masks = images.clone(), torch.zeros(len(images), *size, dtype=torch.bool, device=images.device)
        boxes, placed = self.boxes(numbers, places, size, objects)
        for patch in range(self.patches):
            rows = placed[:, patch].nonzero()[:, 0]
            # A CPU takes each in a canvas of its own size, other devices all in one launch.
            for part in rows.split(1 if images.device.type == "cpu" else max(1, len(rows))) if len(rows) else ():
                there, box = send(part, images.device), boxes[part, patch]
                canvas = box[:, 2].amax(0).tolist()
                both = None if objects is None else objects[:, there]
                box = send(box, images.device)
                blended, inside, defect = self.blend(made[there], sources[there], box, canvas, both)
                made[there], masks[there] = blended, torch.where(inside, defect, masks[there])
        return made, masks

    def objects(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> bool (B, H, W)."""
        gray, tolerance = self.background
        return majority((images.float().sum(1) - 3 * gray).abs() > 3 * tolerance, 7)

    def boxes(
        self, numbers: Tensor, places: Tensor, size: tuple[int, int], objects: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uniform numbers (B, P, 8), and of T places (B, P, T, 4) in source and image -> boxes int64 (B, P, 4, 2),
        and whether there is one, bool (B, P), on the CPU.

        A box is its top left corner in the source, its extents there, its extents in the image, its corner there.

        With `objects` bool (2, B, H, W), of the sources and the images, the box is cut from the first place with
        more than `min_object` of object (once more after the patch was rescaled), and put on the first where the
        image's object covers more than a quarter of the patch's. The host then waits for a GPU, once per batch.
        """
        device = places.device if objects is None else objects.device
        sides = torch.tensor(size)
        bounds = (torch.tensor(self.both_bounds, dtype=torch.float64) * sides[:, None]).round().clamp(min=1)
        low, high = bounds.unbind(1)
        gamma = torch.from_numpy(gammaincinv(self.shape, numbers[..., :2].numpy())) * self.scale
        half = ((self.offset + gamma) * sides).maximum(low).minimum(high).floor()
        factor = (1 + 0.5 * torch.special.ndtri(numbers[..., 4])).clamp(*self.resize)
        placed = (numbers[..., 7] < 0.5) | (torch.arange(self.patches) == 0)
        places, sides, low, high, half, factor, placed = (
            send(x, device) for x in (places, sides, low, high, half, factor, placed)
        )
        center, half = whole(places[..., :2], low, sides - low - 1), half[:, :, None]
        begin, end = (center - half).clamp(min=0), (center + half).minimum(sides)  # (B, P, T, 2)
        fits = torch.ones_like(begin[..., 0], dtype=torch.bool)  # (B, P, T)
        if objects is not None:
            fits = _count(objects[0], begin, end) / (end - begin).prod(-1) > self.min_object
        begin, end, placed = _first(begin, fits), _first(end, fits), placed & fits.any(2)
        before = end - begin
        height = (factor * before[..., 0]).clamp(low[0], high[0])
        width = (height / before[..., 0] * before[..., 1]).floor().clamp(low[1], high[1])
        height = (width / before[..., 1] * before[..., 0]).floor().clamp(low[0], high[0])
        after = torch.stack([height, width], dim=-1)
        middle = (after / 2).floor()[:, :, None]
        place = whole(places[..., 2:], middle + 1, sides - middle - 2) - middle  # (B, P, T, 2)
        if objects is not None:
            patches = torch.stack([begin, before, after], dim=2).unbind(1)  # P x (B, 3, 2)
            fits = torch.stack([self.meets(objects, *one) for one in zip(patches, place.unbind(1))], dim=1)
        place, placed = _first(place, fits), placed & fits.any(2)
        placed &= (after - 2).clamp(min=0).prod(-1) >= LEAST
        return torch.stack([begin, before, after, place], dim=2).long().cpu(), placed.cpu()

    def meets(self, objects: Tensor, boxes: Tensor, place: Tensor) -> Tensor:
        """Whether one patch of each image, boxes (B, 3, 2), has enough of an object, and at which of its places
        (B, T, 2) enough of it meets the image's, objects bool (2, B, H, W): bool (B, T)."""
        size = objects.shape[2:]
        patch = resized(objects[0, :, None].double(), boxes, size)[:, 0] >= 0.5  # (B, H, W), in the top left corner
        for axis in (0, 1):
            within = torch.arange(size[axis], device=patch.device) < boxes[:, 2, axis, None]  # (B, H or W)
            patch = patch & (within[:, :, None] if axis == 0 else within[:, None])
        count, area = patch.sum((1, 2))[:, None], boxes[:, 2].prod(1)[:, None]  # (B, 1)
        # common pixels at every place, the correlation of the two: no patch reaches over an edge of the image
        common = torch.fft.rfft2(objects[1].double()) * torch.fft.rfft2(patch.double()).conj()
        common = torch.fft.irfft2(common, s=size).round().flatten(1)  # (B, H W)
        common = common.gather(1, (place[..., 0] * size[1] + place[..., 1]).long())  # (B, T)
        return (count / area > self.min_object) & (common / count > OVERLAP)

    def blend(
        self, images: Tensor, sources: Tensor, boxes: Tensor, canvas: list[int], objects: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One patch for each image (B, 3, H, W), boxes (B, 4, 2) no larger there than the canvas, objects bool
        (2, B, H, W) or None -> images uint8; bool (B, H, W) each: where the patch may change them, and what of that
        is object in patch or image."""
        place, after = boxes[:, 3], boxes[:, 2]  # each (B, 2)
        source, target = resized(sources.double(), boxes, canvas), images.double()
        for axis in (0, 1):
            at = place[:, axis, None] + torch.arange(canvas[axis], device=images.device)
            target = take(target, at.clamp(max=images.shape[2 + axis] - 1), axis)
        mixed = self.gradients == "mixed"
        divergence = poisson.mixed_divergence(source, target) if mixed else poisson.laplacian(source)
        patch = poisson.solve(target, divergence, after)  # (B, 3, *canvas)
        if objects is not None:
            patch = torch.cat([patch, resized(objects[0, :, None].double(), boxes, canvas)], dim=1)  # (B, 4, *canvas)
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        for axis in (0, 1):
            at = torch.arange(images.shape[2 + axis], device=images.device) - place[:, axis, None]  # (B, H or W)
            within = (at > 0) & (at < after[:, axis, None] - 1)
            inside = inside & (within[:, :, None] if axis == 0 else within[:, None])
            patch = take(patch, at.clamp(0, canvas[axis] - 1), axis)
        defect = inside if objects is None else inside & (objects[1] | (patch[:, 3] >= 0.5))
        pixels = patch[:, :3].round_().clamp_(0, 255).to(torch.uint8)  # (B, 3, H, W)
        return torch.where(inside[:, None], pixels, images), inside, defect

    def labels(self, images: Tensor, made: Tensor, masks: Tensor) -> Tensor:
        """Soft labels in [0, 1), float32 (B, H, W), from images (B, 3, H, W) before and after and the masks.

        1 / (1 + exp(-k (x - x0))), x the change in gray levels, mean of the channels, after a median over a disk of
        radius 5; 0 where it changes by 1 or less, after a 5 x 5 median of that. Above 0 is the authors' binary label.
        """
        change = (made.float() - images.float()).abs().mean(1)  # (B, H, W)
        changed = majority((change > 1) & masks, 5)
        soft = [disk_median(*one) for one in zip(change * changed, changed)]  # 81 numbers per pixel: one by one
        soft = torch.stack(soft) if soft else change
        return changed / (1 + torch.exp(-self.steepness * (soft - self.middle)))


def _count(where: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Pixels of bool (B, H, W) that are true from corner to corner, each (B, P, T, 2): (B, P, T)."""
    sums = F.pad(where.int().cumsum(1).cumsum(2), (1, 0, 1, 0))  # (B, H + 1, W + 1)
    corners = [(a, b) for a in (begin, end) for b in (begin, end)]
    at = torch.stack([a[..., 0] * sums.shape[2] + b[..., 1] for a, b in corners], dim=1).long()  # (B, 4, P, T)
    low, right, left, high = sums.flatten(1).gather(1, at.flatten(1)).view_as(at).unbind(1)
    return high - right - left + low


def _first(values: Tensor, fits: Tensor) -> Tensor:
    """Of (B, P, T, 2) the first that fits, bool (B, P, T): (B, P, 2)."""
    at = fits.to(torch.uint8).argmax(2)[..., None, None].expand(-1, -1, 1, 2)
    return values.gather(2, at)[:, :, 0]
