"""What the demo set's parts are made of and stand before: metals, tool marks, turned bodies, bolts, backgrounds.

One set of distributions for all parts, so that color and fine texture say little about the class.
"""

import numpy as np

from data.demo.canvas import Array, Canvas, disc, hexagon, smoothstep


def metal(rng: np.random.Generator, low: float = 0.18, high: float = 0.5) -> Array:
    """A steel's color (3, 1, 1): grey between `low` and `high`, a little bluish, brownish or yellowish."""
    tint = np.array([1 + rng.normal(0.01, 0.05), 1.0, 1 - rng.normal(0.04, 0.09)], np.float32)
    return np.float32(rng.uniform(low, high)) * tint[:, None, None]


def finish(canvas: Canvas, rng: np.random.Generator, mask: Array | float = 1.0,
           shape: np.random.Generator | None = None) -> None:  # fmt: skip
    """Give the metal inside `mask` tool marks (cross-hatched, brushed or cast) and a little unevenness.

    `shape` draws their kind, `rng` (by default both) where they lie: see `demo_parts.liner`.
    """
    shape = shape or rng
    kind, depth = shape.integers(4), shape.uniform(0.05, 0.24)
    angle, spread = shape.uniform(0, np.pi), shape.uniform(0.6, 1.3)
    if kind == 0:
        marks = canvas.lines(rng, angle, 30) + canvas.lines(rng, angle + spread, 30)
    elif kind == 1:
        marks = 1.3 * canvas.lines(rng, angle, 34)
    else:
        marks = canvas.grain(rng, *shape.uniform(8, 30, 2))
    tone = np.exp(mask * (depth * marks + 0.15 * canvas.grain(rng, 2.5, 2.5))).astype(np.float32)
    canvas.color *= tone
    canvas.gloss *= np.clip(tone, 0.5, 1.5)


def backdrop(canvas: Canvas, rng: np.random.Generator) -> None:
    """What stands behind a part: a dark chamber, a machined wall or a plate, sometimes with bolts, edges and pipes."""
    dark = rng.random() < 0.5
    canvas.color[:] = metal(rng, 0.03, 0.12) if dark else metal(rng, 0.12, 0.42)
    canvas.gloss[:] = rng.uniform(0.05, 0.5)
    canvas.shade[:] = rng.uniform(0.35, 1.0)
    canvas.height += rng.uniform(-0.5, 0.5) * canvas.x * canvas.x - 0.6
    finish(canvas, rng)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-1.3, 1.3, 2)
        angle = rng.uniform(0, np.pi)
        kind = rng.integers(3)
        if kind == 0:
            bolt(canvas, rng, x, y, rng.uniform(0.08, 0.16))
        elif kind == 1:  # a step between two levels
            beyond = np.cos(angle) * (canvas.x - x) + np.sin(angle) * (canvas.y - y)
            canvas.height += rng.uniform(0.03, 0.1) * smoothstep(beyond / 0.05)
        else:  # a pipe
            radius = rng.uniform(0.05, 0.15)
            away = np.abs(np.cos(angle) * (canvas.x - x) + np.sin(angle) * (canvas.y - y))
            canvas.paint(canvas.cover(away - radius), metal(rng), rng.uniform(0.1, 0.5),
                         height=np.sqrt(np.maximum(radius**2 - away**2, 0)) - 0.4)  # fmt: skip


def bolt(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float) -> None:
    """A hexagon head on a washer, or a socket screw."""
    canvas = canvas.window(x, y, 2 * radius + 0.05)
    at_x, at_y = canvas.x - x, canvas.y - y
    angle = rng.uniform(0, np.pi)
    canvas.paint(canvas.cover(disc(at_x, at_y, 1.5 * radius)), shade=0.45)
    canvas.paint(canvas.carve(disc(at_x, at_y, 1.35 * radius), -0.02, 0.03), metal(rng), 0.3, shade=0.9)
    if rng.random() < 0.7:
        canvas.paint(canvas.carve(hexagon(at_x, at_y, radius, angle), -0.06, 0.05), metal(rng), 0.4, shade=1.0)
    else:
        canvas.paint(canvas.carve(disc(at_x, at_y, radius), -0.06, 0.04), metal(rng), 0.4, shade=1.0)
        canvas.paint(canvas.carve(hexagon(at_x, at_y, 0.5 * radius, angle), 0.06, 0.03), shade=0.25)


def turned(canvas: Canvas, rng: np.random.Generator, half_width: Array, color: Array, gloss: float) -> Array:
    """A body of revolution about the vertical axis, `half_width` (H, W) at each height y (0: nothing); its mask."""
    slope = np.gradient(half_width, axis=0) / canvas.pixel
    across = np.gradient(half_width, axis=1) / canvas.pixel
    mask = canvas.cover((np.abs(canvas.x) - half_width) / np.sqrt(1 + np.clip(slope**2 + across**2, 0, 9)))
    mask = mask * (half_width > 0)
    canvas.paint(canvas.cover(np.abs(canvas.x) - half_width - 0.05) * (half_width > 0), shade=0.4)  # its own shadow
    canvas.paint(mask, color, gloss, height=np.sqrt(np.maximum(half_width**2 - canvas.x**2, 0)), shade=1.0)
    finish(canvas, rng, mask)
    return mask
