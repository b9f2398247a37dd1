"""Anomaly maps as images: a color ramp, an overlay, outlines, a legend, and a sheet that shows at a glance what a
detector finds, misses and wrongly reports. Images are uint8 (3, H, W); Pillow draws. Colors: plots/style.py."""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from plots.style import ABOVE, ALARM, GRID, INK, PAPER, PEAK, RIGHT, RIM, TRUE_DEFECT, WRONG, font, write
from runtime.files import whole_file

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
TILE, GAP, MARGIN, CAPTION, TOP = 208, 8, 24, 240, 104  # pixels; TOP: room for title and legend
NARROWEST = 420  # pixels: room for the widest line below a single image


@dataclass
class Caption:
    """The text beside an image of the test set: the verdict, and what it is based on."""

    index: int  # of the image in the test set
    heading: str  # correct, missed, false alarm or no threshold
    lines: list[str]
    correct: bool | None  # None without a threshold


@dataclass
class Row:
    """One image of a sheet. `mask` None where there is no ground truth."""

    image: torch.Tensor  # uint8 (3, H, W)
    map: torch.Tensor  # float (H, W), raw scores
    mask: torch.Tensor | None  # bool (H, W)
    peak: tuple[float, float] | None  # (y, x) of the most anomalous position in the map; None: the detector names none
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

    The image goes grey, so that color means score only; scores up to `low` leave it bare, from `high` on the color
    is at its hottest and covers 85 %.
    """
    values = ((heat.float() - low) / (high - low)).clamp(0, 1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)  # ITU-R BT.601 luma, as PIL's "L"
    grey = torch.tensordot(weights, image.float(), 1)  # (H, W)
    blended = torch.lerp(grey.expand(3, -1, -1), colorize(values).float(), 0.85 * values)  # (3, H, W)
    return blended.round().to(torch.uint8)


def outline(
    image: torch.Tensor, mask: torch.Tensor, color: tuple[int, int, int] = TRUE_DEFECT, width: int = 2, rim: int = 0
) -> torch.Tensor:
    """Draw the border of `mask` bool (H, W), `width` pixels wide, just outside it, so that the defect stays visible;
    with `rim` black pixels on both sides of the line."""
    colors = torch.tensor([color, RIM], dtype=torch.uint8, device=image.device)[..., None, None]  # (2, 3, 1, 1)
    inner = _grown(mask, rim)
    line = _grown(inner, width)
    if rim:
        image = torch.where(_grown(line, rim) & ~mask, colors[1], image)
    return torch.where(line & ~inner, colors[0], image)


def _grown(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """`mask` bool (H, W) and what is at most so many rows and columns away."""
    for _ in range(2):
        reach = 0
        while reach < pixels:  # twice as far at each turn
            step = min(reach + 1, pixels - reach)
            wider = mask.clone()
            wider[step:] |= mask[:-step]
            wider[:-step] |= mask[step:]
            mask, reach = wider, reach + step
        mask = mask.T  # rows, then columns
    return mask


def outline_above(image: torch.Tensor, heat: torch.Tensor, pixel_threshold: float | None) -> torch.Tensor:
    """Outline what lies above the pixel threshold in a map (H, W), with lines as wide as the image is large."""
    if pixel_threshold is None:
        return image
    rim = max(1, round(min(heat.shape) / 600))
    return outline(image, heat > pixel_threshold, ABOVE, width=2 * rim, rim=rim)


def mark_peak(draw: ImageDraw.ImageDraw, at: tuple[float, float], size: float) -> None:
    """A cross, `size` pixels high, at (y, x)."""
    (y, x), half, width = at, size / 2, max(1, round(size / 8))
    for color, more in ((RIM, max(1, width // 2)), (PEAK, 0)):
        for ends in ((x - half - more, y, x + half + more, y), (x, y - half - more, x, y + half + more)):
            draw.line(ends, color, width + 2 * more)


def sheet(
    rows: list[Row], *, low: float, high: float, pixel_threshold: float | None, title: str, columns: int = 2
) -> Image.Image:
    """A contact sheet: for each row the image, the heat map over it, and the caption.

    The true defect is outlined in both, what lies above `pixel_threshold` and the peak are marked in the latter; of a
    defect with a mask the caption says whether the peak lies outside it. `low` and `high` as for `overlay`; rows fill
    the sheet from left to right in `columns`. A title of one line and the legend stand on top. Images of any H x W are
    drawn 208 x 208.
    """
    block = 2 * TILE + 2 * GAP + CAPTION
    lines, top = -(-len(rows) // columns), TOP if columns > 1 else TOP + 28  # one column wraps the legend
    size = (2 * MARGIN + columns * block, top + lines * (TILE + GAP) + MARGIN - GAP)
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    write(draw, (MARGIN, 18), title, INK, 24, width=size[0] - 2 * MARGIN)
    masked = any(row.mask is not None for row in rows)
    marks = {"masked": masked, "peaked": any(row.peak is not None for row in rows)}
    legend(paper, (MARGIN, 60), low, high, pixel_threshold, **marks, width=size[0] - 2 * MARGIN)
    for number, row in enumerate(rows):
        line, column = divmod(number, columns)
        x, y = MARGIN + column * block, top + line * (TILE + GAP)
        image, heat = _tiles(row, low, high, pixel_threshold)
        paper.paste(image, (x, y))
        paper.paste(heat, (x + TILE + GAP, y))
        x += 2 * TILE + 2 * GAP + 4
        draw.text((x, y + 4), row.caption.heading, verdict_color(row.caption.correct), font(19))
        for i, line in enumerate([*row.caption.lines, *_where_the_peak_is(row)]):
            room = CAPTION - GAP if i == 0 else None  # a name may be cut, numbers may not
            write(draw, (x, y + 34 + 22 * i), line, INK, 16, width=room)
    return paper


def last_rows(paper: Image.Image, count: int) -> Image.Image:
    """Of a sheet of two columns, images and heat maps of the last `count` rows below one another, without captions."""
    block, line = 2 * TILE + 2 * GAP + CAPTION, TILE + GAP
    lines = (paper.height - TOP - MARGIN + GAP) // line
    places = [(MARGIN + column * block, TOP + at * line) for at in range(lines) for column in (0, 1)]
    parts = [paper.crop((x, y, x + 2 * TILE + GAP, y + TILE)) for x, y in places]
    parts = parts[: len(parts) - (len(parts) > 0 and set(parts[-1].getdata()) == {PAPER})]  # the last may not be there
    cut = Image.new("RGB", (2 * TILE + GAP, max(1, len(parts[-count:]) * line - GAP)), PAPER)
    for number, part in enumerate(parts[-count:]):
        cut.paste(part, (0, number * line))
    return cut


def verdict_color(correct: bool | None) -> tuple[int, int, int]:
    return INK if correct is None else RIGHT if correct else WRONG


def _where_the_peak_is(row: Row) -> list[str]:
    if row.peak is None or row.mask is None or not row.mask.any():
        return []
    y, x = (min(max(int(at), 0), side - 1) for at, side in zip(row.peak, row.mask.shape))
    return [f"peak {'inside' if row.mask[y, x] else 'outside'} the true defect"]


def save(paper: Image.Image, path: str | os.PathLike) -> None:
    """Write an image atomically."""
    with whole_file(path, "wb") as file:
        paper.save(file, "PNG", compress_level=1)  # twice as fast as the default, and hardly larger


def _tiles(row: Row, low: float, high: float, pixel_threshold: float | None) -> tuple[Image.Image, Image.Image]:
    def resize(x: torch.Tensor, mode: str) -> torch.Tensor:  # (C, H, W) -> (C, TILE, TILE)
        smooth = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
        return F.interpolate(x[None].float(), (TILE, TILE), mode=mode, **smooth)[0]

    scores = row.map.cpu()
    image = resize(row.image.cpu(), "bilinear").round().clamp(0, 255).to(torch.uint8)
    heat = overlay(image, resize(scores[None], "bilinear")[0], low, high)
    heat = outline_above(heat, resize(scores[None], "nearest-exact")[0], pixel_threshold)
    if row.mask is not None and row.mask.any():
        mask = resize(row.mask.cpu()[None], "nearest-exact")[0] > 0
        image, heat = outline(image, mask), outline(heat, mask)
    image, heat = to_pil(image), to_pil(heat)
    if row.peak is not None:
        mark_peak(ImageDraw.Draw(heat), tuple(at * TILE / n for at, n in zip(row.peak, scores.shape)), 14)
    return image, heat


def legend(
    paper: Image.Image,
    at: tuple[int, int],
    low: float,
    high: float,
    pixel_threshold: float | None,
    *,
    masked: bool,
    peaked: bool,
    width: int,
    size: int = 16,
) -> int:
    """Say what outlines, cross and ramp mean, from `at` (x, y) in lines of `width` pixels, letters of `size`; returns
    where the next line would begin. `masked`, `peaked`: whether true defects and peaks are marked. The ramp is
    as over mid-grey.
    """
    draw, side, (x, y) = ImageDraw.Draw(paper), round(1.25 * size), at
    rim = max(1, side // 20)
    grey = torch.full((3, side, side), 128, dtype=torch.uint8)
    box = torch.zeros(side, side, dtype=torch.bool)
    box[side // 4 : -(side // 4), side // 4 : -(side // 4)] = True
    cross = to_pil(grey)
    mark_peak(ImageDraw.Draw(cross), (side / 2, side / 2), 0.7 * side)
    ramp = torch.linspace(low, high, 9 * size).expand(side, -1)  # (side, 9 size)
    items = [(to_pil(outline(grey, box, width=2 * rim)), "true defect")] if masked else []
    if pixel_threshold is not None:
        swatch = to_pil(outline(grey, box, ABOVE, width=2 * rim, rim=rim))
        items.append((swatch, f"above the pixel threshold {pixel_threshold:.4g}"))
    items += [(cross, "most anomalous position")] if peaked else []
    ramp = overlay(torch.full((3, *ramp.shape), 128, dtype=torch.uint8), ramp, low, high)
    items.append((to_pil(ramp), f"{low:.3g} (usual) to {high:.3g} and more"))
    for swatch, text in items:
        needed = swatch.width + 0.5 * size + font(size).getlength(text)
        if x > at[0] and x + needed > at[0] + width:
            x, y = at[0], y + round(1.75 * size)
        paper.paste(swatch, (x, y))
        draw.text((x + swatch.width + 0.5 * size, y + side / 2), text, INK, font(size), anchor="lm")
        x += round(needed + 1.5 * size)
    return y + round(1.75 * size)


def single_heatmap(
    image: torch.Tensor,
    heat: torch.Tensor,
    calibration: dict,
    *,
    score: float,
    threshold: float | None,
    peak: tuple[int, int] | None,
) -> Image.Image:
    """One image uint8 (3, h, w) at full size with its anomaly map `heat` (h, w) over it: what lies above the pixel
    threshold is outlined and the peak (y, x) marked; below it stand verdict, score, threshold and legend. The pixels
    stay where they are. `calibration`: low, high and pixel_threshold."""
    low, high = calibration["low"], calibration["high"]
    # in strips, because an overlay needs 60 bytes per pixel while it is made
    strips = [overlay(some, own, low, high) for some, own in zip(image.split(256, dim=1), heat.split(256))]
    drawn = to_pil(outline_above(torch.cat(strips, dim=1), heat, calibration["pixel_threshold"]))
    if peak is not None:
        mark_peak(ImageDraw.Draw(drawn), peak, max(12, min(drawn.size) / 20))
    return captioned(drawn, calibration, score, threshold, peaked=peak is not None)


def bytes_to_draw(height: int, width: int) -> int:
    """What `single_heatmap` and `save` take at most for an image of this size."""
    return height * (32 * width + 8 * max(width, NARROWEST))


def captioned(
    drawn: Image.Image, calibration: dict, score: float, threshold: float | None, *, peaked: bool = True
) -> Image.Image:
    """`drawn` with a band below it, of letters that grow with the image; one that is narrow gets white at its right."""
    size = min(max(16, round(drawn.width / 50)), 48)
    width, pad, low, high = max(drawn.width, NARROWEST), size // 2, calibration["low"], calibration["high"]
    paper = Image.new("RGB", (width, drawn.height + 10 * size), PAPER)
    paper.paste(drawn, (0, 0))
    draw, y = ImageDraw.Draw(paper), drawn.height + pad
    verdict, fill = ("ANOMALOUS", ALARM) if threshold is not None and score > threshold else ("NORMAL", GRID)
    limit = "no threshold" if threshold is None else f"threshold {threshold:.4g}"
    x = pad
    if threshold is not None:
        end = x + font(size).getlength(verdict) + 2 * pad
        draw.rectangle((x, y, end, y + 1.5 * size), fill)
        draw.text((x + pad, y + 0.75 * size), verdict, INK, font(size), anchor="lm")
        x = end + size
    draw.text((x, y + 0.75 * size), f"score {score:.4g}, {limit}", INK, font(size), anchor="lm")
    at, shown = (pad, y + 2 * size), calibration["pixel_threshold"]
    bottom = legend(paper, at, low, high, shown, masked=False, peaked=peaked, width=width - 2 * pad, size=size)
    return paper.crop((0, 0, width, min(bottom + pad, paper.height)))


def to_pil(image: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) on the CPU."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
