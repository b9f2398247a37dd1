"""Sections as a page for people (report.html, one file), as Markdown, as PNG sheets and in TensorBoard."""

import re
from pathlib import Path

from torchvision.transforms.functional import pil_to_tensor

from evaluation.dataset.section import Chart, Gallery, Problem, Section, Table
from evaluation.tables import markdown_table
from plots.heatmaps import save, to_pil
from plots.page import page, safe, table, uri
from plots.sheets import contact_sheet
from runtime.files import whole_file
from runtime.log import Log
from runtime.text import printable

INLINE = 12 * 2**20  # bytes of images within report.html; further ones are only in sheets/
NONE = "Nothing suspicious was found."
WEIGHTS = {"error": "Error", "warning": "Warning", "note": "Note"}
STYLE = """
ul.problems { list-style: none; padding: 0; margin: 14px 0 }
.problems li { display: flex; padding: 7px 12px; margin: 5px 0; border-left: 5px solid #08519c; background: #f6f6f6;
  overflow-wrap: anywhere }
.problems b { flex: 0 0 84px } .problems li.error { border-color: #be1e1e; background: #fcefef }
.problems li.warning { border-color: #e69f00 } .problems li.note { border-color: #9aa4ad }
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
    links = "".join(f'<a href="#{section.key}">{safe(section.title)}</a>' for section in sections)
    items = "".join(f'<li class="{p.weight}"><b>{WEIGHTS[p.weight]}</b> {safe(p.text)}</li>' for p in problems)
    body = [f'<ul class="problems">{items or f"<li>{NONE}</li>"}</ul><nav>{links}</nav>']
    for section in sections:
        body.append(f'<h2 id="{section.key}">{safe(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, str):
                body.append(f"<p>{safe(part)}</p>")
            elif isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Chart):
                body.append(part.svg)
            else:
                tiles = _tiles(part)
                if len(tiles) > room:
                    tiles = f"<p>in {safe(sheets[id(part)])}, for this page would be too large</p>"
                room -= len(tiles)
                body.append(f'<h3>{safe(part.title)} <span class="soft">{safe(part.note)}</span></h3>{tiles}')
    return page(title, about, "".join(body), STYLE)


def _table(part: Table) -> str:
    title = f"<h3>{safe(part.title)}</h3>" if part.title else ""
    return title + table(part.header, part.rows, "texts" if part.texts else "")


def _tiles(gallery: Gallery) -> str:
    figures = []
    for caption, image in gallery.tiles:
        inside = f'<img src="{uri(to_pil(image))}" alt=""><figcaption>{safe(caption)}</figcaption>'
        figures.append(f'<figure style="width:{max(image.shape[2], 100)}px">{inside}</figure>')
    return f'<div class="tiles">{"".join(figures)}</div>'
