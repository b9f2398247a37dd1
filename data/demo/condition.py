"""The demo's Condition images: one liner and one ring pack in modest views, whole or with a defect and its mask.

A defective image and its mask are exact: the part is drawn, the defect is added to a copy, both are lit and seen
through the same lens, and the copy is used inside the mask only. Sensor noise and JPEG grain come last.
"""

import numpy as np
from scipy.ndimage import binary_dilation

from data.demo.canvas import Array, Canvas, disc, rod, smoothstep
from data.demo.light import RUST, SOOT, shine, soil, through_lens
from data.demo.metal import metal
from data.demo.parts import liner, ring_sizes, rings

VIEW = {"turn": 0.05, "zoom": (0.95, 1.05), "shift": 0.06, "tilt": 0.03}
VARY = 0.3  # of lamp and camera, see `shine`
DESIGN = {"liner": 11, "rings": 17}  # seeds of the dimensions: the same engine in every image


def scratch(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """One or two thin scores along the stroke, dark with a bright burr."""
    x, y = somewhere(canvas, rng)
    total = np.zeros(canvas.size, np.float32)
    for _ in range(int(rng.integers(1, 3))):
        length, lean = rng.uniform(0.25, 0.8), rng.normal(0, 0.2)
        place = canvas.x - x - rng.uniform(0, 0.08) * (canvas.y - y) ** 2
        width = 0.010 + 0.014 * clear
        line = rod(place, canvas.y, (-lean * length, y - length), (lean * length, y + length), width)
        line += 0.006 * canvas.grain(rng, 6, 6)
        canvas.paint(canvas.carve(line, 0.02 + 0.04 * clear, 0.03), 0.12, shade=1 - 0.5 * clear)
        burr = canvas.cover(np.abs(line - 0.012) - 0.008)
        canvas.paint(burr * clear * 0.7, 0.6, 0.8)
        total = np.maximum(total, canvas.cover(line - 0.02))
        x += rng.uniform(0.05, 0.2)
    return total


def scuffing(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """A field where the piston seized: honing wiped out, rough torn streaks along the stroke."""
    x, y = somewhere(canvas, rng)
    wide, high = rng.uniform(0.12, 0.3), rng.uniform(0.25, 0.6)
    away = np.hypot((canvas.x - x) / wide, (canvas.y - y) / high) - 1 + 0.25 * canvas.grain(rng, 4, 1.5)
    field = smoothstep(-away / 0.35)
    streaks = canvas.lines(rng, rng.normal(0, 0.03), 26) + 0.7 * canvas.grain(rng, 30, 4)
    smooth = canvas.color.mean((1, 2), keepdims=True) * np.float32(rng.choice([0.6, 1.35]))
    canvas.paint(field * (0.25 + 0.65 * clear), smooth * np.exp((0.15 + 0.25 * clear) * streaks))
    canvas.gloss *= 1 - 0.6 * field
    canvas.height += field * 0.012 * clear * streaks
    return field


def corrosion(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """Cold corrosion: a cluster of pits, dark in the middle, a little rust around."""
    x, y = somewhere(canvas, rng)
    total, ragged = np.zeros(canvas.size, np.float32), 0.012 * canvas.grain(rng, 9, 9)
    for _ in range(int(rng.integers(4, 16))):
        at_x, at_y = np.array([x, y]) + rng.normal(0, 0.16, 2)
        pit = disc(canvas.x - at_x, canvas.y - at_y, rng.uniform(0.015, 0.025 + 0.03 * clear)) + ragged
        canvas.paint(canvas.cover(pit - 0.025) * 0.6 * clear, RUST * np.float32(0.8), 0.05)
        canvas.paint(canvas.carve(pit, 0.02 + 0.04 * clear, 0.02), 0.05, 0.05, shade=1 - 0.7 * clear)
        total = np.maximum(total, canvas.cover(pit - 0.02))
    return total


def broken(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """A piece is missing from a ring: the bare groove between two ragged ends."""
    away, _ = one_ring(canvas, rng)
    x, _ = somewhere(canvas, rng)
    ragged = 0.04 * canvas.grain(rng, 8, 14)
    piece = np.maximum(away, np.abs(canvas.x - x + ragged) - (0.05 + 0.25 * clear * rng.uniform(0.5, 1)))
    mask = canvas.carve(piece, 0.06, 0.04)
    canvas.paint(mask, metal(rng, 0.04, 0.12), 0.15, shade=0.25 + 0.3 * (1 - clear))
    return mask


def missing(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """A whole ring is lost, or stuck so deep that the groove gapes all the way."""
    away, half = one_ring(canvas, rng)
    mask = canvas.cover(away)
    depth = 0.35 + 0.65 * clear
    canvas.height -= mask * 0.07 * depth * np.sqrt(np.clip(-away / half, 0, 1))
    stuck = metal(rng, 0.08, 0.35) * np.exp(0.25 * canvas.grain(rng, 6, 24))
    canvas.paint(mask * depth, stuck, 0.1, shade=0.55)
    return mask


def deposit(canvas: Canvas, rng: np.random.Generator, clear: float) -> Array:
    """A lump of coke on rings and lands."""
    x, y = somewhere(canvas, rng)
    size = rng.uniform(0.15, 0.3)
    away = np.hypot(canvas.x - x, 1.4 * (canvas.y - y)) - size + 0.3 * size * canvas.grain(rng, 6, 6)
    lump = smoothstep(-away / 0.08 + 0.5)
    rough = canvas.grain(rng, 22, 22) + canvas.grain(rng, 9, 9)
    color = np.float32(rng.choice([SOOT * 1.5, RUST * 0.4, SOOT * 4]))
    canvas.paint(lump * (0.45 + 0.5 * clear), color * np.exp(0.35 * rough), 0.1)
    canvas.height += lump * (0.05 + 0.015 * rough) * (0.4 + 0.6 * clear)
    return lump


CONDITIONS = {"liner": {"scratch": scratch, "scuffing": scuffing, "corrosion": corrosion},
              "rings": {"broken": broken, "missing": missing, "deposit": deposit}}  # fmt: skip


def somewhere(canvas: Canvas, rng: np.random.Generator) -> tuple[float, float]:
    """Part coordinates of a place well inside the image."""
    row, column = (rng.uniform(0.22, 0.78, 2) * canvas.size).astype(int)
    return float(canvas.x[row, column]), float(canvas.y[row, column])


def one_ring(canvas: Canvas, rng: np.random.Generator) -> tuple[Array, float]:
    """Signed distance to one of the rings, and half its height."""
    count, pitch, half, bow = ring_sizes(np.random.default_rng(DESIGN["rings"]))
    at = (int(rng.integers(count)) - (count - 1) / 2) * pitch
    return np.abs(canvas.y + bow * canvas.x**2 - at) - half, half


def draw(subset: str, defect: str | None, rng: np.random.Generator,
         size: tuple[int, int]) -> tuple[Array, Array, Array]:  # fmt: skip
    """One view of `subset`'s part without and with `defect`: display values (3, H, W) twice, and the mask bool (H, W).

    The two images are equal outside the mask; both come before sensor noise. Without a defect the mask is empty.
    """
    canvas = Canvas(rng, size, **VIEW)
    {"liner": liner, "rings": rings}[subset](canvas, rng, np.random.default_rng(DESIGN[subset]))
    soil(canvas, rng, 0.25)
    lamp, lens = rng.integers(2**62, size=2)
    light = shine(canvas, np.random.default_rng(lamp), vary=VARY)
    good = through_lens(light, canvas, np.random.default_rng(lens), metered=light, vary=VARY)
    if defect is None:
        return good, good, np.zeros(size, bool)
    mask = np.zeros(size, bool)
    while not 12 <= mask.sum() <= 0.5 * mask.size:  # out of the image: try elsewhere
        spoilt = canvas.copy()
        mask = CONDITIONS[subset][defect](spoilt, rng, rng.uniform(0.3, 1)) > 0.3
    mask = binary_dilation(mask)
    spoilt_light = shine(spoilt, np.random.default_rng(lamp), vary=VARY)
    seen = through_lens(spoilt_light, canvas, np.random.default_rng(lens), metered=light, vary=VARY)
    return good, np.where(mask, seen, good), mask
