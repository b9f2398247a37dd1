"""Augmentation recipes by the name that the configuration gives them; their keyword-only arguments are its options.

    views = RECIPES["dino"](local_crops=6)  # what `Augment` takes; `build_augment` makes either kind of row ready

Defaults are ImageNet's, at 224 pixels unless the docstring says otherwise; it gives CIFAR-10's, too. Mean and standard
deviation are the backbone's for every set, but `patches` takes each patch's own mean. `flip_p=0` keeps left and right
apart, for images in which they differ. The blur of all recipes but `simclr` is PIL's in most official code, three box
blurs whose extent follows sigma; here it is the Gaussian itself out to 4 times the largest sigma (17 taps), or as far
as a small view allows.

Args:
    size: side of a view in pixels.
    scale: least and largest share of the image's area in a crop.
    blur_p: probability of the blur; of two distributions a pair.
    solarize_p: probability of solarization; of two distributions a pair.
    flip_p: probability of a horizontal flip.
    views: how many, at least 1.
    interpolation: of the resized crop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from torch import Tensor

from data.augment.patch_grid import PatchGrid
from data.augment.views import Augment, View
from data.normalize import Normalization
from runtime.schema import choice
from runtime.values import Few, FewOrZero, Pixels, Range, RisingShares, UnitInterval

Interpolation = Literal["bilinear", "bicubic"]
WEAK_JITTER, ASYMMETRIC_JITTER = (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1)  # of MoCo v2; of BYOL and all after it


def simclr(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.08, 1.0),
    strength: Annotated[float, Range(least=0, most=2.5)] = 1.0,
    blur_p: UnitInterval = 0.5,
    flip_p: UnitInterval = 0.5,
    views: Few = 2,
    interpolation: Interpolation = "bicubic",
) -> list[View]:
    """SimCLR (Chen et al. 2020, appendix A): views of one distribution.

    For CIFAR-10 the paper takes size=32, strength=0.5 and blur_p=0. The blur has size // 10 taps, made odd, as in the
    official code.

    Args:
        strength: factor on the color jitter.
    """
    view = View(
        size,
        scale=scale,
        interpolation=interpolation,
        flip_p=flip_p,
        jitter_p=0.8,
        jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
        gray_p=0.2,
        blur_p=blur_p,
        blur_kernel=size // 10 // 2 * 2 + 1,
    )
    return cycle([view], views)


def moco(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.2, 1.0),
    blur_p: UnitInterval = 0.5,
    flip_p: UnitInterval = 0.5,
    views: Few = 2,
    interpolation: Interpolation = "bilinear",
) -> list[View]:
    """MoCo v2 (Chen et al. 2020, main_moco.py --aug-plus) and SimSiam (main_simsiam.py): views of one distribution.

    For CIFAR-10 SimSiam takes size=32 and blur_p=0, and MoCo's notebook scale=0.08,1 besides.
    """
    view = strong(size, scale=scale, interpolation=interpolation, flip_p=flip_p, jitter=WEAK_JITTER, blur_p=blur_p)
    return cycle([view], views)


def byol(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.08, 1.0),
    blur_p: tuple[UnitInterval, UnitInterval] = (1.0, 0.1),
    solarize_p: tuple[UnitInterval, UnitInterval] = (0.0, 0.2),
    flip_p: UnitInterval = 0.5,
    views: Few = 2,
    interpolation: Interpolation = "bicubic",
) -> list[View]:
    """BYOL (Grill et al. 2020, appendix B), also of Barlow Twins (main.py), VICReg (augmentations.py) and MoCo v3: two
    distributions, between which more than two views alternate.

    MoCo v3 takes interpolation=bilinear, and for ResNet-50 scale=0.2,1 (main_moco.py).
    For CIFAR-10 solo-learn takes size=32 and blur_p=0,0, and for VICReg scale=0.2,1 and solarize_p=0.1,0.1 as well.
    """
    common = {"scale": scale, "interpolation": interpolation, "flip_p": flip_p, "jitter": ASYMMETRIC_JITTER}
    pair = [strong(size, **common, blur_p=blur, solarize_p=solarize) for blur, solarize in zip(blur_p, solarize_p)]
    return cycle(pair, views)


def psco(
    *,
    size: Pixels = 84,
    scale: RisingShares = (0.2, 1.0),
    blur_p: UnitInterval = 0.0,
    flip_p: UnitInterval = 0.5,
    interpolation: Interpolation = "bicubic",
) -> list[View]:
    """PsCo (Jang et al., ICLR 2023, datasets.py): a strong view for the queries, then a weak one for the keys.

    The defaults are miniImageNet's. CIFAR-10 takes size=32, ImageNet size=224 and blur_p=0.5.
    """
    common = {"scale": scale, "interpolation": interpolation, "flip_p": flip_p}
    return [strong(size, **common, jitter=WEAK_JITTER, blur_p=blur_p), View(size, **common)]


def dino(
    *,
    size: Pixels = 224,
    local_size: Pixels = 96,
    local_crops: FewOrZero = 8,
    global_scale: RisingShares = (0.4, 1.0),
    local_scale: RisingShares = (0.05, 0.4),
    blur: bool = True,
    flip_p: UnitInterval = 0.5,
    strips: FewOrZero = 0,
    strip_size: tuple[Pixels, Pixels] = (224, 64),
    strip_width: RisingShares = (0.1, 0.4),
    interpolation: Interpolation = "bicubic",
) -> list[View]:
    """DINO (Caron et al. 2021, main_dino.py): two global views, `local_crops` local ones, `strips` vertical strips.

    `blur=False` leaves the blur out, as solo-learn and lightly do for the 32 pixels of CIFAR-10, where it erases all.

    The strips are ours, for cylinder liners, on which a scratch runs from top to bottom: the full height of the
    image, a uniform share `strip_width` of its width at a uniform place, resized to `strip_size` (height, width), in
    colors like the local ones. Like those they are for the student alone.

    Args:
        size: side of a global view in pixels.
        local_size: side of a local view in pixels.
        local_crops: how many local views.
        global_scale: least and largest share of the image's area in a global crop.
        local_scale: least and largest share of the image's area in a local crop.
        blur: false: none at all, as others do for 32 pixels.
        strips: how many vertical strips.
        strip_size: height and width of a strip in pixels.
        strip_width: least and largest share of the image's width in a strip.
    """
    common = {"interpolation": interpolation, "flip_p": flip_p, "jitter": ASYMMETRIC_JITTER}
    always, seldom, half = (1.0, 0.1, 0.5) if blur else (0.0, 0.0, 0.0)
    first = strong(size, scale=global_scale, **common, blur_p=always)
    second = strong(size, scale=global_scale, **common, blur_p=seldom, solarize_p=0.2)
    local = strong(local_size, scale=local_scale, **common, blur_p=half)
    strip = strong(strip_size, scale=strip_width, ratio="full_height", **common, blur_p=half)
    return [first, second] + [local] * local_crops + [strip] * strips


def aligned(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.8, 1.0),
    views: Few = 2,
    interpolation: Interpolation = "bicubic",
) -> list[View]:
    """Views that leave every part at its place, for parts that lie alike in all images. Ours, no paper's.

    No flips, no turn of the hue; crops near the whole, with the image's own proportions; slight jitter and blur.
    """
    view = View(
        size,
        scale=scale,
        ratio="own",
        interpolation=interpolation,
        jitter_p=0.8,
        jitter=(0.2, 0.2, 0.2, 0.0),
        blur_p=0.5,
        blur_kernel=min(9, 2 * size - 1),
        blur_sigma=(0.1, 1.0),
    )
    return cycle([view], views)


def crop(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.08, 1.0),
    flip_p: UnitInterval = 0.5,
    jitter: UnitInterval = 0.0,
    interpolation: Interpolation = "bilinear",
) -> list[View]:
    """One view for a classifier: a random crop and a flip, as in torchvision's reference training (presets.py).

    Args:
        jitter: brightness, contrast and saturation change by up to this factor.
    """
    colors = {"jitter_p": float(jitter > 0), "jitter": (jitter, jitter, jitter, 0.0)}
    return [View(size, scale=scale, interpolation=interpolation, flip_p=flip_p, **colors)]


def randaugment(
    *,
    size: Pixels = 224,
    scale: RisingShares = (0.08, 1.0),
    flip_p: UnitInterval = 0.5,
    operations: FewOrZero = 3,
    cutout: UnitInterval = 0.5,
    interpolation: Interpolation = "bilinear",
) -> list[View]:
    """One view for a classifier: `crop`, then RandAugment and cutout as in FixMatch (data/augment/strong.py).

    Args:
        operations: of the 14 of RandAugment, each with a strength of its own.
        cutout: largest side of a gray square, as a share of the view's width.
    """
    (view,) = crop(size=size, scale=scale, flip_p=flip_p, interpolation=interpolation)
    return [replace(view, operations=operations, cutout=cutout)]


def none(*, size: Pixels = 224) -> list[View]:
    """One view, resized and normalized and nothing else."""
    return [View(size)]


def strong(size: int | tuple[int, int], **options) -> View:
    """What MoCo v2 and all after it share: jitter of 4 in 5 views, gray 1 in 5, PIL's blur; `options` as of `View`."""
    side = size if isinstance(size, int) else min(size)
    return View(size, jitter_p=0.8, gray_p=0.2, blur_kernel=min(17, 2 * side - 1), **options)


