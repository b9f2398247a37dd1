"""RandAugment's 14 operations and cutout, batched on the device, each image with its own operations and strengths.

    images = rand_augment(images, key, operations=3, cutout=0.5)  # float (B, 3, H, W) in [0, 1], of whole levels after

The operations, their ranges and cutout are those of TorchSSL's randaugment.py, which FixMatch's PyTorch results come
from, and so Pillow's to the level: nearest pixels, black where there was no image, values cut off and not rounded. The
factors of brightness, color, contrast and sharpness are at most 0.95, so these only ever take something away.

A batch is `levels`: float (B, 3, H, W) of whole numbers 0 to 255. As most operations tell one level from the next, an
image is rounded to levels first. Operations come in three families, each one kernel for all of its images: tables of
256 levels, blends with a reference, and affine maps. All draws are made on the CPU and nothing waits for the device.

Letters: B images, H and W their height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.random_numbers import uniform
from runtime.memory import send

RANGES: dict[str, tuple[float, float]] = {  # in the order of the official list; the strength is uniform between both
    "autocontrast": (0, 1),
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "equalize": (0, 1),
    "identity": (0, 1),
    "posterize": (4, 8),  # bits that stay
    "rotate": (-30, 30),  # degrees, counterclockwise
    "sharpness": (0.05, 0.95),
    "shear_x": (-0.3, 0.3),  # pixels per pixel
    "shear_y": (-0.3, 0.3),
    "solarize": (0, 256),  # the level from which on it inverts
    "translate_x": (-0.3, 0.3),  # of the width; positive: to the left
    "translate_y": (-0.3, 0.3),  # of the height; positive: upwards
}
OPERATIONS = list(RANGES)  # an operation's number is its place
TABLES, BLENDS, MAPS = (
    torch.tensor([OPERATIONS.index(name) for name in names.split()])
    for names in (
        "autocontrast equalize posterize solarize",
        "brightness color contrast sharpness",
        "rotate shear_x shear_y translate_x translate_y",
    )
)
CUTOUT_COLOR = (125.0, 123.0, 114.0)  # the mean of CIFAR-10 in levels
FIXED = 2**16  # Pillow's affine maps count in these parts of a pixel


def rand_augment(images: Tensor, key: tuple[int | Tensor, ...], *, operations: int, cutout: float) -> Tensor:
    """So many operations on each image, drawn with replacement, and then cutout: (B, 3, H, W) in [0, 1] -> likewise.

    RandAugment (Cubuk et al. 2020) as in FixMatch (Sohn et al. 2020), where each operation has a strength of its own,
    uniform in its range, in place of one magnitude for all.

    Args:
        key: of `random_numbers.uniform`, B rows.
        cutout: largest side of the gray square, as a share of the image's width; 0: none.
    """
    chosen, strengths, square = uniform(key, 2 * operations + 3).split((operations, operations, 3), dim=1)  # (B, draws)
    low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).unbind(1)  # (14,) each
    levels = to_levels(images)
    for number, strength in zip((chosen * len(RANGES)).long().unbind(1), strengths.unbind(1)):
        levels = apply(levels, number, low[number] + (high - low)[number] * strength)
    levels = cut_out(levels, square[:, 0] * cutout, square[:, 1:])
    return levels.div_(255)


def to_levels(images: Tensor) -> Tensor:
    """[0, 1] -> whole numbers 0 to 255, to the nearest."""
    return images.mul(255).add_(0.5).floor_().clamp_(0, 255)


def apply(levels: Tensor, operations: Tensor, strengths: Tensor) -> Tensor:
    """One operation on each image: levels (B, 3, H, W); operations (B,) int64 and strengths (B,) float64 on the CPU."""
    for family, change in ((TABLES, look_up), (BLENDS, blend), (MAPS, transform)):
        rows = torch.isin(operations, family).nonzero()[:, 0]
        if len(rows):
            there = send(rows, levels.device)
            changed = change(levels.index_select(0, there), operations[rows], strengths[rows])
            levels = levels.index_copy(0, there, changed)
    return levels


def is_any(operations: Tensor, name: str) -> Tensor:
    return operations == OPERATIONS.index(name)


def look_up(levels: Tensor, operations: Tensor, strengths: Tensor) -> Tensor:
    """Each channel through a table: autocontrast, equalize (both of the channel's histogram), posterize, solarize."""
    flat, device = levels.flatten(2).long(), levels.device  # (B, 3, H W)
    level = torch.arange(256, device=device, dtype=torch.float64)
    counts = torch.zeros(*flat.shape[:2], 256, device=device, dtype=torch.float64)
    counts.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.float64))  # (B, 3, 256), whole, so in any order

    low, high = (end.double()[..., None] for end in (flat.amin(2), flat.amax(2)))  # (B, 3, 1)
    # 255 / tensor would round twice; infinite in a channel of one level, which stays as it is
    scale = torch.full_like(low, 255) / (high - low)
    stretched = torch.where(high > low, (level * scale - low * scale).trunc(), level)

    step = ((counts.sum(2, keepdim=True) - counts.gather(2, flat.amax(2, keepdim=True))) / 255).floor()  # (B, 3, 1)
    before = counts.cumsum(2) - counts
    spread = ((before + (step / 2).floor()) / step).floor()
    equalized = torch.where((step > 0) & (high > low), spread, level)

    bits, threshold, kind = (send(x, device)[:, None, None] for x in (strengths.trunc(), strengths, operations))
    lost = 2 ** (8 - bits)  # (B, 1, 1)
    table = (level / lost).floor() * lost
    table = torch.where(is_any(kind, "solarize"), torch.where(level < threshold, level, 255 - level), table)
    table = torch.where(is_any(kind, "autocontrast"), stretched, table)
    table = torch.where(is_any(kind, "equalize"), equalized, table).clamp_(0, 255)  # (B, 3, 256)
    return table.float().gather(2, flat).unflatten(2, levels.shape[2:])  # (B, 3, H, W)


