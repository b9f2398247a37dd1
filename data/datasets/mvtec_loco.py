"""MVTec LOCO AD: logical and structural anomalies, with a mask per defect region."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from data.datasets.mvtec import MVTec
from data.image_files import find_images
from data.images import decode_mask, in_threads, mask_values
from data.masks import Masks
from runtime.errors import UserError
from runtime.files import open_regular
from runtime.text import first_few


class MVTecLOCO(MVTec):
    """One category (Bergmann et al. 2022), `defects` being `logical_anomalies` and `structural_anomalies`.

    `ground_truth/<kind>/<stem of the image>/*.png` are the defect regions of an image. The value of a region's pixels
    names its kind of defect, and `defects_config.json` says of each kind how much of a region must be found to have
    found all of it. `validation` are normal images.

    Args:
        root: folder of the categories.
        category: breakfast_box, juice_bottle, pushpins, screw_bag or splicing_connectors; several as a,b, or all.

    Raises:
        UserError: as for `MVTec`; no `defects_config.json`, a region of several values or of one that it does not name.
    """

    splits = ("train", "validation", "test")
    saturates = True
    layout = (
        "expected <root>/<category>/train/good/*, validation/good/*, test/<good, logical_anomalies or "
        "structural_anomalies>/*, ground_truth/<kind>/<stem>/000.png and defects_config.json"
    )

    def find_masks(self, images: list[str], folder: Path, truth: Path, needed: Masks) -> list[list[str] | None]:
        """The files of the regions of each image, whose saturation areas are read as well."""
        kinds = _kinds_of_defects(truth.parent / "defects_config.json")
        regions = [find_images(truth / Path(image).relative_to(folder).with_suffix("")) for image in images]
        missing = [image for image, files in zip(images, regions) if not files]
        if missing and needed == "all":
            expected = truth / Path(missing[0]).relative_to(folder).with_suffix("") / "000.png"
            raise UserError(
                f"{len(missing)} defective images have no regions, the first {missing[0]}: expected {expected} and so "
                "on; add them, or set data.masks=some to leave such images out of the pixel metrics"
            )
        files = [file for own in regions for file in own]
        areas = in_threads(lambda file: _saturation_area(file, kinds), files, "reading regions")
        self.saturation_areas = dict(zip(files, areas))  # of each region, in pixels of the original
        return [files or None for files in regions]

    def regions(self, index: int) -> list[tuple[Tensor, int]]:
        """The defect regions of an image, bool (h, w) as they are stored, and their saturation areas in pixels."""
        files = self.mask_paths[index] or []
        return [(decode_mask(file, None), self.saturation_areas[file]) for file in files]


def _kinds_of_defects(path: Path) -> dict[int, tuple[float, bool]]:
    """{value in the masks: (threshold, whether it is a share of the region and not a number of pixels)}"""
    try:
        with open_regular(path) as file:
            kinds = json.load(file)
        return {kind["pixel_value"]: (kind["saturation_threshold"], kind["relative_saturation"]) for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        keys = "defect_name, pixel_value, saturation_threshold and relative_saturation"
        raise UserError(f"cannot read {path} ({error!r}): expected a list of objects with {keys}") from error


def _saturation_area(file: str, kinds: dict[int, tuple[float, bool]]) -> int:
    """How many pixels of the region must be found to have found all of it (section 5.2 of the paper).

    A share of a small region may be less than a pixel; at least one counts, where the official code divides by 0.
    """
    values = mask_values(file)  # (h, w)
    found = np.unique(values[values != 0]).tolist()
    if len(found) != 1 or found[0] not in kinds:
        known = first_few(sorted(kinds), 8)
        raise UserError(
            f"{file} has the values {first_few(found, 4)}: expected one of those in defects_config.json: {known}"
        )
    threshold, is_share = kinds[found[0]]
    area = int(np.count_nonzero(values))
    return max(1, int(threshold * area) if is_share else min(int(threshold), area))
