"""The corruptions of one image in plain numpy, scipy and Pillow, as the official scripts have them: what the batched
ones are tested against and compared with in speed.

All take an image (H, W, 3) float64 in [0, 1] and the random numbers that the batched code drew, and give one likewise,
not yet cut off at 0 and 1. What OpenCV, scikit-image and ImageMagick do there is written out, pixel by pixel where that
is plainest (`LOOPS`).
"""

import colorsys
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

LOOPS = ("glass_blur", "fog", "brightness", "saturate", "spatter")  # of Python; glass_blur is one in the original, too


def levels(x):
    return np.uint8(np.clip(x, 0, 1) * 255)


def gaussian(x, sigma, **options):
    sigmas = (sigma, sigma, 0) if x.ndim == 3 else sigma
    return ndimage.gaussian_filter(x, sigmas, **({"mode": "nearest", "truncate": 4} | options))


def defocus_blur(x, radius, softness):
    half, width = (8, 3) if radius <= 8 else (radius, 5)
    place = np.arange(-half, half + 1)
    across, down = np.meshgrid(place, place)
    disk = np.float64(across**2 + down**2 <= radius**2)
    tap = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * softness**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(tap, tap) / tap.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], axis=2)


def moved(x, down, right):
    """Each pixel's neighbor so many rows below and columns to the right, the border repeated."""
    rows = np.clip(np.arange(x.shape[0]) + down, 0, x.shape[0] - 1)
    columns = np.clip(np.arange(x.shape[1]) + right, 0, x.shape[1] - 1)
    return x[rows][:, columns]


def magick_motion_blur(x, radius, sigma, angle):
    """Levels in, levels out, as ImageMagick's MotionBlurImage."""
    width = 2 * radius + 1
    taps = [math.exp(-(i * i) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma) for i in range(width)]
    down, right = width * math.sin(math.radians(angle)), width * math.cos(math.radians(angle))
    length, out = math.hypot(down, right), np.zeros(x.shape)
    for i in range(width):
        place = math.ceil(i * down / length - 0.5), math.ceil(i * right / length - 0.5)
        out += taps[i] / sum(taps) * moved(x.astype(np.float64), *place)
    return np.round(out)


def motion_blur(x, radius, sigma, angle):
    return magick_motion_blur(np.round(x * 255), radius, sigma, angle) / 255


def clipped_zoom(x, factor):
    """scipy's zoom written out for one channel each: output o lies at o (n - 1) / (m - 1)."""
    height, width = x.shape[:2]
    kept = [math.ceil(side / factor) for side in (height, width)]
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    large = ndimage.zoom(x[top : top + kept[0], left : left + kept[1]], (factor, factor, 1)[: x.ndim], order=1)
    y, z = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[y : y + height, z : z + width]


def zoom_blur(x, end, step):
    factors = np.arange(1, end, step)
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def glass_blur(x, sigma, shift, rounds, moves):
    """`moves` (rounds, 2, H, W): columns and rows, -shift to shift - 1."""
    x = np.uint8(gaussian(x, sigma) * 255 + 1 / 512)
    height, width = x.shape[:2]
    for number in range(rounds):
        for h in range(height - shift, shift, -1):
            for w in range(width - shift, shift, -1):
                dx, dy = moves[number][:, h, w]
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]  # two views of one array
    return gaussian(x / 255.0, sigma)


def brightness(x, more):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[place])
        out[place] = colorsys.hsv_to_rgb(hue, saturation, min(max(value + more, 0), 1))
    return out


def saturate(x, factor, more):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[place])
        out[place] = colorsys.hsv_to_rgb(hue, min(max(saturation * factor + more, 0), 1), value)
    return out


def contrast(x, factor):
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * factor + means


def pixelate(x, share):
    height, width = x.shape[:2]
    image = Image.fromarray(np.uint8(np.round(x * 255)))
    # columns first, as all Pillows before 13 do; 13 takes the rows first where that is less work
    for size in ((int(width * share), height), (int(width * share), int(height * share)), (width, -1), (width, height)):
        image = image.resize((size[0], image.height if size[1] < 0 else size[1]), Image.Resampling.BOX)
    return np.asarray(image) / 255


