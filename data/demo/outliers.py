"""Images that do not belong into a scavenge port inspection: the outliers of the demo's ScavPortAnom.

They get the same view, dirt, lamp and camera as the parts, and mostly the same colors.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, map_coordinates

from data.demo.canvas import Canvas, box, disc, rod, smoothstep, stripes
from data.demo.light import soil
from data.demo.metal import backdrop, bolt, finish, metal
from data.demo.parts import PARTS, SEEN_PARTS

CLOTH = [[0.42, 0.33, 0.12], [0.13, 0.18, 0.30], [0.34, 0.30, 0.26], [0.45, 0.30, 0.22], [0.10, 0.10, 0.10]]
CLOTH = np.float32(CLOTH)[:, :, None, None]  # (5, 3, 1, 1)
PAINT = [[0.22, 0.30, 0.27], [0.40, 0.40, 0.36], [0.15, 0.20, 0.28], [0.36, 0.30, 0.18], [0.30, 0.13, 0.10]]
PAINT = np.float32(PAINT)[:, :, None, None]  # (5, 3, 1, 1)
SKY, SEA = np.float32([[[0.30, 0.34, 0.38]]]).T, np.float32([[[0.07, 0.11, 0.14]]]).T  # (3, 1, 1)


def outlier(canvas: Canvas, rng: np.random.Generator, which: int) -> None:
    """Draw one of the kinds below in turn, dirt included: things get dirty, a spoilt view lies over the dirty part."""
    kind = (*THINGS, *VEILS)[which % (len(THINGS) + len(VEILS))]
    if kind in VEILS:
        any_part(canvas, rng)
        soil(canvas, rng)
    kind(canvas, rng)
    if kind in THINGS:
        soil(canvas, rng)


def any_part(canvas: Canvas, rng: np.random.Generator) -> None:
    """The part in front of which something is wrong."""
    PARTS[str(rng.choice(SEEN_PARTS))](canvas, rng)


def glove(canvas: Canvas, rng: np.random.Generator) -> None:
    """A gloved hand in front of a part."""
    any_part(canvas, rng)
    color = rng.choice(CLOTH) * np.float32(rng.uniform(0.7, 1.2))
    lean, size = rng.uniform(-0.5, 0.5), rng.uniform(0.8, 1.2)
    x, y = canvas.x / size - rng.uniform(-0.3, 0.3), canvas.y / size - rng.uniform(0.1, 0.5)
    x, y = np.cos(lean) * x + np.sin(lean) * y, np.cos(lean) * y - np.sin(lean) * x
    parts = [box(x, y - 0.25, 0.33, 0.32, 0.2), box(x, y - 1.0, 0.27, 0.7, 0.1)]
    for k, length in enumerate(rng.uniform(0.35, 0.65, 4) * [0.85, 1.0, 1.05, 0.9]):
        root, spread = -0.25 + 0.165 * k, (k - 1.5) * rng.uniform(0.05, 0.16)
        parts.append(rod(x, y, (root, 0.05), (root + spread, 0.0 - length), 0.085))
    side = rng.choice([-1, 1])
    parts.append(rod(side * x, y, (0.28, 0.35), (0.62, rng.uniform(-0.1, 0.1)), 0.09))
    near = np.minimum.reduce(parts) * size
    canvas.paint(canvas.cover(near - 0.06), shade=0.35)
    ribs = 0.12 * canvas.grain(rng, 40, 40) + 0.12 * canvas.grain(rng, 5, 5)
    round_off = 0.25 * np.sqrt(np.clip(-near / 0.12, 0, 1))
    for finger in parts:  # creases between the fingers
        round_off = round_off - 0.06 * np.exp(-((finger / 0.03) ** 2))
    canvas.paint(canvas.cover(near), color * np.exp(ribs), 0.08, height=0.25 + round_off, shade=1.0)


def spanner(canvas: Canvas, rng: np.random.Generator) -> None:
    """An open-ended spanner or a screwdriver lying before a part."""
    any_part(canvas, rng)
    angle = rng.uniform(0, np.pi)
    x = np.cos(angle) * canvas.x + np.sin(angle) * canvas.y - rng.uniform(-0.3, 0.3)
    y = np.cos(angle) * canvas.y - np.sin(angle) * canvas.x - rng.uniform(-0.3, 0.3)
    handle = rng.uniform(0.09, 0.14)
    if rng.random() < 0.7:
        jaw, head = rng.uniform(0.14, 0.2), rng.uniform(0.3, 0.4)
        open_end = np.maximum(disc(x + 0.75, y, head), -box(x + 1.0, y - 0.05, 0.38, jaw, 0.02))
        ring_end = np.maximum(disc(x - 0.85, y, head * 0.85), -disc(x - 0.85, y, head * 0.5))
        near = np.minimum.reduce([np.maximum(box(x, y, 0.75, handle, 0.05), -box(x, y, 0.4, handle * 0.5, 0.04)),
                                  open_end, ring_end])  # fmt: skip
        color, gloss = metal(rng, 0.3, 0.6), 0.8
    else:
        near = np.minimum(box(x - 0.8, y, 0.55, 1.8 * handle, 0.1), box(x + 0.4, y, 0.8, 0.6 * handle, 0.02))
        color, gloss = np.where(x > 0.25, rng.choice(PAINT), metal(rng, 0.3, 0.6)), 0.6
    canvas.paint(canvas.cover(near - 0.07), shade=0.35)
    canvas.paint(canvas.cover(near), color, gloss, height=0.2 + 0.1 * smoothstep(-near / 0.08), shade=1.0)


def nameplate(canvas: Canvas, rng: np.random.Generator) -> None:
    """A maker's plate or a label with lines of text."""
    backdrop(canvas, rng)
    wide, high = rng.uniform(0.7, 1.1), rng.uniform(0.45, 0.75)
    plate = box(canvas.x, canvas.y, wide, high, 0.06)
    canvas.paint(canvas.cover(plate - 0.05), shade=0.5)
    color = metal(rng, 0.3, 0.6)
    canvas.paint(canvas.carve(plate, -0.05, 0.04), color, rng.uniform(0.1, 0.6), height=0.0, shade=1.0)
    lines = [str(rng.choice(["MAIN ENGINE", "CYL No", "TYPE RT", "BOILER", "DANGER", "STBY PUMP", "HFO PURIFIER"]))]
    for _ in range(int(rng.integers(2, 5))):
        word = str(rng.choice(["kW", "rpm", "No", "MCR", "bar", "YEAR", "kg", "P/N"]))
        lines.append(f"{word} {rng.integers(10, 99999)}")
    text = Image.new("L", (200, 120), 0)
    pen = ImageDraw.Draw(text)
    for k, line in enumerate(lines):
        pen.text(
            (12, 8 + k * 108 // len(lines)), line, fill=255, font=ImageFont.load_default(int(rng.integers(20, 27)))
        )
    places = np.stack([(canvas.y / high + 1) * 60, (canvas.x / wide + 1) * 100])
    ink = map_coordinates(gaussian_filter(np.float32(text) / 255, 0.5), places, order=1) * canvas.cover(plate)
    canvas.paint(np.clip(1.5 * ink, 0, 1), 0.02, 0.05, shade=0.7)
    for corner in (-1, 1):
        bolt(canvas, rng, corner * (wide - 0.08), -high + 0.08, 0.035)
        bolt(canvas, rng, corner * (wide - 0.08), high - 0.08, 0.035)


def cabinet(canvas: Canvas, rng: np.random.Generator) -> None:
    """An electrical cabinet: rows of breakers on rails, cable ducts, wires."""
    canvas.color[:], canvas.gloss[:] = PAINT[1] * np.float32(rng.uniform(0.4, 1.0)), 0.1
    pitch, rail = rng.uniform(0.16, 0.26), rng.uniform(0.6, 0.8)
    for row in (-1, 0, 1):
        y = canvas.y - row * rail
        body = box((canvas.x + 20 * pitch) % pitch - pitch / 2, y, 0.44 * pitch, 0.19, 0.01)
        column = np.floor(canvas.x / pitch)
        tone = np.exp(0.35 * stripes(rng, column))
        canvas.paint(canvas.carve(body, -0.1, 0.02), metal(rng, 0.25, 0.5) * tone, 0.3, shade=1.0)
        lever = box((canvas.x + 20 * pitch) % pitch - pitch / 2, y - 0.03 * stripes(rng, column), 0.2 * pitch, 0.06)
        canvas.paint(canvas.cover(lever), rng.choice(PAINT) * 0.6, 0.3)
        duct = canvas.cover(np.abs(y - rail / 2) - 0.09)
        canvas.paint(duct * (stripes(rng, canvas.x * 20) > 0), 0.05, shade=0.5)
        for _ in range(int(rng.integers(3, 9))):
            start = rng.uniform(-1.4, 1.4)
            wire = rod(
                canvas.x + 0.04 * np.sin(9 * y), y, (start, 0.15), (start + rng.normal(0, 0.2), rail - 0.15), 0.016
            )
            color = rng.choice([PAINT[2], PAINT[4], CLOTH[0], CLOTH[4]])
            canvas.paint(canvas.cover(wire), color, 0.2, height=0.1)


def deck(canvas: Canvas, rng: np.random.Generator) -> None:
    """Out on deck: sky, sea, a railing or a crane's outline."""
    horizon = canvas.y + rng.uniform(-0.3, 0.3)
    canvas.color[:] = SKY * (1 + 0.3 * canvas.noise(rng, 2, 4))
    canvas.glow[:] = rng.uniform(0.05, 0.4) * smoothstep(-horizon + 0.7)
    waves = canvas.grain(rng, 5, 22) + 0.6 * canvas.grain(rng, 12, 40)
    canvas.paint(canvas.cover(-horizon), SEA * np.exp(0.4 * waves), 0.5, glow=0.0)
    canvas.height += canvas.cover(-horizon) * 0.02 * waves
    color = rng.choice(PAINT)
    canvas.paint(canvas.cover(rng.uniform(0.4, 0.8) - canvas.y), color * 0.8, 0.2, glow=0.0)
    if rng.random() < 0.7:
        for level in (-0.45, 0.0, 0.45):
            canvas.paint(canvas.cover(np.abs(canvas.y - level) - 0.03), metal(rng, 0.3, 0.6), 0.4, glow=0.0)
        posts = (canvas.x + rng.uniform(0, 1)) % rng.uniform(0.6, 0.9) - 0.3
        canvas.paint(canvas.cover(np.abs(posts) - 0.04) * (canvas.y > -0.48), metal(rng, 0.3, 0.6), 0.4, glow=0.0)
    else:
        foot, top = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8)
        crane = np.minimum(rod(canvas.x, canvas.y, (foot, 0.6), (foot, -0.4), 0.09),
                           rod(canvas.x, canvas.y, (foot, -0.4), (top, -1.1), 0.05))  # fmt: skip
        canvas.paint(canvas.cover(crane), color, 0.2, glow=0.0)