def cycle(kinds: list[View], views: int) -> list[View]:
    """So many views, of each kind in turn."""
    return [kinds[number % len(kinds)] for number in range(views)]


RECIPES: dict[str, Callable[..., list[View]] | type[PatchGrid]] = {
    "simclr": simclr,
    "moco": moco,
    "byol": byol,
    "psco": psco,
    "dino": dino,
    "aligned": aligned,
    "patches": PatchGrid,
    "crop": crop,
    "randaugment": randaugment,
    "none": none,
}


@dataclass(kw_only=True)
class AugmentConfig:
    """`augment.*`: the recipe's name and its keyword-only arguments."""

    name: str = choice(RECIPES)
    options: dict = field(default_factory=dict)


def build_augment(
    config: AugmentConfig, seed: int, sizes: Tensor | None, normalization: Normalization
) -> Augment | PatchGrid:
    """What makes the views of an `augment` section, ready to call: `views = augment(images, sample_ids, epoch)`.

    `augment.views` describes them, each with its `size`. sizes (N, 2): heights and widths of the original images;
    None: crops are drawn in the stored ones. normalization: of the backbone that gets the views.
    """
    recipe = RECIPES[config.name]
    if recipe is PatchGrid:
        return PatchGrid(seed, normalization, **config.options)
    return Augment(recipe(**config.options), seed, sizes, normalization=normalization)
