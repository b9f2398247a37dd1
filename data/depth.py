"""Pixels of more than 8 bits, and how any mode becomes 8 bits.

Cameras store 10, 12 or 14 bits in files of 16, without a word in the file, and thermal ones temperatures of which a
few degrees matter: `black` and `white` are the values that become 0 and 255.
"""

import mmap
import sys
from functools import lru_cache

import numpy as np
from PIL import Image

from runtime.distributed import is_main
from runtime.files import open_regular
from runtime.text import printable

WHITE = 65535  # of a file that uses its 16 bits
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # TIFF tags
WHITE_IS_ZERO, SIGNED = 0, (2,)  # and values of theirs
COLORS = ("RGB;16B", "RGB;16L", "RGBA;16B", "RGBA;16L")  # Pillow's words for layouts of 16-bit colors
_SAID = mmap.mmap(-1, 1)  # shared with forked workers: of clipped pixels a run says one line


def to_8_bit(image: Image.Image, white: float = WHITE, black: float = 0) -> Image.Image:
    """Any mode to L or RGB of the same look.

    Values v of 16 bits, 32 bits and floating point become (v - black) * 255 / (white - black), clipped, to the nearest.
    With black 0, a camera's, the first image that has any above `white` is named on stderr; another black is a range
    that somebody chose. Of 16-bit colors Pillow reads the upper byte, which is kept for the default range.

    Raises:
        ValueError: floating-point values or values above 65535 while the range is the default; values that are not
            numbers; negative whole ones while `black` is 0; with another range 16-bit colors that are neither RGB nor
            RGBA.
    """
    chosen = (black, white) != (0, WHITE)
    if image.mode == "F" and not chosen:
        raise ValueError("floating-point pixels have no declared range: set data.black and data.white, or both to auto")
    if image.mode == "F" or image.mode.startswith("I"):
        inverted, pixels = white_is_zero(image), _scaled(image, white, black)
        return Image.fromarray(255 - pixels if inverted else pixels)
    if chosen and is_deep(image):
        colors = Image.fromarray(_scaled(image, white, black))
        if image.mode == "RGBA":
            colors.putalpha(image.getchannel("A"))
        image = colors
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def not_black(image: Image.Image) -> Image.Image:
    """255 where a stored pixel is not 0 or black, else 0."""
    return Image.fromarray((largest_channel(image) != 0).astype(np.uint8) * 255)


def largest_channel(image: Image.Image) -> np.ndarray:
    """A mask's values (h, w), as deep as stored; a palette counts by its colors, not by its numbers."""
    inverted = white_is_zero(image)
    if image.mode == "F":
        values = np.asarray(image)
    else:  # 8 bits would turn a 16-bit 1 into 0
        deep = image.mode.startswith("I") or _raw_mode(image) in COLORS
        values = _not_negative(deep_values(image)) if deep else np.asarray(to_8_bit(image))
    values = WHITE - values if inverted else values
    return values if values.ndim == 2 else values.max(2)


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not yet loaded has 16 or 32 bits a channel whose white the file does not fix."""
    fixed = image.format == "PPM" and image.tile[0][0] != "raw"  # Pillow has scaled it by the file's own maximum
    return not fixed and (image.mode.startswith(("I", "F")) or _raw_mode(image).endswith((";16B", ";16L", ";16N")))


def white_is_zero(image: Image.Image) -> bool:
    """Whether a deep TIFF counts from white to black. Pillow inverts such files of 8 bits, those of 16 it does not."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def deep_values(image: Image.Image) -> np.ndarray:
    """The values of a deep file as they are stored, (h, w) or (h, w, 3): uint16, uint32, int32 if signed, float32.

    Raises:
        ValueError: values that are not numbers, or 16-bit colors other than RGB and RGBA.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if missing := np.count_nonzero(~np.isfinite(values)):
            raise ValueError(f"{missing:,} of its {values.size:,} values are not finite numbers")
        return values
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype != np.int32 or getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT) == SIGNED:
            return values
        return values.view(np.uint32)  # as Pillow has no unsigned mode of 32 bits
    raw = _raw_mode(image)
    if raw not in COLORS:
        raise ValueError(f"data.white knows 16-bit grey, RGB and RGBA, not {raw}: convert it to one of them")
    other = raw.replace("16B", "16?").replace("16L", "16B").replace("16?", "16L")
    # in the other byte order Pillow reads the lower byte
    with open_regular(image.filename) as file, Image.open(file, formats=[image.format]) as again:
        again.tile = [tile._replace(args=_with_raw_mode(tile.args, other)) for tile in again.tile]
        lower = np.asarray(again)[..., :3]
    return np.asarray(image)[..., :3].astype(np.uint16) << 8 | lower


def _scaled(image: Image.Image, white: float, black: float) -> np.ndarray:
    """The deep values as uint8, where `black` is 0 and `white` 255."""
    if not is_deep(image):
        black, white = 0, WHITE
    values = deep_values(image)
    values = _not_negative(values) if black == 0 and values.dtype.kind == "i" else values
    most = values.max() if white != WHITE or values.itemsize > 2 else WHITE
    if most > white == WHITE and black == 0:
        raise ValueError(f"grey values up to {most} do not fit 16 bit: set data.white to that of full white, or auto")
    if most > white and black == 0 and is_main() and not _SAID[0]:
        _SAID[0] = 1
        share = f"{np.count_nonzero(values > white):,} of {values.size:,} values"
        name = printable(getattr(image, "filename", "an image"))
        print(f"warning: {name}: {share} lie above data.white={white:.10g} (up to {most}) and are clipped to it; "
              "further images are not named", file=sys.stderr)  # fmt: skip
    return _table(white, black)[values] if values.dtype == np.uint16 else _to_nearest(values, white, black)


def _to_nearest(values: np.ndarray, white: float, black: float) -> np.ndarray:
    """Halves go up; float64 is exact enough for 32 bits."""
    values = values.astype(np.float64).clip(black, white) - black
    return np.floor(values * 255 / (white - black) + 0.5).astype(np.uint8)


@lru_cache
def _table(white: float, black: float) -> np.ndarray:
    return _to_nearest(np.arange(WHITE + 1), white, black)


def _not_negative(values: np.ndarray) -> np.ndarray:
    if values.min() < 0:
        raise ValueError(f"values down to {values.min()} are below black: set data.black")
    return values


def _raw_mode(image: Image.Image) -> str:
    """How the file's bytes are laid out, in Pillow's words: `RGB;16B` for big-endian 16-bit colors; "" of no file."""
    tiles = getattr(image, "tile", [])
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _with_raw_mode(args: str | tuple, raw: str) -> str | tuple:
    return raw if isinstance(args, str) else (raw, *args[1:])