def gauge(canvas: Canvas, rng: np.random.Generator) -> None:
    """A pressure gauge on a pipe or panel."""
    backdrop(canvas, rng)
    radius, angle = np.hypot(canvas.x, canvas.y), np.arctan2(canvas.y, canvas.x)
    size = rng.uniform(0.6, 0.95)
    canvas.paint(canvas.cover(rod(canvas.x, canvas.y, (0, 0), (0, 2), 0.12)), metal(rng), 0.5)
    canvas.paint(canvas.carve(radius - size, -0.15, 0.08), metal(rng, 0.2, 0.5), 0.7, height=0.1, shade=1.0)
    face = canvas.carve(radius - 0.88 * size, 0.08, 0.03)
    canvas.paint(face, metal(rng, 0.4, 0.65), 0.15, height=0.0)
    sweep = (angle - np.pi / 2) % (2 * np.pi)
    on_scale = (sweep > 0.7) & (sweep < 5.6) & (radius < 0.82 * size)
    for count, inner in ((8, 0.62), (40, 0.74)):
        away = np.abs((sweep * count / (2 * np.pi)) % 1 - 0.5) * 2 * np.pi / count * radius
        canvas.paint(canvas.cover(away - 0.012) * on_scale * (radius > inner * size), 0.04)
    aim = rng.uniform(0, 2 * np.pi)
    tip = (0.7 * size * np.cos(aim), 0.7 * size * np.sin(aim))
    canvas.paint(canvas.cover(rod(canvas.x, canvas.y, (-0.2 * tip[0], -0.2 * tip[1]), tip, 0.025)),
                 rng.choice([CLOTH[4], PAINT[4]]))  # fmt: skip
    canvas.paint(canvas.cover(radius - 0.07), 0.04, 0.3)


