"""What all drawings share: the meaning of each color, and text in any script.

One color means one thing, told apart by people with any kind of color vision (tests/plots/test_colors.py), on the heat
map and on grey too: blue lies on neither, white and green have a black rim. Pillow's own font has ASCII letters only;
for other characters a font of this machine is taken.

A text is drawn with the first font that has all of its characters. A character that no font has becomes its plain form
(an umlaut without dots) or is spelled out (`\\u4e2d`), never an empty box; line breaks and bytes that are no UTF-8 are
spelled out, too.
"""

import functools
import unicodedata

from PIL import ImageDraw, ImageFont

from runtime.text import printable

TRUE_DEFECT = (0, 160, 255)  # outline: the ground truth
ABOVE = (255, 255, 255)  # outline with a black rim: pixels above the pixel threshold
PEAK = (0, 255, 0)  # cross or square with a black rim: the most anomalous position
ALARM = (230, 159, 0)  # image scores above the threshold: called anomalous
USUAL = (95, 105, 115)  # image scores that are not, and curves
RIGHT, WRONG = (8, 81, 156), (190, 30, 30)  # a verdict or prediction that the ground truth confirms, or does not
PAPER, INK, SOFT, GRID = (255, 255, 255), (25, 25, 25), (110, 110, 110), (226, 226, 226)
RIM = (0, 0, 0)
# Of classes and clusters, none better than another: Okabe & Ito 2008, without yellow, which paper hides
CATEGORIES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (40, 40, 40))

# Usual on Linux, macOS and Windows; Pillow looks for them by name in the system's folders.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc"),
    *("DroidSansFallbackFull.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc", "msyh.ttc", "malgun.ttf", "YuGothR.ttc"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
    *("NotoSansThai-Regular.ttf", "Nirmala.ttf", "leelawui.ttf"),
)
NO_CHARACTER = "\U0010ffff"  # no font has it, so this is how a font draws what it lacks


def category(number: int) -> tuple[int, int, int]:
    """The color of a class or cluster; after seven they come again lighter, then darker, then from the beginning."""
    turn, place = divmod(number, len(CATEGORIES))
    toward, share = ((0, 0.0), (255, 0.5), (0, 0.45))[turn % 3]
    red, green, blue = (round(channel + share * (toward - channel)) for channel in CATEGORIES[place])
    return red, green, blue


def write(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    ink: str | tuple[int, int, int],
    size: int,
    *,
    anchor: str | None = None,
    width: float | None = None,
) -> None:
    """Draw a line of any `text` at `position` (x, y), `size` pixels high; longer than `width`, without its middle."""
    shown, face = lettered(text, size, width)
    draw.text(position, shown, ink, face, anchor)


def lettered(text: str, size: int, width: float | None = None) -> tuple[str, ImageFont.FreeTypeFont]:
    """`text` as it can be drawn in one line, at most `width` pixels long, and the font for it."""
    text = "".join(map(_without_controls, unicodedata.normalize("NFC", printable(text))))
    lacking = {name: {char for char in text if not _has(name, char)} for name in _fonts()}
    name = min(lacking, key=lambda font: len(lacking[font]))  # the first of equals
    text = shown = "".join(_replaced(name, char) if char in lacking[name] else char for char in text)
    face = _load(name, size)
    for kept in range(len(text) - 1, 1, -1):
        if width is None or face.getlength(shown) <= width:
            break
        shown = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
    return shown, face


def font(size: int) -> ImageFont.FreeTypeFont:
    """For words of our own, which are ASCII."""
    return _load("", size)


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Names of the fonts that are there; "" is Pillow's own, and the first."""
    found = [""]
    for name in FONTS:
        try:
            _load(name, 12)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


@functools.cache
def _load(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@functools.cache
def _has(name: str, char: str) -> bool:
    """Whether the font draws `char` in another way than a character that it lacks."""
    if char == " ":
        return True
    own, lacking = (_load(name, 24).getmask(text) for text in (char, NO_CHARACTER))
    return (own.size, bytes(own)) != (lacking.size, bytes(lacking))


def _without_controls(char: str) -> str:
    """Line breaks and other characters that move the pen are spelled out."""
    return _escaped(char) if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char


def _replaced(name: str, char: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
    return plain if plain and all(_has(name, c) for c in plain) else _escaped(char)


def _escaped(char: str) -> str:
    """As in Python, but `\\u00df` and not `\\xdf`, which stands for a byte here."""
    code = ord(char)
    return char.encode("unicode_escape").decode() if code < 0x80 or code > 0xFFFF else f"\\u{code:04x}"