def jpeg_compression(x, quality):
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.round(x * 255))).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def plasma(noise, decay):
    """The diamond-square algorithm point by point; `noise` (n, n) in [-1, 1) is that of each point."""
    side = len(noise)
    points, step, wibble = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        for y in range(half, side, step):
            for x in range(half, side, step):
                corners = [points[(y + a) % side, (x + b) % side] for a in (-half, half) for b in (-half, half)]
                points[y, x] = sum(corners) / 4 + wibble * wibble * noise[y, x]
        for y in range(0, side, half):
            for x in range(half if y % step == 0 else 0, side, step):
                ends = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                points[y, x] = sum(points[a % side, b % side] for a, b in ends) / 4 + wibble * wibble * noise[y, x]
        step, wibble = half, wibble / decay
    points -= points.min()
    return points / points.max()


def fog(x, strength, decay, noise):
    most = x.max()
    clouds = plasma(noise, decay)[: x.shape[0], : x.shape[1], None]
    return (x + strength * clouds) * most / (most + strength)


def snow(x, mean, std, zoom, least, radius, sigma, own, normal, angle):
    layer = clipped_zoom(mean + std * normal, zoom)
    layer[layer < least] = 0
    layer = magick_motion_blur(levels(layer), radius, sigma, angle)[..., None] / 255
    gray = (x @ [0.299, 0.587, 0.114])[..., None]
    return own * x + (1 - own) * np.maximum(x, gray * 1.5 + 0.5) + layer + np.rot90(layer, 2)


def elastic_transform(x, alpha, sigma, shift, moves, noise):
    """`moves` (3, 2) in [-1, 1): of three points, x and y; `noise` (2, H, W) in [-1, 1): to the right and down."""
    height, width = x.shape[:2]
    side, middle = min(height, width) // 3, np.array([width // 2, height // 2])
    before = middle + np.array([[side, side], [side, -side], [-side, -side]])
    after = before + shift * moves
    forward = np.linalg.solve(np.column_stack([before, np.ones(3)]), after).T  # (2, 3), OpenCV's getAffineTransform
    backward = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    at = np.tensordot(backward, np.stack([columns, rows, np.ones_like(rows)]), 1)
    x = np.stack([ndimage.map_coordinates(x[..., c], at[::-1], order=1, mode="mirror") for c in range(3)], axis=2)
    right, down = (gaussian(field, sigma, mode="reflect", truncate=3) * alpha for field in noise)
    at = rows + down, columns + right
    return np.stack([ndimage.map_coordinates(x[..., c], at, order=1, mode="reflect") for c in range(3)], axis=2)


