"""What task=robustness shows: tables, curves over severity, one image under all corruptions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.corruptions import BENCHMARK
from evaluation.inspect.corruption_error import mean_of
from evaluation.tables import csv_table, markdown_table
from plots.heatmaps import save
from plots.severity import severity_image
from plots.sheets import contact_sheet
from runtime.files import whole_file
from runtime.log import Log

SIDE, COLUMNS = 128, 10  # pixels of an image of the sheet, and about how many in a row
RATIOS = {"mce": "mCE", "relative_mce": "relative mCE"}

Row = dict[str, Any]


def write_report(log: Log, results: dict[str, Any], sheet: list[tuple[str, Tensor]]) -> None:
    """robustness.csv, robustness.md, robustness.png, corrupted.png, TensorBoard and the terminal; for rank 0.

    Args:
        results: those of the task.
        sheet: captions and images uint8 (3, H, W).
    """
    kind, clean, rows, severities = (results[key] for key in ("kind", "clean", "rows", "severities"))
    text = f"{corruption_table(kind, clean, rows, severities)}\n{in_words(results)}\n"
    log.text("robustness", text)
    log.say(text)
    by_severity(log, kind, clean, rows, severities)
    write(log.folder / "robustness.md", text)
    write(log.folder / "robustness.csv", csv_table([flat(row) for row in [clean, *rows]]))
    title = f"{log.folder.parent.name}: errors under corruptions"
    tiles = [(caption, sized(image)) for caption, image in sheet]
    across = max(1, COLUMNS // len(severities))  # corruptions in a row
    drawn = {
        "robustness": severity_image(panels(kind, clean, rows), [0, *severities], title, "severity 0: as it is"),
        "corrupted": contact_sheet(tiles, "One image under all corruptions", columns=across * len(severities)),
    }
    for key, image in drawn.items():
        save(image, log.folder / f"{key}.png")
        log.image(f"robustness/{key}", pil_to_tensor(image))


def in_words(results: dict[str, Any]) -> str:
    """What stands below the table."""
    lines = [
        f"Error: {results['measure']}. Clean {shown(results['clean_error'])}, corrupted "
        f"{shown(results['corrupted_error'])} (mean of {len(results['corruptions_in_mean'])} corruptions of the "
        f"benchmark at severities {', '.join(map(str, results['severities']))})."
    ]
    if results["reference"] is not None:
        ratios = ", ".join(f"{text} {shown(results[key])}" for key, text in RATIOS.items())
        lines.append(f"By the errors of {results['reference']}: {ratios}.")
    for row in results["shifts"]:
        lines.append(f"Shifted by {row['shift']} pixels: {steadiness(row)}.")
    if frames := results["frames"]:
        others = frames["cosine_of_any_two"]
        beside = "" if others is None else f", of any two images {others:.3f}"
        lines.append(f"{frames['pairs']} pairs of neighboring frames: {steadiness(frames)}{beside}.")
    return "\n".join(lines)


def steadiness(row: Row) -> str:
    parts = [f"{row['changed']:.1%} of decisions change"] if row["changed"] is not None else []
    return ", ".join(parts + ([] if row["cosine"] is None else [f"cosine of the embeddings {row['cosine']:.3f}"]))


def write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def by_severity(log: Log, kind: str, clean: Row, rows: list[Row], severities: list[int]) -> None:
    """TensorBoard's curves, whose step is the severity."""
    columns = {"error": "robustness/"} | ({"false_alarms": "robustness/false_alarms_"} if kind == "detector" else {})
    names = dict.fromkeys(row["corruption"] for row in rows)
    (log.folder / "metrics.jsonl").unlink(missing_ok=True)  # a log keeps step 0, here that of a measurement before
    for severity in (0, *severities):
        found = {row["corruption"]: row for row in rows if row["severity"] == severity} or dict.fromkeys(names, clean)
        log.scalars(
            severity, {f"{start}{name}": row[key] for key, start in columns.items() for name, row in found.items()}
        )


def panels(kind: str, clean: Row, rows: list[Row]) -> dict[str, dict[str, list[float | None]]]:
    """What `severity_image` draws of each corruption, from severity 0 on."""
    lines = {"error": "1 - image AUROC", "false_alarms": "false-alarm rate"} if kind == "detector" else {}
    lines = lines or {"error": "share of wrong classes"}
    found: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        own = found.setdefault(row["corruption"], {text: [clean[key]] for key, text in lines.items()})
        for key, text in lines.items():
            own[text].append(row[key])
    return found


def corruption_table(kind: str, clean: Row, rows: list[Row], severities: list[int]) -> str:
    """Markdown: a row per corruption, and above them the images as they are."""
    columns = {"error": "error"}
    if kind == "detector":
        columns = {"image_auroc": "AUROC", "false_alarms": "false alarms", "detections": "found"}
    further = {} if kind == "detector" else {"cosine": "cosine", "changed": "changed"}
    header = ["corruption", *(f"{text} {s}" for text in columns.values() for s in severities)]
    header += [f"{text}, mean" for text in {"error": "error"} | {key: key for key in further}]
    lines = [["none", *(shown(clean[key]) for key in columns for _ in severities), shown(clean["error"])]]
    lines[0] += ["-"] * len(further)
    own: dict[str, list[Row]] = {}
    for row in rows:
        own.setdefault(row["corruption"], []).append(row)
    for name, cells in own.items():
        line = [name, *(shown(cell[key]) for key in columns for cell in cells)]
        lines.append(line + [shown(mean_of([cell[key] for cell in cells])) for key in ("error", *further)])
    benchmark = [cells for name, cells in own.items() if name in BENCHMARK]
    if len(benchmark) > 1:
        each = list(zip(*benchmark))  # of each severity the rows of all corruptions
        line = [f"mean of the benchmark's {len(benchmark)}"]
        line += [shown(mean_of([cell[key] for cell in cells])) for key in columns for cells in each]
        all_of_them = [cell for cells in benchmark for cell in cells]
        lines.append(line + [shown(mean_of([cell[key] for cell in all_of_them])) for key in ("error", *further)])
    return markdown_table(header, lines)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def flat(row: Row) -> Row:
    """The row with each interval as two columns, `..._low` and `..._high`."""
    cells: Row = {}
    for key, value in row.items():
        if key.endswith("interval"):
            low, high = value or (None, None)
            cells |= {f"{key.removesuffix('interval')}low": low, f"{key.removesuffix('interval')}high": high}
        else:
            cells[key] = value
    return cells


def sized(image: Tensor) -> Tensor:
    """An image uint8 (3, H, W) whose longer side has about `SIDE` pixels: small ones get larger pixels."""
    longest = max(image.shape[1:])
    if longest <= SIDE // 2:
        return image.repeat_interleave(SIDE // longest, 1).repeat_interleave(SIDE // longest, 2)
    if longest <= SIDE:
        return image
    size = [max(1, round(side * SIDE / longest)) for side in image.shape[1:]]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)
