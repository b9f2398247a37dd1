"""Random numbers that depend only on what they are for: a counter-based hash instead of a generator with a state.

An image's draws are a function of (seed, epoch, view, image) and their kind, so they are the same in any batch, on any
worker, rank or device, and after a resume. Everything is drawn on the CPU, where the host may look at it without
waiting for the device, and then sent.
"""

import numpy as np
import torch
from torch import Tensor

from runtime.memory import send

# Increment and finalizer of splitmix64 (Steele, Lea & Flood, OOPSLA 2014; the constants of S. Vigna's splitmix64.c).
GOLDEN, FIRST, SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

# Kinds: what follows (seed, epoch, view, sample id) in a key, so that no two parts of a run draw the same numbers. A
# new kind takes a free number; no number ever changes, for then the same configuration would give other images.
KINDS: dict[str, tuple[int, ...]] = {
    "views": (),  # crop, flip, colors, blur; a grid of patches counts its cells as views 0 to 8, and 9 is its place
    "patches_noise": (0,),  # in place of the colors that are dropped
    "cutpaste_good": (0,),  # the detector's colors of whole images; no run has both this and patches
    "cutpaste": (1,),
    "scar": (2,),
    "smooth_blend": (3,),
    "nsa": (4,),
    "nsa_places": (4, 1),  # that are tried, to find one on an object
    "nsa_images": (4, 2),  # the detector's turns, shifts and flips of whole images
    "mix": (8,),  # mixup and CutMix of a classifier's batch
    "rand_augment": (9,),  # operations, their strengths and cutout of a strong view
    "corruption": (10,),  # severity and corruption in place of epoch and view; perhaps followed by a layer's number
    "noise": (5,),
    "noise_pixels": (5, 0),
    "noise_places": (5, 1),  # that are tried, to find one off the background
    "cflow": (6,),  # the detector's turns of whole images; followed by a stage, the order of its positions
}  # RegAD draws the images that it compares with the key (seed, epoch, sample id), which is shorter than all of these


def mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection of uint64 arrays in which every bit of the input moves every bit."""
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    return state ^ (state >> np.uint64(31))


def absorb(key: tuple[int | Tensor, ...]) -> np.ndarray:
    """The state that a key leads to, uint64 (B,) or (1,): `uniform` says how."""
    state = np.zeros(1, np.uint64)
    for part in key:
        part = part.numpy() if isinstance(part, Tensor) else np.array([part], np.int64)
        state = mix((state ^ part.astype(np.uint64)) + GOLDEN)
    return state


def uniform(key: tuple[int | Tensor, ...], draws: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24: float64 (B, draws), where row b depends only on row b of the key.

    The parts of the key are integers or int64 tensors (B,) on the CPU; their order matters. They are absorbed one after
    the other, state <- mix((state ^ part) + GOLDEN), and the draws are the splitmix64 stream that starts at the last
    state: a draw added at the end leaves the earlier ones as they are.
    """
    state = absorb(key)
    counter = np.arange(1, draws + 1, dtype=np.uint64) * GOLDEN
    bits = mix(state[:, None] + counter)  # (B, draws)
    return torch.from_numpy((bits >> np.uint64(40)) * 2.0**-24)


def stream(key: tuple[int | Tensor, ...], draws: int, device: torch.device) -> Tensor:
    """The numbers of `uniform`, made on the device, times 2^24: int64 (B, draws) in [0, 2^24). For many an image.

    torch has no 64-bit unsigned arithmetic; signed products and sums wrap to the same bits, and a shift to the right
    is masked, for it repeats the sign.
    """
    golden, first, second = (int(c.astype(np.int64)) for c in (GOLDEN, FIRST, SECOND))
    state = send(torch.from_numpy(absorb(key).astype(np.int64)), device)[:, None]
    bits = torch.arange(1, draws + 1, device=device) * golden + state  # (B, draws)
    for shift, factor in ((30, first), (27, second)):
        bits = bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_((1 << 33) - 1)) >> 40 & (1 << 24) - 1


def between(numbers: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Uniform numbers in [0, 1) -> uniform between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * numbers


def whole(numbers: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) -> uniform whole numbers from low to high, both included; float64."""
    return low + (numbers * (high - low + 1)).floor()