def fogged(canvas: Canvas, rng: np.random.Generator) -> None:
    """A part behind a fogged, wet or smeared lens."""
    blur = rng.uniform(4, 9)
    for name in ("color", "height", "shade", "gloss"):
        old = getattr(canvas, name)
        setattr(canvas, name, gaussian_filter(old, (0, blur, blur)[-old.ndim :], truncate=2.5))
    veil = rng.uniform(0.1, 0.6) * smoothstep(0.5 + 0.5 * canvas.noise(rng, 1.5, 2))
    canvas.paint(veil, 0.5, 0.0)
    for _ in range(int(rng.integers(0, 9))):  # drops
        x, y = rng.uniform(-1, 1, 2)
        canvas.carve(disc(canvas.across - x, canvas.down - y, rng.uniform(0.05, 0.18)), -0.1, 0.2)


def glare(canvas: Canvas, rng: np.random.Generator) -> None:
    """Nothing to see: the lamp shines straight back, with the lens's ghosts."""
    x, y = rng.uniform(-0.4, 0.4, 2)
    away = np.hypot(canvas.across - x, canvas.down - y)
    canvas.glow += rng.uniform(0.8, 2.0) * np.exp(-((away / rng.uniform(0.35, 0.8)) ** 2))
    canvas.glow += rng.uniform(0.02, 0.2)
    for k in range(int(rng.integers(1, 4))):
        ghost = disc(canvas.across + x * (0.6 + 0.7 * k), canvas.down + y * (0.6 + 0.7 * k), rng.uniform(0.08, 0.25))
        canvas.glow += 0.15 * np.clip(0.5 - ghost / (2 * canvas.step), 0, 1)


