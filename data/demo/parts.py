"""The eight ScavPort-like classes of the demo set: two-stroke ship engine parts, drawn on a `Canvas`."""

from itertools import pairwise

import numpy as np

from data.demo.canvas import Canvas, box, disc, smoothstep, stripes
from data.demo.metal import backdrop, bolt, finish, metal, turned


def liner(canvas: Canvas, rng: np.random.Generator, shape: np.random.Generator | None = None) -> None:
    """Cylinder liner: hollow running surface, cross-hatched honing, zigzag oil grooves with their quill holes.

    `shape` draws the dimensions: fresh ones of the same seed draw the same engine's liner in every image.
    """
    shape = shape or rng
    canvas.color[:], canvas.gloss[:] = metal(shape), shape.uniform(0.2, 0.7)
    canvas.height += shape.uniform(0.1, 0.35) * canvas.x**2
    angle, depth = shape.uniform(0.35, 0.75), shape.uniform(0.08, 0.3)
    marks = canvas.lines(rng, np.pi / 2 - angle, 34) + canvas.lines(rng, np.pi / 2 + angle, 34)
    marks = depth * marks + shape.uniform(0.03, 0.2) * canvas.lines(rng, rng.normal(0, 0.03), 25)
    canvas.color *= np.exp(marks)
    canvas.gloss *= np.exp(0.7 * marks)
    pitch, swing, width = shape.uniform(0.5, 1.1), shape.uniform(0.08, 0.24), shape.uniform(0.02, 0.045)
    gap, first = shape.uniform(0.45, 0.85), shape.uniform(-0.4, 0.4)
    phase = shape.uniform(0, 1)
    for row in range(int(shape.integers(1, 4))):
        y = first + gap * (row - 1)
        wave = np.abs((canvas.x / pitch + phase) % 1 - 0.5) * 2  # 0 at the valleys, 1 at the tips
        away = np.abs(canvas.y - y - swing * (2 * wave - 1)) / np.hypot(1, 4 * swing / pitch) - width
        canvas.paint(canvas.carve(away, 0.05, 0.04), shade=0.4)
        for tip in range(-3, 4):
            at = (tip + 0.5 - phase) * pitch
            place = canvas.window(at, y - swing, 0.15)
            hole = disc(place.x - at, place.y - y + swing, 1.5 * width)
            place.paint(place.carve(hole, 0.08, 0.03), 0.05, shade=0.12)
    if shape.random() < 0.35:  # the edge left by the top ring: coke above, worn metal below
        edge = canvas.y - shape.uniform(-1.1, -0.6)
        canvas.height += 0.05 * smoothstep(-edge / 0.06 + 0.5)
        canvas.paint(canvas.cover(edge), metal(shape, 0.05, 0.2), 0.1)


def crown(canvas: Canvas, rng: np.random.Generator) -> None:
    """Piston crown seen from above: dished disc with burnt fields under the sprays, lifting holes, a rim, the liner."""
    backdrop(canvas, rng)
    squash, size = rng.uniform(0.5, 1.0), rng.uniform(0.85, 1.25)
    x, y = canvas.x, canvas.y / squash
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    skirt = disc(x, (canvas.y - rng.uniform(0.1, 0.5) * (1.05 - squash)) / squash, size)
    canvas.paint(canvas.cover(disc(x, y, size + 0.12) * squash), shade=0.25)  # the gap to the liner
    canvas.paint(canvas.cover(skirt * squash), metal(rng, 0.1, 0.4), 0.3, height=-0.2, shade=0.5)
    top = canvas.carve((radius - size) * squash, 0.0, 0.05)
    bowl = rng.uniform(-0.25, 0.3) * np.clip(radius / size, 0, 1) ** 2
    canvas.paint(top, metal(rng), rng.uniform(0.1, 0.5), height=bowl, shade=1.0)
    canvas.carve((radius - size + 0.05) * squash, -0.05, 0.08)
    finish(canvas, rng, top)
    canvas.color *= np.exp(top * rng.uniform(0, 0.15) * stripes(rng, radius * 30))  # turning marks
    sprays, turn = rng.choice([2, 3, 3, 4]), rng.uniform(0, 2 * np.pi)
    fans = np.cos(sprays * (angle - turn) + rng.uniform(-1, 1) * radius) + 0.5 * canvas.grain(rng, 3, 3)
    burnt = top * smoothstep(fans - 0.1) * smoothstep((radius / size - 0.2) * 3) * smoothstep((1 - radius / size) * 5)
    canvas.paint(rng.uniform(0.3, 0.9) * burnt, metal(rng, 0.03, 0.5), 0.05)
    holes, at = int(rng.choice([2, 4])), rng.uniform(0.35, 0.65) * size
    for k in range(holes):
        where = turn + 0.5 + 2 * np.pi * k / holes
        hole = disc(x - at * np.cos(where), y - at * np.sin(where), rng.uniform(0.05, 0.08)) * squash
        canvas.paint(canvas.carve(hole, 0.08, 0.03), shade=0.15)


