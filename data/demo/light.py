"""The demo set's dirt, lamp and camera: the same for every image, so that only the drawn shapes tell classes apart.

`soil` ages the material of a `Canvas`, `shine` lights it with a borescope's lamp beside the lens (Lambert diffuse plus
Blinn-Phong highlights, inverse-square fall-off), `expose` adds vignette, exposure, blur, sensor noise and JPEG grain.
"""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from data.demo.canvas import Array, Canvas, smoothstep

SOOT = np.float32([[[0.035, 0.032, 0.030]]]).T  # (3, 1, 1)
RUST = np.float32([[[0.25, 0.135, 0.07]]]).T  # (3, 1, 1)
OIL = np.float32([[[0.30, 0.20, 0.07]]]).T  # (3, 1, 1)
ASH = np.float32([[[0.52, 0.49, 0.42]]]).T  # (3, 1, 1)


def soil(canvas: Canvas, rng: np.random.Generator, amount: float = 1.0) -> None:
    """Soot, rust, ash and running oil over everything; `amount` scales how much of it."""
    strength = amount * rng.uniform(0.15, 1.0, 4) * (rng.random(4) < [0.9, 0.45, 0.4, 0.7])
    for spread, stuff, most, gloss in zip(strength, (SOOT, RUST, ASH), (0.92, 0.8, 0.7), (0.08, 0.05, 0.05)):
        if spread > 0:
            cloud = canvas.noise(rng, rng.uniform(1.0, 3), 5)
            cover = most * smoothstep((cloud - 1.9 + 2.0 * spread) / 2.4)
            canvas.paint(cover, stuff * np.float32(rng.uniform(0.7, 1.3)), gloss)
    if strength[3] > 0:  # oil runs down: long in one direction, thin in the other
        lean = rng.normal(0, 0.25)
        place = (canvas.across + lean * canvas.down) * rng.uniform(4, 12)
        runs = np.interp(place, np.arange(-32, 33), rng.standard_normal(65), period=64).astype(np.float32)
        cloud = 0.7 * runs + 0.7 * canvas.noise(rng, 2, 2)
        film = smoothstep((cloud - 1.3 + 1.5 * strength[3]) / 0.9)
        canvas.paint(0.55 * film, OIL * np.float32(rng.uniform(0.5, 1.1)))
        canvas.gloss += film * (0.75 - canvas.gloss) * 0.8
        canvas.height += film * 0.004


def shine(canvas: Canvas, rng: np.random.Generator, *, vary: float = 1.0) -> Array:
    """Linear light (3, H, W) that reaches the lens from `canvas`, lit by one lamp near the lens and some stray light.

    `vary`: 1 for a borescope led by hand, 0 for a fixed rig with the lamp in the axis.
    """
    slope_y, slope_x = np.gradient(canvas.height, canvas.step)
    slope_x, slope_y = np.clip(slope_x, -4, 4), np.clip(slope_y, -4, 4)
    length = np.sqrt(slope_x**2 + slope_y**2 + 1)
    distance = 1.75 + vary * rng.uniform(-0.65, 0.65)
    lamp_x, lamp_y = vary * rng.uniform(-0.9, 0.9, 2)
    to_x, to_y = lamp_x - canvas.across, lamp_y - canvas.down
    to_z = distance - np.minimum(canvas.height, 0.6 * distance)
    reach = np.sqrt(to_x**2 + to_y**2 + to_z**2)
    to_x, to_y, to_z = to_x / reach, to_y / reach, to_z / reach
    facing = np.maximum(to_z - slope_x * to_x - slope_y * to_y, 0) / length
    middle = np.sqrt(2 + 2 * to_z)  # length of lamp direction + view direction (0, 0, 1)
    mirror = np.maximum(1 + to_z - slope_x * to_x - slope_y * to_y, 0) / (length * middle)
    fall = (distance / reach) ** 2
    stray = rng.uniform(0.04, 0.2)
    diffuse = (stray + facing * fall) * canvas.shade
    highlight = canvas.gloss * (0.5 * mirror**12 + 1.1 * mirror ** rng.uniform(40, 120)) * fall * canvas.shade
    warm = vary * rng.normal(0, 0.10)
    tint = np.array([1 + warm, 1 + vary * rng.normal(0, 0.025), 1 - warm], np.float32)
    light = canvas.color * diffuse + (0.55 * highlight + canvas.glow)
    return (light * tint[:, None, None]).astype(np.float32)


def through_lens(light: Array, canvas: Canvas, rng: np.random.Generator, *, metered: Array,
                 vary: float = 1.0) -> Array:  # fmt: skip
    """Vignette, exposure, bloom, blur and tone curve: linear light to display values (3, H, W), 0..1, without noise.

    The automatic exposure looks at `metered` (3, H, W): the light itself, or that of a twin to be seen alike.
    `vary` as in `shine`.
    """
    centre_x, centre_y = vary * rng.normal(0, 0.12, 2)
    radius = np.hypot(canvas.across - centre_x, canvas.down - centre_y)
    if rng.random() < 0.5 * vary - 0.25:  # the tube's round edge is in the image, not in a fixed rig's
        edge = rng.uniform(0.95, 1.25)
        light = light * (1 - smoothstep((radius - edge) / rng.uniform(0.03, 0.15) + 0.5))
    light = light / (1 + rng.uniform(0.05, 0.9) * radius**2)
    wanted = 0.23 + 0.11 * vary * rng.uniform(-1, 1)  # the camera's automatic exposure, never quite right
    light = light * (wanted / (0.6 * metered.mean() + 0.4 * np.median(metered) + 0.02))
    excess = np.maximum(light.mean(0) - 0.9, 0)
    light = light + rng.uniform(0.0, 0.5) * gaussian_filter(np.minimum(excess, 3), rng.uniform(2, 5), truncate=2)
    light = gaussian_filter(light, (0, *rng.uniform(0.25, 0.95, 2)), truncate=3)  # unequal: a little motion
    light = light / (1 + 0.35 * light)
    return np.clip(light * 1.15, 0, 1) ** (1 / rng.uniform(1.7, 2.2))


def sense(scene: Array, rng: np.random.Generator) -> Image.Image:
    """Sensor noise, 8 bits and one pass of JPEG grain."""
    level = rng.uniform(0.005, 0.025)
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    noise = noise + 0.8 * noise[:1]  # partly common to the colors
    scene = scene + level * noise * (0.5 + np.sqrt(scene))
    image = Image.fromarray((255 * np.clip(scene, 0, 1) + 0.5).astype(np.uint8).transpose(1, 2, 0))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=int(rng.integers(50, 90)))
    return Image.open(packed).convert("RGB")


def expose(canvas: Canvas, rng: np.random.Generator) -> Image.Image:
    """The finished image of a canvas."""
    light = shine(canvas, rng)
    return sense(through_lens(light, canvas, rng, metered=light), rng)
