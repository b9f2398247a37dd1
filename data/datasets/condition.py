"""Parts of the engine in good and in abnormal condition."""

from dataclasses import dataclass, field
from pathlib import Path

from data.dataset import Dataset
from data.datasets.folder import images_by_class
from data.datasets.mvtec import GOOD
from data.geometry import Geometry
from data.image_files import is_folder, is_junk, refuse_shared_folders
from data.images import OnError
from data.masks import Masks, masks_of
from data.splits import Division, Draw
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import BelowOne, PathText, Seed

NORMAL = GOOD | {"inlier", "inliers"}
LAYOUT = (
    "expected overview, lock, ring or ring-surface with train/good, test/good and test/<label>, or good and <label>"
)


class Condition(Dataset):
    """One part (overview, lock, ring, ring-surface): good images to learn from, good and abnormal ones to test on.

    - `<root>/<part>/train/good/...`, `test/good/...`, `test/<label>/...`, perhaps with masks as for `MVTec`;
    - `<root>/<part>/good/...` and `<root>/<part>/<label>/...`: a share of the good images is tested on, and all others.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder of the parts.
        category: the part, for example ring; `ring_surface` is `ring-surface` too; several as lock,ring, or all.
        abnormal: labels to test on, as `worn,broken`; the others are left out; none: all.
        masks: `all` abnormal images must have one where there is a folder `ground_truth`, or `some`.
        test_fraction: share of the good images for testing, without a folder `train`; none: 0.2.
        split_seed: of that share; none: 0.
        splits, group: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: no such part, no good images or two folders of them, no abnormal ones, an unknown label, shares of a
            part that has folders for its splits, or a mask as for `MVTec`.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        abnormal: tuple[str, ...] | None = None,
        masks: Masks = "all",
        test_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        top = _part(Path(root), category)
        draw = Draw(test_fraction=test_fraction, split_seed=split_seed, splits=splits, group=group)
        found = good_and_others(root, top, split, LAYOUT, draw, abnormal)
        mask_of: dict[str, str | None] = {}
        if split == "test" and found.has_truth:
            defective = [path for path, defect in zip(found.paths, found.defects) if defect != "good"]
            mask_of = dict(zip(defective, masks_of(defective, top / "test", top / "ground_truth", masks)))
        files = [mask_of.get(path) for path in found.paths] if mask_of else None
        super().__init__(split, size, root, found.paths, defects=found.defects, masks=files)
        self.left_out, self.division = found.left_out, found.division
        self.drop_unreadable(on_error)

    @classmethod
    def categories(cls, **options) -> list[str]:
        """The folders that have `train`, or one of normal images."""
        names = _folders(Path(options["root"]))
        inside = {name: _folders(Path(options["root"], name)) for name in names}
        return [name for name in names if any(own == "train" or _plain(own) in NORMAL for own in inside[name])]


@dataclass
class Found:
    """Images of a split, in order of their labels."""

    paths: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)  # "good", or the name of the folder
    left_out: dict[str, int] = field(default_factory=dict)  # as of `Dataset`
    has_truth: bool = False  # whether there is a folder of masks
    division: Division | None = None


def good_and_others(
    root: PathText, top: Path, split: str, layout: str, draw: Draw, only: tuple[str, ...] | None = None
) -> Found:
    """Of a folder of normal images and one or more of others, with or without `train` and `test` above them.

    Args:
        layout: for messages, what is expected.
        draw: of the normal images, without `train`: which are tested on, with all others.
        only: names of the other folders to take; none: all.
    """
    truth, found = is_folder(top / "ground_truth"), Found()
    if is_folder(top / "train"):
        draw.refuse(f"{top} is divided by its folder train")
        if not is_folder(top / "test"):
            raise UserError(f"there is no folder {top / 'test'} beside train: {layout}")
        train, test = images_by_class(top / "train"), images_by_class(top / "test")
        train_good, good = (
            _normal(place, its, layout) for place, its in ((top / "train", train), (top / "test", test))
        )
        learned, tested = train[train_good], test.pop(good)
        others, found.has_truth = test, truth
        found.left_out["abnormal, in train"] = sum(map(len, train.values())) - len(learned)
        refuse_shared_folders(learned, [path for its in (tested, *others.values()) for path in its])
    else:
        others = images_by_class(top)
        if others.pop("ground_truth", None):
            raise UserError(f"{top} has masks, which need folders train and test: {layout}")
        normal, paths = _normal(top, others, layout), [path for its in others.values() for path in its]
        anomalous = [name != normal for name, its in others.items() for _ in its]
        found.division = draw.divide(root, paths, tested=anomalous, splits=("train", "test"))
        split_of = dict(zip(paths, found.division.splits))
        if draw.splits is not None:
            found.left_out[f"in no split of {draw.splits}"] = found.division.splits.count("")
        every = others.pop(normal)
        learned, tested = ([path for path in every if split_of[path] == its] for its in ("train", "test"))
        others = {name: [path for path in its if split_of[path] == "test"] for name, its in others.items()}
    if not others:
        raise UserError(f"{top} has good images and no others to tell from them: {layout}")
    if unknown := sorted({*(only or ())} - others.keys()):
        raise UserError(f"data.abnormal={','.join(unknown)} is no label of {top}; labels there: {', '.join(others)}")
    if split == "train":
        found.paths, found.defects = learned, ["good"] * len(learned)
        if not is_folder(top / "train"):
            found.left_out["kept for testing"] = len(tested)
        return found
    for name, paths in {"good": tested, **others}.items():
        if name != "good" and only and name not in only:
            found.left_out[f"of label {name}, not in data.abnormal"] = len(paths)
        else:
            found.paths += paths
            found.defects += [name] * len(paths)
    return found


def _normal(folder: Path, by_label: dict[str, list[str]], layout: str) -> str:
    """Which of the folders holds the normal images."""
    normal = [name for name in by_label if _plain(name) in NORMAL]
    if len(normal) != 1:
        names = first_few(by_label, 6)
        raise UserError(f"{folder} has {len(normal) or 'no'} folders of normal images, but {names}: {layout}")
    return normal[0]


def _part(root: Path, category: str) -> Path:
    names = _folders(root)
    same = [name for name in names if name == category] or [name for name in names if _plain(name) == _plain(category)]
    if not same:
        there = first_few(names, 6) or "none"
        raise UserError(f"data.category={category} is not in data.root={root}; folders there: {there}; {LAYOUT}")
    return root / same[0]


def _folders(top: Path) -> list[str]:
    return sorted(e.name for e in top.iterdir() if is_folder(e) and not is_junk(e.name)) if is_folder(top) else []


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
