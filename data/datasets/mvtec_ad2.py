"""MVTec AD 2: a public test set, and two private ones that only MVTec's server can evaluate."""

from pathlib import Path

from data.dataset import Dataset
from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from data.image_files import find_images
from data.images import OnError
from data.masks import Masks
from runtime.errors import UserError
from runtime.values import PathText

PRIVATE = ("test_private", "test_private_mixed")


class MVTecAD2(MVTec):
    """One object (Heckler-Kram et al. 2025). `test` is test_public, `validation` are normal images.

    The name of an image says how it was lit: `000_regular`, `000_overexposed`, `001_underexposed`, `000_shift_1`.

    The images of `test_private` and `test_private_mixed` have no labels; `python predict.py <run> <that folder>
    submission=<folder>` writes what the server takes.

    Args:
        root: folder of the objects.
        category: can, fabric, fruit_jelly, rice, sheet_metal, vial, wallplugs or walnuts; several as a,b, or all.
    """

    splits = ("train", "validation", "test", *PRIVATE)
    tested, truth = "test_public", "test_public/ground_truth"
    layout = (
        "expected <root>/<category>/train/good/*, validation/good/*, test_public/<good or bad>/* "
        "and test_public/ground_truth/bad/<stem>_mask.png"
    )

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        masks: Masks = "all",
        on_error: OnError = "fail",
    ):
        if split not in PRIVATE:
            super().__init__(split, size, root=root, category=category, masks=masks, on_error=on_error)
            return
        paths = find_images(Path(root) / category / split)
        if not paths:
            raise UserError(f"there are no images in {root}/{category}/{split}: expected 000_regular.png and so on")
        Dataset.__init__(self, split, size, root, paths, [0] * len(paths), ["unlabelled"], on_error=on_error)

    @property
    def groups(self) -> dict[str, list[str]]:
        """`lighting` of each image of the public test set; all others are regular."""
        lightings = [Path(path).stem.partition("_")[2] or "unknown" for path in self.paths]
        return {"lighting": lightings} if self.split == "test" else {}
