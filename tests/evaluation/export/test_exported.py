"""What an exported file holds, that torch alone runs it, and which files are refused."""

import io
import json
import re
import struct
import zipfile
from dataclasses import asdict

import pytest
import torch

from data.geometry import Geometry
from data.normalize import normalize
from evaluation.export.exported import ABOUT, GUARDS, SIZES, TARGETS, is_exported, load_exported
from evaluation.export.programs import DetectorProgram, traced, write
from models.anomaly.embedding import Embedding
from runtime.errors import UserError
from tests.images import batches
from tests.networks import FourStages

GEOMETRY = Geometry(32, 32, resample="bicubic", white=4095)
CALIBRATION = {"threshold": 0.25, "pixel_threshold": None, "low": None, "high": None, "scores": [0.1, 0.2]}
STATE = {
    "config": {"precision": "fp32", "data": {"tile": 0, "overlap": 64}},
    "calibration": CALIBRATION,
    "names": [f"{i}.png" for i in range(6)],
    "learned": [],
}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    detector = Embedding(FourStages())
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    detector.fit(batches(normalize(images), 3), 6)
    return detector


@pytest.fixture(scope="module")
def file(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "detector.pt2"
    with open(path, "wb") as opened:
        about = {"kind": "detector", "masked": False, "geometry": GEOMETRY, "state": STATE}
        write(traced(DetectorProgram(detector, "fp32"), GEOMETRY, masked=False), about, opened)
    return path


def test_the_file_says_what_the_detector_says(detector, file):
    exported = load_exported(file, "detector")
    assert (exported.kind, exported.geometry, exported.masked) == ("detector", GEOMETRY, False)
    assert exported.state == STATE and is_exported(file) and not is_exported(file.parent)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    live = detector.examine_pixels(images)
    for first in (0, 1, 2, 6):
        found = exported.examine_pixels(images[first:])
        assert torch.allclose(found.scores, live.scores[first:], rtol=1e-5) and not found.scores.requires_grad
        assert torch.equal(found.nearest_image, live.nearest_image[first:])
        assert found.maps is found.peaks is None


def test_torch_alone_runs_it(detector, file):
    about = {ABOUT: ""}
    program = torch.export.load(file, extra_files=about).module()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(program(images)["scores"], detector.examine_pixels(images).scores, rtol=1e-5)
    assert json.loads(about[ABOUT])["geometry"] == asdict(GEOMETRY)
    with zipfile.ZipFile(file) as archive:
        (model,) = (archive.read(name) for name in archive.namelist() if name.endswith("model.json"))
    assert b"stack_trace" not in model or b".py" not in model  # no paths of this machine


def changed(file, place, part: str, change) -> str:
    """A copy in which the bytes of a part are `change` of those before; a part that is not there is added."""
    path = place / "changed.pt2"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        root, found = old.namelist()[0].partition("/")[0], f"/{part}" in [n[n.index("/") :] for n in old.namelist()]
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == f"{root}/{part}" else content)
        if not found:
            new.writestr(f"{root}/{part}", change(b""))
    return str(path)


RAN: list[int] = []


class Harmful:
    def __reduce__(self):
        return RAN.append, (1,)


def pickled(_: bytes) -> bytes:
    out = io.BytesIO()
    torch.save({"x": Harmful()}, out)
    return out.getvalue()


def in_about(**values):
    return lambda content: json.dumps(json.loads(content) | values).encode()


REFUSED = {
    "another format": (
        f"extra/{ABOUT}",
        in_about(format=2),
        "another version of the code (its format is 2, here it is 1",
    ),
    "no kind": (f"extra/{ABOUT}", in_about(kind="x"), "was not written by eval.py task=export"),
    "no object": (f"extra/{ABOUT}", lambda _: b"{", "is no .pt2 file or is damaged"),
    "no geometry": (f"extra/{ABOUT}", in_about(geometry={"height": 0, "width": 1}), "torch cannot load"),
    "no threshold": (f"extra/{ABOUT}", in_about(state=STATE | {"calibration": {}}), "calibration.threshold is missing"),
    "libraries": ("data/aotinductor/model/x.so", lambda _: b"", "data/aotinductor/model/x.so, which could run code"),
    "a pickle of inputs": ("data/sample_inputs/model.pt", pickled, "a pickle as its sample inputs"),
    "a pickle of weights": (
        "data/weights/model_weights_config.json",
        lambda content: content.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
            b'"use_pickle":false', b'"use_pickle":true'
        ),
        "pickled tensors",
    ),
    "another call": (
        "models/model.json",
        lambda content: re.sub(rb"torch\.ops\.aten\.\w+\.\w+", b"torch.os.system", content, count=1),
        "a call of torch.os.system",
    ),
    "code as a size": (
        "models/model.json",
        lambda content: re.sub(rb'("expr_str":\s*")[^"]*', rb"\1__import__('os').getcwd()", content, count=1),
        "the expression __import__('os').getcwd()",
    ),
    "code as a condition": (
        "models/model.json",
        lambda content: json.dumps(json.loads(content) | {"guards_code": ["print(1)"]}).encode(),
        "the condition print(1)",
    ),
    "cut": ("models/model.json", lambda content: content[:100], "is no .pt2 file or is damaged"),
}


@pytest.mark.parametrize(("part", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_other_contents_are_refused_in_one_line(part, change, message, file, tmp_path):
    path = changed(file, tmp_path, part, change)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_exported(path, "detector")
    assert path in str(caught.value) and "\n" not in str(caught.value) and RAN == []


def test_a_flipped_bit_is_noticed(file, tmp_path):
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        (weight,) = (info for info in archive.infolist() if info.filename.endswith("/weight_3"))
    name, extra = struct.unpack_from("<HH", content, weight.header_offset + 26)  # lengths, of the local header
    content[weight.header_offset + 30 + name + extra + 5] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped.pt2"):
        load_exported(tmp_path / "flipped.pt2", "detector")


def test_other_files_and_kinds_are_refused_in_one_line(file, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_exported(tmp_path / "none.pt2", "detector")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(UserError, match="file or is damaged"):
        load_exported(tmp_path / "text.pt2", "detector")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("other/archive_version", "0")
    with pytest.raises(UserError, match="was not written by"):
        load_exported(tmp_path / "other.pt2", "detector")
    with pytest.raises(UserError, match="is an exported detector, not a backbone or a classifier"):
        load_exported(file, "backbone", "classifier")
    with pytest.raises(UserError, match="category=x has no thresholds in"):
        load_exported(file, "detector", category="x")


def test_only_sizes_and_plain_operations_pass():
    assert TARGETS.fullmatch("torch.ops.aten.add.Tensor") and TARGETS.fullmatch("_operator.getitem")
    for call in (
        "torch.load",
        "torch.ops.aten.from_file.default",
        "_operator.call",
        "torch.ops.load_library",
        "math.e",
    ):
        assert not TARGETS.fullmatch(call)
    assert SIZES.fullmatch("Mul(Integer(16), Symbol('s34', positive=True, integer=True))") and SIZES.fullmatch("64*s0")
    for text in ("open('x')", "s0.__class__", "eval('s0')", "exit()"):
        assert not SIZES.fullmatch(text)
    assert GUARDS.fullmatch("L['pixels'].size()[0] == L['valid'].size()[0]") and not GUARDS.fullmatch("exit()")