def canny(image, low, high):
    """OpenCV's, pixel by pixel; levels (H, W) -> bool."""
    height, width = image.shape
    padded = np.pad(image.astype(int), 1, mode="edge")
    across, down = (np.zeros((height, width), int) for _ in range(2))
    for y, x in np.ndindex(height, width):
        (a, b, c), (d, _, f), (g, h, i) = padded[y : y + 3, x : x + 3]
        across[y, x], down[y, x] = (c - a) + 2 * (f - d) + (i - g), (g - a) + 2 * (h - b) + (i - c)
    size = np.pad(np.abs(across) + np.abs(down), 1)
    strong, weak = [], np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        m, i, j = size[y + 1, x + 1], y + 1, x + 1
        if m <= low:
            continue
        flat, steep = abs(across[y, x]) * 13573, abs(down[y, x]) << 15
        if steep < flat:
            peak = m > size[i, j - 1] and m >= size[i, j + 1]
        elif steep > flat + (abs(across[y, x]) << 16):
            peak = m > size[i - 1, j] and m >= size[i + 1, j]
        else:
            s = -1 if (across[y, x] ^ down[y, x]) < 0 else 1
            peak = m > size[i - 1, j - s] and m > size[i + 1, j + s]
        weak[y, x] = peak
        if peak and m > high:
            strong.append((y, x))
    found = np.zeros((height, width), bool)
    while strong:
        y, x = strong.pop()
        if 0 <= y < height and 0 <= x < width and weak[y, x] and not found[y, x]:
            found[y, x] = True
            strong += [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return found


def chamfer(targets, most):
    """OpenCV's two sweeps with a 5 x 5 mask, at most `most`; bool (H, W) -> float."""
    height, width = targets.shape
    distance = np.full((height + 4, width + 4), np.inf)
    distance[2:-2, 2:-2][targets] = 0
    before = [(-1, -1, 1.4), (-1, 0, 1), (-1, 1, 1.4), (0, -1, 1)]
    before += [(-2, -1, 2.1969), (-2, 1, 2.1969), (-1, -2, 2.1969), (-1, 2, 2.1969)]
    for sign in (1, -1):
        for y in range(height)[::sign]:
            for x in range(width)[::sign]:
                ways = [distance[y + 2 + sign * a, x + 2 + sign * b] + cost for a, b, cost in before]
                distance[y + 2, x + 2] = min(distance[y + 2, x + 2], *ways)
    return np.minimum(distance[2:-2, 2:-2], most)


def equalize_hist(image):
    counts = np.bincount(image.ravel(), minlength=256)
    first = int(image.min())
    if counts[first] == image.size:
        return image
    table, total = np.zeros(256, np.uint8), 0
    for level in range(first + 1, 256):
        total += counts[level]
        table[level] = min(255, np.round(total * (255 / (image.size - counts[first]))))
    return table[image]


def spatter(x, mean, std, sigma, least, weight, mud, normal):
    liquid = gaussian(mean + std * normal, sigma)
    liquid[liquid < least] = 0
    if mud:
        m = gaussian(np.where(liquid > least, 1.0, 0.0), weight)[..., None]
        m[m < 0.8] = 0
        return x * (1 - m) + m * np.array([63, 42, 20]) / 255
    liquid = levels(liquid)
    distance = chamfer(canny(liquid, 50, 150), 20)
    box = np.ones((3, 3)) / 9
    near = equalize_hist(np.uint8(ndimage.correlate(distance, box, mode="mirror") + 1e-9))
    relief = ndimage.correlate(near.astype(float), np.array([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror")
    rim = np.round(ndimage.correlate(np.clip(relief, 0, 255), box, mode="mirror"))
    m = (liquid * rim)[..., None]
    return x + weight * m / max(m.max(), 1e-12) * np.array([175, 238, 238]) / 255


def corrupted(name: str, x: np.ndarray, values: tuple, rng: np.random.Generator) -> np.ndarray:
    """With numpy's random numbers, as the official code draws them."""
    height, width, side = *x.shape[:2], 1 << (max(x.shape) - 1).bit_length()
    random = {
        "gaussian_noise": lambda c: x + c * rng.normal(size=x.shape),
        "shot_noise": lambda c: rng.poisson(x * c) / c,
        "impulse_noise": lambda c: np.where(rng.random(x.shape) <= c, rng.random(x.shape) < 0.5, x),
        "speckle_noise": lambda c: x + x * c * rng.normal(size=x.shape),
        "glass_blur": lambda sigma, d, n: glass_blur(x, sigma, d, n, rng.integers(-d, d, (n, 2, height, width))),
        "motion_blur": lambda *c: motion_blur(x, *c, rng.uniform(-45, 45)),
        "snow": lambda *c: snow(x, *c, rng.normal(size=x.shape[:2]), rng.uniform(-135, -45)),
        "fog": lambda *c: fog(x, *c, rng.uniform(-1, 1, (side, side))),
        "elastic_transform": lambda *c: elastic_transform(
            x, *c, rng.uniform(-1, 1, (3, 2)), rng.uniform(-1, 1, (2, height, width))
        ),
        "spatter": lambda *c: spatter(x, *c, rng.normal(size=x.shape[:2])),
    }
    if name in random:
        return random[name](*values)
    return gaussian(x, *values) if name == "gaussian_blur" else globals()[name](x, *values)