def blend(levels: Tensor, operations: Tensor, strengths: Tensor) -> Tensor:
    """reference + factor (image - reference): brightness (black), color (gray), contrast (the mean gray), sharpness
    (the image smoothed by 1 1 1, 1 5 1, 1 1 1 over 13, but for its border)."""
    factor, kind = (send(x, levels.device)[:, None, None, None] for x in (strengths.float(), operations))
    red, green, blue = levels.split(1, dim=1)
    gray = ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()  # exact, as below 2^24
    mean = (gray.sum((2, 3), keepdim=True, dtype=torch.float64) / gray[0].numel() + 0.5).floor().float()

    sums = F.avg_pool2d(levels, 3, stride=1, padding=1, divisor_override=1) + 4 * levels
    smooth, inside = levels.clone(), (..., slice(1, -1), slice(1, -1))
    smooth[inside] = (sums[inside] / 13 + 0.5).floor()

    reference = torch.where(is_any(kind, "sharpness"), smooth, torch.zeros_like(levels))
    reference = torch.where(is_any(kind, "color"), gray, reference)
    reference = torch.where(is_any(kind, "contrast"), mean, reference)
    return (reference + factor * (levels - reference)).floor()


def transform(levels: Tensor, operations: Tensor, strengths: Tensor) -> Tensor:
    """Rotation about the middle, shears and translations: the pixel at which the middle of each output pixel lands."""
    height, width = levels.shape[2:]
    steps = send(affine(operations, strengths, height, width), levels.device)[..., None, None]  # (B, 6, 1, 1)
    y, x = torch.arange(height, device=levels.device)[:, None], torch.arange(width, device=levels.device)
    columns = (steps[:, 0] * x + steps[:, 1] * y + steps[:, 2]) >> 16  # (B, H, W); rounds down, below 0 too
    rows = (steps[:, 3] * x + steps[:, 4] * y + steps[:, 5]) >> 16
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    place = torch.where(inside, rows * width + columns, 0).flatten(1)  # (B, H W)
    moved = levels.flatten(2).gather(2, place[:, None].expand(-1, 3, -1)).view_as(levels)
    return moved * inside[:, None]


def affine(operations: Tensor, strengths: Tensor, height: int, width: int) -> Tensor:
    """What Pillow's affine maps count in, int64 (B, 6): a to f of column = a x + b y + c, row = d x + e y + f
    for the middle of pixel (x, y)."""
    rotated, zero = is_any(operations, "rotate"), torch.zeros_like(strengths)
    angle = torch.where(rotated, -torch.deg2rad(strengths), zero)
    a = e = angle.cos()
    b = torch.where(is_any(operations, "shear_x"), strengths, angle.sin())
    d = torch.where(is_any(operations, "shear_y"), strengths, -angle.sin())
    c = torch.where(rotated, width / 2 - a * (width / 2) - b * (height / 2), zero) + a / 2 + b / 2
    f = torch.where(rotated, height / 2 - d * (width / 2) - e * (height / 2), zero) + d / 2 + e / 2
    # whole pixels, which Pillow finds without fixed point
    c = torch.where(is_any(operations, "translate_x"), (strengths * width + 0.5).floor(), c)
    f = torch.where(is_any(operations, "translate_y"), (strengths * height + 0.5).floor(), f)
    return (torch.stack([a, b, c, d, e, f], 1) * FIXED + 0.5).floor().long()


def cut_out(levels: Tensor, sides: Tensor, centre: Tensor) -> Tensor:
    """A gray square in each image (DeVries & Taylor 2017), as TorchSSL and Pillow draw it: from the whole pixel below
    centre - side / 2, at least 0, to the one below that plus the side, which is in it.

    Args:
        sides: (B,) as shares of the width; 0: none. centre: (B, 2), x and y as shares of width and height.
    """
    height, width = levels.shape[2:]
    side = sides * width
    left, top = (((c * n) - side / 2).clamp(min=0).floor() for c, n in zip(centre.unbind(1), (width, height)))
    ends = [(start + side).clamp(max=n).floor() for start, n in ((left, width), (top, height))]
    left, top, right, bottom = send(torch.stack([left, top, *ends]), levels.device)[..., None]  # (B, 1) each
    y, x = (torch.arange(n, device=levels.device) for n in (height, width))
    rows, columns = (y >= top) & (y <= bottom), (x >= left) & (x <= right)  # (B, H), (B, W)
    square = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    square &= send(sides > 0, levels.device)[:, None, None, None]
    return torch.where(square, send(torch.tensor(CUTOUT_COLOR), levels.device)[:, None, None], levels)