def ring_sizes(shape: np.random.Generator) -> tuple[int, float, float, float]:
    """Number of rings, distance between them, half their height, and how far they bow over the image."""
    pitch = shape.uniform(0.36, 0.52)
    return int(shape.integers(3, 6)), pitch, pitch * shape.uniform(0.2, 0.3), shape.uniform(-0.12, 0.12)


def rings(canvas: Canvas, rng: np.random.Generator, shape: np.random.Generator | None = None) -> None:
    """Piston ring pack from the side: lands and bright rings in their grooves, ring gaps. `shape`: as in `liner`."""
    shape = shape or rng
    count, pitch, half, bow = ring_sizes(shape)
    canvas.color[:], canvas.gloss[:] = metal(shape, 0.1, 0.4), shape.uniform(0.1, 0.5)
    canvas.height -= shape.uniform(0.1, 0.4) * canvas.x**2
    finish(canvas, rng, shape=shape)
    color, gloss = metal(shape, 0.25, 0.55), shape.uniform(0.3, 0.9)
    y = canvas.y + bow * canvas.x**2
    for k in range(count):
        at = (k - (count - 1) / 2) * pitch
        groove = np.abs(y - at) - half - 0.03
        canvas.paint(canvas.carve(groove, 0.05, 0.03), 0.06, 0.05, shade=0.25)
        ring = np.abs(y - at) - half
        ring_mask = canvas.cover(ring)
        marks = 1 + 0.12 * stripes(rng, y * 40) + 0.1 * canvas.grain(rng, 3, 14)
        canvas.paint(ring_mask, color * np.clip(marks, 0.3, 2), gloss, shade=1.0)
        canvas.height += ring_mask * 0.07 * np.sqrt(np.clip(1 - ((y - at) / half) ** 2, 0, 1))
        slant, width = shape.choice([0.0, 0.8, -0.8]), shape.uniform(0.015, 0.05)
        if rng.random() < 0.55:  # the lock: a straight or slanted cut
            gap = np.abs(canvas.x - rng.uniform(-0.9, 0.9) - slant * (y - at)) - width
            canvas.paint(ring_mask * canvas.carve(np.maximum(gap, ring), 0.05, 0.03), 0.04, 0.05, shade=0.2)


def port(canvas: Canvas, rng: np.random.Generator) -> None:
    """Scavenge ports: slanted rounded slots in the liner wall, lit from behind, dark, or with the piston in them."""
    canvas.color[:], canvas.gloss[:] = metal(rng), rng.uniform(0.1, 0.6)
    canvas.height += rng.uniform(-0.1, 0.3) * canvas.x**2
    finish(canvas, rng)
    pitch, lean = rng.uniform(0.6, 1.1), rng.uniform(-0.35, 0.35)
    half_x, half_y = pitch * rng.uniform(0.24, 0.36), rng.uniform(0.45, 0.85)
    x = canvas.x + lean * canvas.y
    x = (x + rng.uniform(0, pitch)) % pitch - pitch / 2
    slot = box(x, canvas.y - rng.normal(0, 0.1), half_x, half_y, half_x * rng.uniform(0.5, 1.0))
    canvas.carve(slot - 0.04, 0.05, 0.08)
    deep = canvas.cover(slot)
    canvas.paint(deep, metal(rng, 0.05, 0.25), 0.2, height=-0.5, shade=rng.uniform(0.05, 0.5))
    wall = box(x - rng.uniform(-0.35, 0.35) * half_x, canvas.y, half_x, half_y, half_x * 0.5)  # the slot's thickness
    canvas.paint(deep * canvas.cover(-wall), metal(rng, 0.2, 0.45), 0.3, shade=0.7)
    through = deep * canvas.cover(wall)
    kind = rng.integers(3)
    if kind == 0:
        canvas.paint(through, glow=rng.uniform(0.1, 0.7) * smoothstep(0.5 + 0.5 * canvas.y * rng.choice([-1, 1])))
    elif kind == 1:  # the ring pack stands behind the ports
        bands = stripes(rng, canvas.y * 6)
        canvas.paint(through, metal(rng) * np.exp(0.6 * bands), 0.4, shade=rng.uniform(0.3, 0.9))
    if rng.random() < 0.3:
        canvas.paint(through * canvas.cover(canvas.y - rng.uniform(-0.5, 0.5)), metal(rng), 0.3, shade=0.7)


