"""Color operations on batches, each image with its own parameters, after torchvision's definitions.

Images are float (B, 3, H, W) in [0, 1]. Parameters are CPU tensors with one row per image, sent by the function that
needs them: so the host can sort by them without waiting for the device.
"""

import torch
from torch import Tensor

from runtime.memory import send

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def gray(images: Tensor) -> Tensor:
    """Luma 0.2989 R + 0.587 G + 0.114 B, as torchvision rounds ITU-R BT.601: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def to_gray(images: Tensor) -> Tensor:
    """All three channels become the luma (torchvision's `rgb_to_grayscale` with 3 output channels)."""
    return gray(images).expand_as(images)


def blend_weights(ops: Tensor, factors: Tensor) -> Tensor:
    """Shares of the image, its gray and its mean gray in each result: ops, factors (...) -> (3, ...) float32.

    Brightness, contrast and saturation by a factor f are all f * image + (1 - f) * reference, and differ in the
    reference: black, the mean of the gray image, the gray image.
    """
    return torch.stack([factors, (1 - factors) * (ops == SATURATION), (1 - factors) * (ops == CONTRAST)]).float()


def blend_(images: Tensor, weights: Tensor, within: Tensor | None = None) -> Tensor:
    """Brightness, contrast or saturation of each image, in place; weights (3, B) on the images' device.

    `within` float (B, 1, H, W), 1 or 0: the pixels whose mean gray the contrast turns around; None: all.
    """
    of_image, of_gray, of_mean = weights[..., None, None, None]  # each (B, 1, 1, 1)
    reference = gray(images)
    # Row means first: one sum over a whole large image may be split between threads, which changes its last bit.
    if within is None:
        mean = reference.mean(3, keepdim=True).mean(2, keepdim=True)
    else:
        inside, count = (x.sum(3, keepdim=True).sum(2, keepdim=True) for x in (reference * within, within))
        mean = inside / count.clamp(min=1)  # (B, 1, 1, 1)
    reference.mul_(of_gray).add_(mean.mul_(of_mean))  # (B, 1, H, W)
    return images.mul_(of_image).add_(reference).clamp_(0, 1)


def adjust_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of each image by `turns` (B,) of a circle in [-1/2, 1/2], in place; torchvision's adjust_hue.

    HSV without a branch: V is the largest channel, C its distance to the smallest, L. The hue's distance from red is
    1 + (G + B - R - L) / C sixths of a circle in all six sectors, towards green when G >= B. The turned channels are
    V - C max(0, min(k, 4 - k, 1)), k = (n + 6 hue) mod 6, n = 5, 3, 1 for R, G, B: a wave in k, equal to
    clamp(2 - 6 |y|, 0, 1) where y in [-1/2, 1/2) turns is the distance to the middle of its dip, k = 2.
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)  # (B, H, W)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    sixths = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1e-12)).add_(1)  # [0, 3]
    hue = sixths.copysign_(green - blue).div_(6).add_(send(turns.float(), images.device)[:, None, None])  # [-1, 1]

    # (n - 2) / 6 + 1/2, and a turn to keep the sum positive
    middles = send(torch.tensor([2, 5 / 3, 4 / 3]), images.device)
    distance = torch.add(hue[:, None], middles[:, None, None], out=images).frac_().sub_(0.5).abs_()  # (B, 3, H, W)
    dip = distance.mul_(-6).add_(2).clamp_(0, 1)
    return dip.mul_(chroma.neg_()[:, None]).add_(value[:, None])


def jitter(images: Tensor, chosen: Tensor, factors: Tensor, orders: Tensor, within: Tensor | None = None) -> Tensor:
    """torchvision's ColorJitter with forced parameters of the chosen images (B,), in each one's own order.

    factors (B, 4): brightness, contrast, saturation and turns of hue; orders (B, 4): which of them comes 1st to 4th;
    `within` as for `blend_`. Images are sorted by the place of hue in their order, those not chosen first. Then at
    place p the blends before the hue are those of a tail of the batch, and the blends after it those of the head of
    the chosen: 3 + 3 blends of slices and one turn of the hue.
    """
    if not chosen.any():
        return images
    hue_place = torch.where(chosen, (orders == HUE).int().argmax(1), -1)
    rows = hue_place.argsort(stable=True)
    first, *ends = torch.bincount(hue_place + 1, minlength=5).cumsum(0).tolist()  # ends[p]: after hue at or before p
    orders, factors = orders[rows], factors[rows]
    weights = send(blend_weights(orders, factors.gather(1, orders)), images.device)  # (3, B, 4)

    there = send(rows, images.device)
    batch, within = images.index_select(0, there), None if within is None else within.index_select(0, there)
    for place in range(3):
        tail = slice(ends[place], None)
        blend_(batch[tail], weights[:, tail, place], None if within is None else within[tail])
    adjust_hue_(batch[first:], factors[first:, HUE])
    for place in range(1, 4):
        head = slice(first, ends[place - 1])
        blend_(batch[head], weights[:, head, place], None if within is None else within[head])
    return batch.index_select(0, send(rows.argsort(), images.device))


def solarize(images: Tensor) -> Tensor:
    """Invert what is at least 128/255 (PIL's and torchvision's solarize at threshold 128)."""
    return torch.where(images >= 128 / 255, 1 - images, images)
