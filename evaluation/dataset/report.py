"""Sections as a page for people (report.html, one file), as Markdown, as PNG sheets and in TensorBoard."""

import base64
import io
import re
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from evaluation.dataset.section import Chart, Gallery, Problem, Section, Table
from evaluation.tables import markdown_table
from plots.heatmaps import save
from plots.sheets import contact_sheet
from runtime.files import whole_file
from runtime.log import Log
from runtime.text import printable

INLINE = 12 * 2**20  # bytes of images within report.html; further ones are only in sheets/
NONE = "Nothing suspicious was found."
WEIGHTS = {"error": "Error", "warning": "Warning", "note": "Note"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #191919; background: #fff; max-width: 1080px; margin: 24px auto;
  padding: 0 20px }
h1 { font-size: 25px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 36px 0 8px; border-top: 1px solid #e2e2e2; padding-top: 14px }
h3 { font-size: 16px; margin: 20px 0 6px; overflow-wrap: anywhere }
nav a { margin-right: 16px } a { color: #08519c } .soft { color: #6e6e6e; font-weight: normal }
ul.problems { list-style: none; padding: 0; margin: 14px 0 }
.problems li { display: flex; padding: 7px 12px; margin: 5px 0; border-left: 5px solid #08519c; background: #f6f6f6;
  overflow-wrap: anywhere }
.problems b { flex: 0 0 84px } .problems li.error { border-color: #be1e1e; background: #fcefef }
.problems li.warning { border-color: #e69f00 } .problems li.note { border-color: #9aa4ad }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 8px 0 }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid #e2e2e2 }
th { color: #6e6e6e; font-weight: 500 } td { overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left } table.texts td, table.texts th { text-align: left }
.tiles { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0 }
figure img { display: block; outline: 1px solid #e2e2e2 }
figcaption { font-size: 11px; color: #6e6e6e; overflow-wrap: anywhere; white-space: pre-line }
svg { display: block; max-width: 100%; height: auto; margin: 10px 0 }
"""


def write(sections: list[Section], title: str, about: str, folder: Path, log: Log) -> None:
    """report.html, report.md and sheets/*.png into the run folder, and TensorBoard's texts and images.

    about: a line below the title.
    """
    problems = sorted_problems(sections)
    sheets = _sheets(sections, folder, log)
    with whole_file(folder / "report.html") as file:
        file.write(html(sections, problems, title, about, sheets))
    text = markdown(sections, problems, title, about, sheets)
    with whole_file(folder / "report.md") as file:
        file.write(text)
    log.text("data", text)


def sorted_problems(sections: list[Section]) -> list[Problem]:
    """The worst first, else in the order of the sections."""
    order = list(WEIGHTS)
    return sorted((p for section in sections for p in section.problems), key=lambda p: order.index(p.weight))


def _sheets(sections: list[Section], folder: Path, log: Log) -> dict[int, str]:
    """Draw each gallery; {id of the gallery: its file below the folder}."""
    files = {}
    for old in (folder / "sheets").glob("*.png"):  # of an earlier look, which may have drawn others
        old.unlink()
    for section in sections:
        for number, part in enumerate(p for p in section.parts if isinstance(p, Gallery)):
            name = re.sub(r"[^\w.-]+", "_", printable(part.title))[:60]
            files[id(part)] = f"sheets/{section.key}_{number:02d}_{name}.png"
            sheet = contact_sheet(part.tiles, f"{part.title}: {part.note}" if part.note else part.title)
            save(sheet, folder / files[id(part)])
            log.image(f"data/{section.key}/{part.title}", pil_to_tensor(sheet))
    return files


def markdown(sections: list[Section], problems: list[Problem], title: str, about: str, sheets: dict[int, str]) -> str:
    lines = [f"# {title}", about, "\n".join(f"- **{WEIGHTS[p.weight]}**: {p.text}" for p in problems) or NONE]
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, Table):
                rows = [[cell.replace("|", "\\|") for cell in row] for row in part.rows]
                lines += [f"**{part.title}**"] * bool(part.title) + [markdown_table(part.header, rows).strip()]
            elif isinstance(part, Gallery):
                lines.append(f"{part.title}: {part.note}: [{sheets[id(part)]}]({sheets[id(part)]})")
    return printable("\n\n".join(lines)) + "\n"


def html(sections: list[Section], problems: list[Problem], title: str, about: str, sheets: dict[int, str]) -> str:
    """One page that needs nothing else: no script, images as data URIs."""
    room = INLINE
    links = "".join(f'<a href="#{section.key}">{_safe(section.title)}</a>' for section in sections)
    items = "".join(f'<li class="{p.weight}"><b>{WEIGHTS[p.weight]}</b> {_safe(p.text)}</li>' for p in problems)
    body = [f'<ul class="problems">{items or f"<li>{NONE}</li>"}</ul><nav>{links}</nav>']
    for section in sections:
        body.append(f'<h2 id="{section.key}">{_safe(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, str):
                body.append(f"<p>{_safe(part)}</p>")
            elif isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Chart):
                body.append(part.svg)
            else:
                tiles = _tiles(part)
                if len(tiles) > room:
                    tiles = f"<p>in {_safe(sheets[id(part)])}, for this page would be too large</p>"
                room -= len(tiles)
                body.append(f'<h3>{_safe(part.title)} <span class="soft">{_safe(part.note)}</span></h3>{tiles}')
    head = f'<meta charset="utf-8"><title>{_safe(title)}</title><style>{STYLE}</style>'
    top = f'<h1>{_safe(title)}</h1><div class="soft">{_safe(about)}</div>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{top}{"".join(body)}</body></html>\n'


def _table(table: Table) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    title = f"<h3>{_safe(table.title)}</h3>" if table.title else ""
    kind = ' class="texts"' if table.texts else ""
    return f'{title}<div class="wide"><table{kind}><tr>{head}</tr>{rows}</table></div>'


def _tiles(gallery: Gallery) -> str:
    figures = []
    for caption, image in gallery.tiles:
        inside = f'<img src="{_uri(image)}" alt=""><figcaption>{_safe(caption)}</figcaption>'
        figures.append(f'<figure style="width:{max(image.shape[2], 100)}px">{inside}</figure>')
    return f'<div class="tiles">{"".join(figures)}</div>'


def _uri(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=85)  # (h, w, 3)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _safe(text: str) -> str:
    return escape(printable(text))