def valve(canvas: Canvas, rng: np.random.Generator) -> None:
    """Exhaust valve from the side: stem, flare, disc with a bright conical seat, hanging in its gas passage."""
    backdrop(canvas, rng)
    stem, wide = rng.uniform(0.11, 0.2), rng.uniform(0.75, 1.05)
    bow, neck = rng.uniform(0.05, 0.3), rng.uniform(0.45, 0.85)
    low = rng.uniform(0.25, 0.5)
    y = canvas.y - low - bow * (np.sqrt(np.maximum(1 - (canvas.x / wide) ** 2, 0)) - 0.5)  # 0 where the seat starts
    flare = stem + (wide - stem) * np.clip(1 + y / neck, 0, 1) ** rng.uniform(2, 3.5)
    seat_end, rim = rng.uniform(0.1, 0.16), rng.uniform(0.05, 0.12)
    width = np.where(y < seat_end + rim, flare, 0.0).astype(np.float32)
    mask = turned(canvas, rng, width, metal(rng), rng.uniform(0.2, 0.7))
    seat = mask * canvas.cover(-y) * canvas.cover(y - seat_end)
    canvas.paint(seat, metal(rng, 0.35, 0.6), 0.7)
    canvas.height -= mask * np.maximum(y, 0) * 0.6
    for place in (0.0, seat_end):
        canvas.paint(mask * canvas.cover(np.abs(y - place) - 0.012), shade=0.5)
    pits = smoothstep(canvas.grain(rng, 9, 9) - 1.2)
    canvas.paint(seat * pits * rng.uniform(0, 1), 0.05, 0.05)
    if rng.random() < 0.5:  # the guide around the stem
        guide = box(canvas.x, canvas.y + 1.1, stem * rng.uniform(1.8, 3.0), rng.uniform(0.2, 0.5), 0.05)
        canvas.paint(canvas.carve(guide, -0.3, 0.2), metal(rng), 0.3, shade=0.9)


def piston_rod(canvas: Canvas, rng: np.random.Generator) -> None:
    """Piston rod: a long polished cylinder, often with its bolted flange at one end."""
    backdrop(canvas, rng)
    half = rng.uniform(0.3, 0.55)
    mask = turned(canvas, rng, np.full(canvas.size, half, np.float32), metal(rng), rng.uniform(0.5, 1.0))
    canvas.color *= np.exp(mask * rng.uniform(0.0, 0.25) * stripes(rng, canvas.x * 26))
    if rng.random() < 0.65:
        side = rng.choice([-1, 1])
        start = rng.uniform(0.35, 0.8)
        y = side * canvas.y - start - 0.12 * np.sqrt(np.maximum(1 - canvas.x**2, 0))
        flange = np.where(y > 0, rng.uniform(1.3, 1.9) * half, 0.0).astype(np.float32)
        turned(canvas, rng, flange, metal(rng), rng.uniform(0.2, 0.6))
        canvas.paint(canvas.cover(np.abs(y) - 0.02) * (np.abs(canvas.x) < half * 1.9), shade=0.4)
        for place in (-0.95, -0.35, 0.35, 0.95):
            bolt(canvas, rng, place * half * 1.2, side * (start + 0.3), 0.1)


