"""A .pt2 file of task=export: a program that torch runs by itself, and what else predict.py and scavenge.py ask for.

    exported = load_exported("runs/patchcore/eval_export/detector.pt2")
    found = exported.examine_pixels(pixels)  # uint8 (B, 3, H, W)

Nothing here knows the classes that the program was made of: it loads where there is no models/. Other programs need
torch alone:

    about = {"scavenge.json": ""}
    program = torch.export.load("detector.pt2", extra_files=about).module()
    found = program(pixels)  # {"scores": (B,), "maps": (B, H, W), ...}

torch.export.load is not made for files from strangers: a program is code, and some of its parts may be pickles.
`require_plain` refuses what no file of task=export has, but that is no promise: load what you trust.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from data.batches import Answers, Findings
from data.geometry import Geometry
from evaluation.anomaly.prediction import calibration_of, require_calibration
from runtime.errors import UserError, cut
from runtime.files import open_regular
from runtime.integrity import damage

FORMAT = 1  # of what stands in ABOUT; another one is refused
ABOUT = "scavenge.json"  # in the archive's folder extra/
KINDS = ("backbone", "detector", "classifier")
ENDING = ".pt2"
PART = re.compile(
    r"archive_(format|version)|byteorder|\.data/(version|serialization_id)|models/model\.json|extra/scavenge\.json"
    r"|data/weights/model_weights_config\.json|data/constants/model_constants_config\.json|data/sample_inputs/model\.pt"
)
TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")  # raw numbers
# what a node may call, and what stands in sizes that depend on the batch: torch looks the first up and evaluates these
TARGETS = re.compile(r"torch\.ops\.aten\.(?!from_file|save)\w+\.\w+|_operator\.(?!call)\w+")
GUARDS = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] [=!<>]=? (\d+|L\['\w+'\]\.size\(\)\[\d+\])")
SIZES = re.compile(r"(Symbol|Integer|Add|Mul|Pow|positive|integer|True|'?[su]\d+'?|\d+|[\s(),=+*/-])*")


@dataclass(kw_only=True, repr=False, eq=False)
class Exported:
    """A program with the keys of a run's checkpoint that predict.py and scavenge.py read."""

    path: str
    kind: str  # of KINDS
    program: Callable[..., dict[str, Tensor]]  # images uint8 (B, 3, H, W), and where there is padding valid (B, H, W)
    geometry: Geometry  # how files become its images; with tiles `size` is a tile's
    masked: bool  # whether it takes `valid`
    state: dict  # config (data.tile, data.overlap, precision), calibration, names or classes

    @torch.no_grad()
    def __call__(self, pixels: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """What the program returns."""
        if not self.masked:
            return self.program(pixels)
        whole = pixels.new_ones(len(pixels), *pixels.shape[2:], dtype=torch.bool)  # (B, H, W)
        return self.program(pixels, whole if valid is None else valid)

    def examine_pixels(self, pixels: Tensor, valid: Tensor | None = None) -> Findings:
        """As the detector's."""
        found = self(pixels, valid)
        return Findings(found["scores"], found.get("maps"), found.get("peaks"), found.get("nearest_image"))

    def answering(self, *_: object) -> Callable[[Tensor], Answers]:
        """As the classifier's, whose loss, temperature and bank are in the program."""

        def answer(pixels: Tensor) -> Answers:
            found = self(pixels)
            return Answers(found["logits"], found["probabilities"], found["scores"])

        return answer


def is_exported(path: str | Path) -> bool:
    return str(path).endswith(ENDING) and not Path(path).is_dir()


def about_file(kind: str, masked: bool, geometry: Geometry, state: dict) -> str:
    """What stands in ABOUT: those of an `Exported`, and the versions."""
    versions = {"format": FORMAT, "torch": torch.__version__}
    parts = {"kind": kind, "masked": masked, "geometry": asdict(geometry), "state": state}
    return json.dumps(versions | parts, allow_nan=False)


def load_exported(path: str | Path, *kinds: str, category: str | None = None) -> Exported:
    """The program in a file of task=export, on the CPU.

    Args:
        kinds: it must be of one of them. category: of a detector of several, whose thresholds count.

    Raises:
        UserError: no such file, another kind of file or of program, a damaged one, one of another version.
    """
    try:
        with open_regular(path) as file:
            if wrong := damage(path, contents=True):  # which torch's reader does not notice
                raise UserError(f"{path} {wrong}: export it again")
            parts = parts_of(file)
            about = about_in(parts, path)
            if about["kind"] not in kinds:
                raise UserError(f"{path} is an exported {about['kind']}, not a {' or a '.join(kinds)}")
            require_plain(parts, path)
            exported = _loaded(file, about, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except Exception as error:  # of whatever is damaged
        why = cut(" ".join(str(error).split()), 80)
        raise UserError(f"{path} is no {ENDING} file or is damaged ({why}): export it again") from None
    if exported.kind == "detector":
        require_calibration(exported.state, Path(path))
        exported.state["calibration"] = calibration_of(exported.state, category, Path(path))
    return exported


def parts_of(file: IO[bytes]) -> dict[str, bytes]:
    """The parts of the archive by their names; those of the tensors are left empty."""
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        return {part: b"" if TENSOR.fullmatch(part) else archive.read(name) for part, name in names.items()}


def about_in(parts: dict[str, bytes], path: str | Path) -> dict[str, Any]:
    """What the file says of itself.

    Raises:
        UserError: it is none of task=export, or of another version.
    """
    about = json.loads(parts.get(f"extra/{ABOUT}", b"{}"))
    if about.get("kind") not in KINDS:
        raise UserError(f"{path} was not written by eval.py task=export, so what it takes and gives is not known")
    if about.get("format") != FORMAT:
        here = f"its format is {about.get('format')}, here it is {FORMAT}"
        raise UserError(f"{path} was exported by another version of the code ({here}): export it again")
    return about


def require_plain(parts: dict[str, bytes], path: str | Path) -> None:
    """UserError if the archive has parts or calls that task=export does not write, pickles of objects above all."""

    def refuse(what: str) -> None:
        raise UserError(f"{path} holds {cut(what)}, which could run code and which task=export does not write: refused")

    for name in parts:
        if not PART.fullmatch(name) and not TENSOR.fullmatch(name):
            refuse(name)
    for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        if any(meta["use_pickle"] for meta in json.loads(parts[name])["config"].values()):
            refuse("pickled tensors")
    try:
        torch.load(io.BytesIO(parts["data/sample_inputs/model.pt"]), weights_only=True)
    except Exception:  # for which torch.export.load would try again without weights_only
        refuse("a pickle as its sample inputs")
    for key, text in texts(json.loads(parts["models/model.json"])):
        if key == "target" and not TARGETS.fullmatch(text):
            refuse(f"a call of {text}")
        if key == "guards_code" and not GUARDS.fullmatch(text):
            refuse(f"the condition {text}")
        if key == "expr_str" and not SIZES.fullmatch(text):
            refuse(f"the expression {text}")


def texts(value: Any, key: str = "") -> list[tuple[str, str]]:
    """All texts in a JSON value, each with the key it stands under."""
    if isinstance(value, dict):
        return [found for name, each in value.items() for found in texts(each, name)]
    if isinstance(value, list):
        return [found for each in value for found in texts(each, key)]
    return [(key, value)] if isinstance(value, str) else []


def _loaded(file: IO[bytes], about: dict[str, Any], path: str | Path) -> Exported:
    file.seek(0)
    try:
        program = torch.export.load(file).module()
        kept = {key: about[key] for key in ("kind", "masked", "state")}
        return Exported(path=str(path), program=program, geometry=Geometry(**about["geometry"]), **kept)
    except Exception as error:  # torch raises whatever its reader meets
        versions = f"exported with torch {cut(str(about.get('torch')), 30)}, here is {torch.__version__}"
        why = cut(" ".join(str(error).split()), 100)
        raise UserError(f"torch cannot load {path} ({versions}): {why}; export it again with this torch") from None
