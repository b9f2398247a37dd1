"""Anomaly maps as pictures: a color ramp, an overlay, the outline of the true defect, and a sheet that shows at a
glance what a detector finds, misses and wrongly reports. Images are uint8 (3, H, W); Pillow draws."""

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from evaluation.anomaly_metrics import Array, real_numbers, to_numpy
from evaluation.lettering import font, write
from training.files import whole_file

# Matplotlib's "inferno" (Smith and van der Walt 2015, public domain) at 0, 1/8 .. 1: lightness rises evenly, so it also
# reads in grey and to the color-blind.
INFERNO = torch.tensor(
    [
        [0, 0, 4],
        [31, 12, 72],
        [85, 15, 109],
        [136, 34, 106],
        [186, 54, 85],
        [227, 89, 51],
        [249, 140, 10],
        [249, 201, 50],
        [252, 255, 164],
    ],
    dtype=torch.float32,
)
OUTLINE = (60, 230, 255)  # cyan: in no metal and not on the ramp
PAPER, INK, SOFT, RIGHT, WRONG = (255, 255, 255), (25, 25, 25), (110, 110, 110), (20, 120, 60), (190, 30, 30)
TILE, GAP, MARGIN, CAPTION = 208, 8, 24, 236  # pixels


@dataclass
class Caption:
    """What is said beside a picture of the test set: why it is shown, and what the detector made of it."""

    index: int  # of the picture in the test set
    heading: str
    lines: list[str]
    correct: bool


@dataclass
class Row:
    """One picture of a sheet. `mask` None where there is no ground truth."""

    image: torch.Tensor  # uint8 (3, H, W)
    map: torch.Tensor  # float (H, W), raw scores
    mask: torch.Tensor | None  # bool (H, W)
    caption: Caption


def colorize(values: torch.Tensor) -> torch.Tensor:
    """(H, W) in [0, 1], clamped -> uint8 (3, H, W): black, violet, red, orange, pale yellow (inferno, 9 anchors)."""
    position = values.float().clamp(0, 1) * (len(INFERNO) - 1)
    left = position.floor().clamp(max=len(INFERNO) - 2)
    ramp = INFERNO.to(values.device)
    colors = torch.lerp(ramp[left.long()], ramp[left.long() + 1], (position - left)[..., None])  # (H, W, 3)
    return colors.round().to(torch.uint8).permute(2, 0, 1)  # (3, H, W)