def stuffing_box(canvas: Canvas, rng: np.random.Generator) -> None:
    """Stuffing box along the rod: bolted flange, concentric rings cut into segments, the rod or a hole."""
    backdrop(canvas, rng)
    squash, size = rng.uniform(0.55, 1.0), rng.uniform(0.85, 1.2)
    x, y = canvas.x, canvas.y / squash
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    canvas.paint(canvas.cover((radius - size - 0.08) * squash), shade=0.4)
    flange = canvas.carve((radius - size) * squash, -0.15, 0.1)
    canvas.paint(flange, metal(rng), rng.uniform(0.2, 0.6), shade=1.0)
    finish(canvas, rng, flange)
    inner = size * rng.uniform(0.6, 0.72)
    bolts, turn = int(rng.choice([6, 8, 10])), rng.uniform(0, 2 * np.pi)
    at = (inner + size) / 2
    for k in range(bolts):
        where = turn + 2 * np.pi * k / bolts
        bolt(canvas, rng, at * np.cos(where), at * np.sin(where) * squash, 0.3 * (size - inner))
    edges = np.linspace(inner, inner * rng.uniform(0.35, 0.5), int(rng.integers(3, 5)))
    for outer, inside in pairwise(edges):
        ring = canvas.carve((radius - outer) * squash, 0.06, 0.04)
        canvas.paint(ring, metal(rng, 0.2, 0.55), rng.uniform(0.3, 0.8), shade=0.9)
        cuts, start = int(rng.choice([3, 4, 6])), rng.uniform(0, 2 * np.pi)
        near = np.abs((cuts * (angle - start) / (2 * np.pi)) % 1 - 0.5) * 2 * np.pi / cuts * radius
        canvas.paint(ring * canvas.cover(near - 0.015) * (radius > inside), 0.03, 0.05, shade=0.3)
        canvas.paint(canvas.cover((np.abs(radius - outer) - 0.018) * squash), 0.03, shade=0.25)
    middle = canvas.cover((radius - edges[-1]) * squash)
    canvas.paint(middle, metal(rng), 0.6, height=0.1, shade=rng.choice([0.1, 0.9]))
    canvas.paint(canvas.cover((np.abs(radius - edges[-1]) - 0.025) * squash), 0.03, shade=0.2)


def nozzle(canvas: Canvas, rng: np.random.Generator) -> None:
    """Fuel injector nozzle: a stepped tip sticking out of the cylinder cover, with spray holes and their soot fans."""
    backdrop(canvas, rng)
    collar, tip = rng.uniform(0.45, 0.65), rng.uniform(0.2, 0.32)
    shoulder, end = rng.uniform(-0.5, -0.15), rng.uniform(0.4, 0.75)
    y = canvas.y - 0.15 * np.sqrt(np.maximum(1 - (canvas.x / collar) ** 2, 0))
    recess = disc(canvas.x, canvas.y - shoulder + 0.4, collar * rng.uniform(1.5, 1.9))
    canvas.paint(canvas.carve(recess, 0.15, 0.12), metal(rng, 0.05, 0.3), shade=0.5)
    turned(canvas, rng, np.where(y < shoulder, collar, 0).astype(np.float32), metal(rng), rng.uniform(0.2, 0.6))
    cone = collar * 0.85 + (tip - collar * 0.85) * smoothstep((y - shoulder) / rng.uniform(0.25, 0.6))
    dome = tip * np.sqrt(np.clip(1 - ((canvas.y - end + tip) / tip) ** 2, 0, 1))
    width = np.where(canvas.y > end - tip, np.minimum(dome, cone), np.where(y < shoulder, 0, cone)).astype(np.float32)
    mask = turned(canvas, rng, width, metal(rng, 0.2, 0.55), rng.uniform(0.3, 0.8))
    canvas.paint(canvas.cover(np.abs(y - shoulder) - 0.02) * (np.abs(canvas.x) < collar), shade=0.4)
    holes, level = int(rng.integers(3, 6)), end - tip * rng.uniform(0.7, 1.3)
    for k in range(holes):
        where = (k - (holes - 1) / 2) * 2 * tip / (holes + 0.5)
        drop = canvas.y - level - 0.1 * tip * np.cos(2 * where / tip)
        hole = disc(canvas.x - where, drop, rng.uniform(0.022, 0.035))
        fan = smoothstep(1 - np.hypot(canvas.x - where, (drop - 0.06) * 0.7) / rng.uniform(0.1, 0.2))
        canvas.paint(mask * fan * rng.uniform(0.2, 0.9), 0.04, 0.05)
        canvas.paint(mask * canvas.carve(hole, 0.04, 0.02), 0.02, 0.05, shade=0.1)


PARTS = {"cylinder_liner": liner, "exhaust_valve": valve, "fuel_nozzle": nozzle, "piston_crown": crown,
         "piston_rod": piston_rod, "ring_pack": rings, "scavenge_port": port, "stuffing_box": stuffing_box}  # fmt: skip
SEEN_PARTS = ("cylinder_liner", "piston_crown", "ring_pack", "scavenge_port")  # what an inspection through ports shows
