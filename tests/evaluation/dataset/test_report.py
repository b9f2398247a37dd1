"""The page needs nothing else, stays of a bounded size, and escapes what names hold."""

import re
from html.parser import HTMLParser

import torch

from evaluation.dataset import report
from evaluation.dataset.section import Chart, Gallery, Problem, Section, Table
from plots.bars import bars_svg
from runtime.log import Log


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def tiles(n):
    pixels = torch.randint(0, 256, (n, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [(f"{i}<b>\udcff.png\n0.{i}", image) for i, image in enumerate(pixels)]


def sections():
    odd = "<script>alert(1)</script> | \udcff"
    first = Section("first", "First", {"n": 1}, [Problem("note", "a note"), Problem("error", odd)])
    first.parts += [odd, Table(["name", "n"], [[odd, "1"]], title=odd), Gallery(odd, tiles(3), "some")]
    second = Section("second", "Second", {}, [Problem("warning", "a warning")])
    second.parts += [Chart(bars_svg(odd, {odd: [1]}, ["train"])), Gallery("all", tiles(2))]
    return [first, second]


def written(tmp_path):
    log = Log(tmp_path, {})
    report.write(sections(), "A set", "about it", tmp_path, log)
    log.results({})
    return (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()


def test_one_file_with_all_in_it(tmp_path):
    html, markdown = written(tmp_path)
    page = Page(html)
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    assert [about["src"][:23] for tag, about in page.tags if tag == "img"] == ["data:image/jpeg;base64,"] * 5
    targets = [about.get(key, "") for _, about in page.tags for key in ("src", "href")]
    assert all(target[:1] in ("", "#") or target.startswith("data:image/jpeg") for target in targets)
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", html)
    assert page.text.index("<script>") < page.text.index("a warning") < page.text.index("a note")
    files = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert len(files) == 2 and all(f"sheets/{name}" in markdown for name in files)
    assert "\\| \\xff" in markdown  # within a cell


def test_the_page_has_a_bounded_size(tmp_path, monkeypatch):
    whole, _ = written(tmp_path / "a")
    first, second = (len(report._tiles(part)) for s in sections() for part in s.parts if isinstance(part, Gallery))
    monkeypatch.setattr(report, "INLINE", first + second - 1)
    small, _ = written(tmp_path / "b")
    assert [len(re.findall("<img", page)) for page in (whole, small)] == [5, 3]
    assert "sheets/" in small and "sheets/" not in whole  # where the others are


def test_nothing_is_wrong():
    text = report.html([Section("a", "A")], [], "A set", "", {})
    assert report.NONE in text and report.NONE in report.markdown([], [], "A set", "", {})
