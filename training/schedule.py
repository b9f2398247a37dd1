"""Curves over training steps: pure functions, to be called in the loop and easy to plot.

Every curve moves step by step, and a warm-up of W steps is linspace(0, start, W), which ends on `start`: i / (W - 1) at
step i, as in the official DINO. What other official codes do differently, and stays different here:

* Their warm-up is i / W and reaches the peak one step later: SimCLR, BYOL, Barlow Twins, VICReg, MoCo v3. SupCon's is
  i / W from 0.01, and the cosine that follows it began with the run.
* Their cosine moves once per epoch: MoCo v1 and v2, SimSiam, SupCon. On average the rate here is what theirs is half an
  epoch later.
"""

import math

from runtime.errors import UserError


def warmup_cosine(step: int, total: int, *, start: float, end: float = 0.0, warmup: int = 0) -> float:
    """Linear warm-up from 0 to `start`, then half a cosine from `start` towards `end`.

    Official DINO (utils.cosine_scheduler): warm-up = linspace(0, start, warmup), both ends included; then, with N =
    total - warmup, end + (start - end) (1 + cos(pi i / N)) / 2 for i = 0 .. N-1, so `end` itself is not reached.
    """
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def warmup_cosine_7_16(step: int, total: int, *, start: float, warmup: int = 0) -> float:
    """The same warm-up, then `start` * cos(7 pi i / (16 N)) with N = total - warmup and i = 0 .. N-1 (FixMatch, Sohn et
    al. 2020, section 2.3), which ends near 0.195 of `start`."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return start * math.cos(7 / 16 * math.pi * (step - warmup) / max(total - warmup, 1))


def warmup_constant(step: int, total: int, *, start: float, warmup: int = 0) -> float:
    """The same warm-up, then `start` until the end; `total` is not needed and taken for a common signature."""
    del total
    return start * step / max(warmup - 1, 1) if step < warmup else start


def warmup_steps(
    step: int, total: int, *, start: float, warmup: int = 0, at: tuple[float, ...] = (0.6, 0.8), factor: float = 0.1
) -> float:
    """The same warm-up, then `start` times `factor` for each fraction of `total` in `at` that has passed."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return start * factor ** sum(step >= fraction * total for fraction in at)


def warmup_exponential(
    step: int, total: int, *, start: float, epoch_steps: int, factor: float, warmup: int = 0
) -> float:
    """The same warm-up, then `start` times `factor` for each finished epoch (torch's ExponentialLR)."""
    del total
    return start * step / max(warmup - 1, 1) if step < warmup else start * factor ** (step // epoch_steps)


def linear_then_constant(position: float, *, start: float, end: float, length: int) -> float:
    """linspace(start, end, length)[position], then `end` (DINO's teacher temperature, position = epoch).

    As numpy's, a linspace of length 1 is [start]: `end` begins at position 1.
    """
    if position >= length - (length > 1):  # the last of several is `end` itself, not a sum that rounds
        return end
    return start + (end - start) * position / max(length - 1, 1)


def check_lengths(epochs: int, lengths: dict[str, float]) -> None:
    """Refuse warm-ups and other parts of a run, {key: length in epochs}, that are longer than the run."""
    long = {key: length for key, length in lengths.items() if length > epochs}
    if long:
        given = " and ".join(f"{key}={length:g}" for key, length in long.items())
        tenth = " ".join(f"{k}={epochs // 10 if isinstance(v, int) else epochs / 10:g}" for k, v in long.items())
        raise UserError(f"{given} {'is' if len(long) == 1 else 'are'} longer than epochs={epochs}: set {tenth}")
