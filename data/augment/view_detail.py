"""Whether views are sharp: a crop has no more detail than the stored image that it is cut from."""

import torch
from torch import Tensor

from data.augment import resample
from data.augment.patch_grid import PatchGrid
from data.augment.random_numbers import uniform
from data.augment.views import Augment, View
from data.geometry import Geometry

ALLOWED = 1.25  # times that the median crop of a view may be enlarged
SAMPLES = 1000  # images, spread over the set, whose crops are drawn


def blur_note(augment: Augment | PatchGrid, geometry: Geometry, sizes: Tensor) -> str | None:
    """One line when the median crop of a view is enlarged although the original files have the detail; else None.

    It names the `data.size` at which the median crop keeps its pixels, or all that the original has, and the memory
    that so many uint8 images take. A grid of patches enlarges nothing. sizes (N, 2): heights and widths of the original
    images.
    """
    if isinstance(augment, PatchGrid):
        return None
    enlarged = {view: enlargement(augment, view, geometry, sizes) for view in augment.views}
    view, (stored, original) = max(enlarged.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
    factor = stored / max(original, 1)
    if factor <= ALLOWED:
        return None
    sharp = [-(-round(side * factor) // 32) * 32 for side in (geometry.height, geometry.width)]
    one = sharp[:1] if geometry.height == geometry.width else sharp
    height, width = sizes.contiguous().median(0).values.tolist()  # of expanded sizes torch 2.14 gives garbage
    note = (
        f"the median crop of views of {view.shape[0]} x {view.shape[1]} pixels is enlarged {stored:.2f} times, so it "
        f"is blurred: images of {height} x {width} (median) are stored at {geometry.height} x {geometry.width}; "
        f"data.size={','.join(map(str, one))} keeps the detail and takes {_gib(sizes, *sharp)} for {len(sizes):,} "
        f"images, not {_gib(sizes, geometry.height, geometry.width)}"
    )
    return note if (sizes != sizes[0]).any() else f"{note} (data.size=native: {_gib(sizes, height, width)})"


def enlargement(augment: Augment, view: View, geometry: Geometry, sizes: Tensor) -> tuple[float, float]:
    """How many times the median crop of a view is enlarged, along the axis where it is more: the crop of the stored
    image, and that of the original."""
    ids = torch.linspace(0, len(sizes) - 1, min(len(sizes), SAMPLES)).long()
    some = sizes[ids].double()  # (B, 2)
    _, extent = view.boxes(uniform((augment.seed, 0, 0, ids), resample.CROP_DRAWS), some)
    times = torch.tensor(view.shape) / extent  # (B, 2)
    stored = times * some / torch.tensor([geometry.height, geometry.width])
    return stored.amax(1).median().item(), times.amax(1).median().item()


def _gib(sizes: Tensor, height: int, width: int) -> str:
    return f"{len(sizes) * 3 * height * width / 2**30:.2g} GiB"