def grating(canvas: Canvas, rng: np.random.Generator) -> None:
    """The engine room's floor: a grating or chequer plate, perhaps with a rag or a hose on it."""
    canvas.color[:], canvas.gloss[:] = rng.choice(PAINT), 0.3
    pitch = rng.uniform(0.2, 0.34)
    cell_x, cell_y = np.floor(canvas.x / pitch), np.floor(canvas.y / pitch)
    x, y = canvas.x % pitch - pitch / 2, canvas.y % pitch - pitch / 2
    if rng.random() < 0.5:
        flip = np.where((cell_x + cell_y) % 2 > 0, 1, -1)
        ridge = rod(x, flip * y, (-0.3 * pitch, -0.3 * pitch), (0.3 * pitch, 0.3 * pitch), 0.1 * pitch)
        canvas.carve(ridge, -0.04, 0.04)
        finish(canvas, rng)
    else:
        canvas.paint(
            canvas.carve(box(x, y, 0.38 * pitch, 0.38 * pitch, 0.02), 0.1, 0.04), metal(rng, 0.02, 0.1), shade=0.3
        )
    if rng.random() < 0.6:  # a hose
        bend, radius = rng.uniform(0.2, 0.5), rng.uniform(0.08, 0.16)
        away = np.abs(canvas.y - bend * np.sin(rng.uniform(1.5, 3) * canvas.x + rng.uniform(0, 6))) * 0.8
        canvas.paint(canvas.cover(away - radius), rng.choice(CLOTH) * 0.6, 0.4, shade=1.0,
                     height=0.1 + np.sqrt(np.maximum(radius**2 - away**2, 0)))  # fmt: skip


THINGS = (cabinet, deck, gauge, glove, grating, nameplate, spanner)
VEILS = (fogged, glare)
