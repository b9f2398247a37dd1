"""The detector, classifier or backbone of a run as a program that torch runs without this code.

    python eval.py task=export checkpoint=runs/patchcore_own
    python predict.py runs/patchcore_own/eval_export/detector.pt2 images/ out=results/

The program takes uint8 images of the run's size in batches of any size; docs/usage.md says what is in it. What it says
of images of the run's test set is compared with what the run says, one by one, in twos and in batches: all decisions
must be equal, and scores, maps, probabilities and features agree to 1e-4. Else one line names an image, and no file is
written. Runs on the CPU. Writes <kind>.pt2, results.json and TensorBoard events to eval_export/ in the checkpoint's
folder.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from evaluation.export.agreement import compare, images_of, subject_of
from evaluation.export.exported import Exported, load_exported
from evaluation.export.programs import require_onnx, traced, write, write_onnx
from evaluation.frozen import folder_beside
from evaluation.tables import markdown_table
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.files import whole_file
from runtime.log import Log
from runtime.values import PathText, PositiveInt
from runtime.version import another_version, code_version


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    checkpoint: PathText  # last.pt of a run, or its folder
    format: Literal["pt2", "onnx"] = "pt2"  # onnx needs packages of its own, and predict.py does not read it
    threshold: float | None = None  # of the score; none: the run's own
    images: PathText | None = None  # folder or file to compare on; none: the run's test set
    n_images: PositiveInt = 64  # of them, spread evenly
    batch_size: PositiveInt = 16  # the largest of those compared


def run(cfg: Config) -> None:
    distributed.setup("cpu")
    if distributed.world_size() > 1:
        raise UserError("task=export works in one process: start it without torchrun")
    if cfg.format == "onnx":
        require_onnx()
    file = checkpoint.file_of(cfg.checkpoint)
    subject = subject_of(cfg.checkpoint, cfg.threshold)
    images = images_of(subject, cfg.images, cfg.n_images)
    folder = folder_beside(file, "export")
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    if other := another_version(subject.state.get("version"), with_script=False):
        log.say(f"warning: {cfg.checkpoint} was made by {other}; what this code makes of it is exported")

    place, batch_sizes = folder / f"{subject.kind}.{cfg.format}", sorted({1, 2, cfg.batch_size})
    program = traced(subject.program, subject.size, masked=subject.masked)
    about = {"kind": subject.kind, "geometry": subject.geometry, "masked": subject.masked, "state": subject.kept}
    with whole_file(place, "wb", durable=True) as opened:
        if cfg.format == "pt2":
            write(program, about, opened)
            exported = load_exported(opened.name, subject.kind)
        else:
            exported = Exported(path=str(place), program=write_onnx(program, opened), **about)
        found = compare(subject, exported, images, batch_sizes)

    size = place.stat().st_size
    rows = [[name, f"{away:.1e}"] for name, away in found.largest.items()]
    table = markdown_table(["value", "largest difference"], rows)
    log.text("export", table)
    decided = f": all {found.decisions} decisions are equal" if found.decisions else ""
    on = f"{len(images)} images in batches of {', '.join(map(str, batch_sizes))}"
    log.say(f"{place}: {size / 1e6:.1f} MB, compared on {on}{decided}\n{table}")
    results = {"task": "export", "kind": subject.kind, "file": str(place), "bytes": size, "images": len(images)}
    log.results(results | {"batch_sizes": batch_sizes} | asdict(found) | {"version": code_version()})
