"""The demo set's drawing board: what the camera sees of a part, as per-pixel material instead of color.

A part is drawn in its own coordinates (`canvas.x`, `canvas.y`; the image's shorter half is about 1) through a random
view; shapes are signed distances (negative inside), so edges are antialiased without supersampling. Heights and
distances share one unit. `demo_light.py` turns the finished material into an image.
"""

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

Array = np.ndarray


class Canvas:
    """Material maps of one image, all float32 (H, W) except `color` (3, H, W).

    color: diffuse reflectance, 0..1;  gloss: strength of the mirror-like reflection, 0..1;
    height: towards the camera;  shade: light that reaches the place (0 deep hole, 1 open);  glow: light it sends out.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], *, turn: float, zoom: tuple[float, float],
                 shift: float, tilt: float):  # fmt: skip
        """A view turned by up to `turn` radians, magnified by `zoom` (low, high), moved by up to `shift`, in a
        perspective of up to `tilt`; borescope lenses also bend straight lines outwards (barrel distortion)."""
        rows, columns = size
        half = min(rows, columns) / 2
        across = (np.arange(columns, dtype=np.float32) - (columns - 1) / 2) / half
        down = (np.arange(rows, dtype=np.float32) - (rows - 1) / 2) / half
        self.across, self.down = np.meshgrid(across, down)  # (H, W) image coordinates
        angle, scale = rng.uniform(-turn, turn), np.exp(rng.uniform(*np.log(zoom)))
        move_x, move_y = rng.uniform(-shift, shift, 2)
        tilt_x, tilt_y = rng.uniform(-tilt, tilt, 2)
        bend = 1 + rng.uniform(0.0, 0.08) * (self.across**2 + self.down**2)
        depth = scale * np.maximum(1 + tilt_x * self.across + tilt_y * self.down, 0.35)
        bent_x, bent_y = self.across * bend / depth, self.down * bend / depth
        self.x = (np.cos(angle) * bent_x + np.sin(angle) * bent_y + move_x).astype(np.float32)
        self.y = (np.cos(angle) * bent_y - np.sin(angle) * bent_x + move_y).astype(np.float32)
        self.step = 1 / half  # one pixel in image coordinates
        self.pixel = self.step / depth.astype(np.float32)  # (H, W) one pixel in part coordinates
        self.color = np.full((3, rows, columns), 0.1, np.float32)
        self.gloss = np.full((rows, columns), 0.1, np.float32)
        self.height = np.zeros((rows, columns), np.float32)
        self.shade = np.ones((rows, columns), np.float32)
        self.glow = np.zeros((rows, columns), np.float32)

    @property
    def size(self) -> tuple[int, int]:
        return self.height.shape

    def copy(self) -> "Canvas":
        """The same view with its own material maps."""
        twin = object.__new__(Canvas)
        twin.__dict__.update(self.__dict__)
        for name in ("color", "gloss", "height", "shade", "glow"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def window(self, x: float, y: float, reach: float) -> "Canvas":
        """The part of this canvas within `reach` of (x, y), sharing its memory: small things are drawn faster there."""
        near = (np.abs(self.x - x) < reach) & (np.abs(self.y - y) < reach)
        rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        cut = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.s_[..., :0, :0]
        twin = object.__new__(Canvas)
        twin.__dict__.update({key: item[cut] if isinstance(item, Array) else item for key, item in vars(self).items()})
        return twin

    def cover(self, distance: Array) -> Array:
        """How much of each pixel lies inside a shape: 1 inside, 0 outside, a one-pixel ramp between."""
        return np.clip(0.5 - distance / self.pixel, 0, 1).astype(np.float32)

    def paint(self, mask: Array, color: Array | float | None = None, gloss: Array | float | None = None, *,
              height: Array | float | None = None, shade: Array | float | None = None,
              glow: Array | float | None = None) -> None:  # fmt: skip
        """Blend new material over the old where `mask` (H, W) is 1. `color`: (3, 1, 1), (H, W) grey or (3, H, W)."""
        if color is not None:
            self.color += mask * (color - self.color)
        for name, value in (("gloss", gloss), ("height", height), ("shade", shade), ("glow", glow)):
            if value is not None:
                old = getattr(self, name)
                old += mask * (value - old)

    def carve(self, distance: Array, depth: float, bevel: float) -> Array:
        """Lower (depth > 0) or raise (depth < 0) the inside of a shape behind a slanted edge `bevel` wide; the mask."""
        self.height -= depth * smoothstep(-distance / bevel + 0.5)
        return self.cover(distance)

    def grain(self, rng: np.random.Generator, along_x: float, along_y: float) -> Array:
        """Noise that is fixed to the part, roughly standard normal, with `along_x`, `along_y` waves a unit length."""
        grid = rng.standard_normal((48, 48), dtype=np.float32)
        places = np.stack([self.y * along_y, self.x * along_x]) + rng.uniform(0, 48, (2, 1, 1))
        return 1.3 * map_coordinates(grid, places, order=1, mode="grid-wrap").astype(np.float32)

    def lines(self, rng: np.random.Generator, angle: float, frequency: float) -> Array:
        """Straight tool marks: noise along one direction, `frequency` waves a unit length, roughly standard normal."""
        place = (np.cos(angle) * self.x + np.sin(angle) * self.y) * frequency
        return stripes(rng, place)

    def noise(self, rng: np.random.Generator, cells: float, octaves: int = 3) -> Array:
        """Cloudy noise fixed to the image: `cells` blobs across the shorter side, then halves; mean 0, std 1."""
        rows, columns = self.size
        total, weight = np.zeros(self.size, np.float32), 0.0
        for octave in range(octaves):
            count = cells * 2**octave / min(rows, columns)
            grid = rng.standard_normal((int(rows * count) + 3, int(columns * count) + 3), dtype=np.float32)
            total += 0.6**octave * np.asarray(Image.fromarray(grid).resize((columns, rows), Image.Resampling.BICUBIC))
            weight += 0.36**octave
        return total / np.float32(0.75 * np.sqrt(weight))


def stripes(rng: np.random.Generator, place: Array) -> Array:
    """One-dimensional noise read at `place`, linear between whole numbers, roughly standard normal."""
    values = 1.3 * rng.standard_normal(257)
    return np.interp(place, np.arange(-128, 129), values, period=256).astype(np.float32)


def smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, a smooth S between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


# Signed distances, negative inside --------------------------------------------------------------------------------


def disc(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - radius


def box(x: Array, y: Array, half_x: Array | float, half_y: Array | float, corner: float = 0.0) -> Array:
    """Rectangle of half sides `half_x`, `half_y` with rounded corners."""
    out_x, out_y = np.abs(x) - half_x + corner, np.abs(y) - half_y + corner
    return np.hypot(np.maximum(out_x, 0), np.maximum(out_y, 0)) + np.minimum(np.maximum(out_x, out_y), 0) - corner


def rod(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """Straight stroke with round ends from `start` to `end`."""
    run_x, run_y = end[0] - start[0], end[1] - start[1]
    length = max(run_x**2 + run_y**2, 1e-9)
    t = np.clip(((x - start[0]) * run_x + (y - start[1]) * run_y) / length, 0, 1)
    return np.hypot(x - start[0] - t * run_x, y - start[1] - t * run_y) - radius


def hexagon(x: Array, y: Array, radius: float, angle: float) -> Array:
    """Regular hexagon, `radius` from the middle to a flat side."""
    faces = [np.cos(angle + k * np.pi / 3) * x + np.sin(angle + k * np.pi / 3) * y for k in range(3)]
    return np.maximum.reduce([np.abs(face) for face in faces]) - radius
