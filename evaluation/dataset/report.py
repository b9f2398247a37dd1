"""Sections as report.md, report.html and in results.json."""

from pathlib import Path

from evaluation.dataset.section import Section
from runtime.files import whole_file


def write(sections: list[Section], title: str, folder: Path) -> None:
    with whole_file(folder / "report.md") as file:
        file.write(f"# {title}\n\n" + "\n\n".join(f"## {section.title}" for section in sections) + "\n")