def overlay(image: torch.Tensor, heat: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Heat map `heat` (H, W) over `image` uint8 (3, H, W) -> uint8 (3, H, W).

    The picture goes grey, so that color means score only; scores up to `low` leave it bare, from `high` on the color
    is at its hottest and covers 85 %.
    """
    values = ((heat.float() - low) / (high - low)).clamp(0, 1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)  # ITU-R BT.601 luma, as PIL's "L"
    grey = torch.tensordot(weights, image.float(), 1)  # (H, W)
    blended = torch.lerp(grey.expand(3, -1, -1), colorize(values).float(), 0.85 * values)  # (3, H, W)
    return blended.round().to(torch.uint8)


def outline(image: torch.Tensor, mask: torch.Tensor, width: int = 2) -> torch.Tensor:
    """Draw the border of `mask` bool (H, W), `width` pixels wide, just outside it, so that the defect stays visible."""
    grown = F.max_pool2d(mask[None].float(), 2 * width + 1, stride=1, padding=width)[0] > 0  # (H, W)
    color = torch.tensor(OUTLINE, dtype=torch.uint8, device=image.device)[:, None, None]  # (3, 1, 1)
    return torch.where(grown & ~mask, color, image)


def heat_range(maps: Array | list[Array]) -> tuple[float, float]:
    """(low, high) of one color scale for all pictures, from maps of normal pictures only, (N, H, W) or a list.

    low = median pixel, so that half of a normal picture stays bare; high = low + 1.5 (q - low), q the 99.9 % quantile:
    the hottest spots of normal pictures come out at two thirds of the ramp, and only what lies beyond them glows. The
    normals should not be those the detector memorized, whose maps are too cold. Never use test defects here: a scale
    stretched per picture paints an alarm on every good one.
    """
    pixels = np.concatenate([to_numpy(m).ravel() for m in maps])
    low, q = np.quantile(real_numbers(pixels, "pixels of normal anomaly maps"), (0.5, 0.999)).tolist()
    return low, low + 1.5 * (q - low) if q > low else low + 1


def pick(scores: Array, labels: Array, defects: list[str], threshold: float | None, *, each: int = 3) -> list[Caption]:
    """Choose the pictures that tell most about a detector; every picture at most once.

    In this order: the `each` defects that scored lowest (misses, if not above the threshold), the `each` good pictures
    that scored highest (false alarms, if above it), then of every defect type the highest and the median picture, and
    the median good one. `scores` (N,), `labels` (N,) 0/1, `defects` N names, "good" for the normal ones. Without a
    threshold nothing is called anything.
    """
    scores, labels = real_numbers(to_numpy(scores), "image scores"), to_numpy(labels).astype(bool)
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    by_score = np.argsort(scores, kind="stable")
    bad, good = by_score[labels[by_score]], by_score[~labels[by_score]]
    chosen = [(i, "weakest find", "missed") for i in bad[:each]]
    chosen += [(i, "highest good score", "false alarm") for i in good[::-1][:each]]
    for name in sorted(set(defects), key=lambda name: (name == "good", name)):
        members = [i for i in by_score if defects[i] == name]
        if name != "good":
            chosen.append((members[-1], "strongest of its kind", "strongest of its kind"))
        chosen.append((members[(len(members) - 1) // 2], "typical", "typical"))
    captions: dict[int, Caption] = {}
    for i, if_correct, if_wrong in chosen:
        alarm = threshold is not None and bool(scores[i] > threshold)
        correct = threshold is None or alarm == bool(labels[i])
        called = [] if threshold is None else [f"called {'anomalous' if alarm else 'normal'}"]
        limit = "" if threshold is None else f" (threshold {threshold:.4g})"
        lines = [defects[i], *called, f"score {scores[i]:.4g}{limit}", f"rank {rank[i]} of {len(scores)}"]
        captions.setdefault(int(i), Caption(int(i), if_correct if correct else if_wrong, lines, correct))
    return list(captions.values())


def sheet(rows: list[Row], path: str | os.PathLike, *, low: float, high: float, title: str, columns: int = 2) -> None:
    """Write a contact sheet: for each row the picture, the heat map over it, and the caption.

    The true defect is outlined in both. `low` and `high` as for `overlay`; rows fill the sheet from left to right in
    `columns`. A title of one line and the key to the colors stand on top. Pictures of any H x W are drawn 208 x 208.
    """
    block = 2 * TILE + 2 * GAP + CAPTION
    top = 104
    lines = -(-len(rows) // columns)
    size = (2 * MARGIN + columns * block, top + lines * (TILE + GAP) + MARGIN - GAP)
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    write(draw, (MARGIN, 18), title, INK, 24, width=size[0] - 2 * MARGIN)
    _legend(paper, low, high)
    for number, row in enumerate(rows):
        line, column = divmod(number, columns)
        x, y = MARGIN + column * block, top + line * (TILE + GAP)
        picture, heat = _tiles(row, low, high)
        paper.paste(picture, (x, y))
        paper.paste(heat, (x + TILE + GAP, y))
        x += 2 * TILE + 2 * GAP + 4
        draw.text((x, y + 4), row.caption.heading, RIGHT if row.caption.correct else WRONG, font(19))
        for i, line in enumerate(row.caption.lines):
            room = CAPTION - GAP if i == 0 else None  # a name may be cut, numbers may not
            write(draw, (x, y + 34 + 22 * i), line, INK, 16, width=room)
    save(paper, path)


def save(paper: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture whole or not at all."""
    with whole_file(path, "wb") as file:
        paper.save(file, "PNG", compress_level=1)  # twice as fast as the default, and hardly larger


def _tiles(row: Row, low: float, high: float) -> tuple[Image.Image, Image.Image]:
    def resize(x: torch.Tensor, mode: str) -> torch.Tensor:  # (C, H, W) -> (C, TILE, TILE)
        smooth = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
        return F.interpolate(x[None].float(), (TILE, TILE), mode=mode, **smooth)[0]

    image = resize(row.image.cpu(), "bilinear").round().clamp(0, 255).to(torch.uint8)
    heat = overlay(image, resize(row.map.cpu()[None], "bilinear")[0], low, high)
    if row.mask is not None and row.mask.any():
        mask = resize(row.mask.cpu()[None], "nearest-exact")[0] > 0
        image, heat = outline(image, mask), outline(heat, mask)
    return _picture(image), _picture(heat)


def _legend(paper: Image.Image, low: float, high: float) -> None:
    """Two lines under the title: the outline's meaning, and the ramp as it looks over a mid-grey picture."""
    draw, y, length = ImageDraw.Draw(paper), 64, 240
    draw.rectangle((MARGIN, y + 2, MARGIN + 22, y + 18), outline=OUTLINE, width=3)
    draw.text((MARGIN + 30, y), "true defect", INK, font(16))
    x = MARGIN + TILE + GAP
    ramp = torch.linspace(low, high, length).expand(18, -1)  # (18, length)
    paper.paste(_picture(overlay(torch.full((3, 18, length), 128, dtype=torch.uint8), ramp, low, high)), (x, y + 1))
    draw.text((x + length + 10, y), f"score {low:.3g} (usual) to {high:.3g} and more", SOFT, font(16))


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
