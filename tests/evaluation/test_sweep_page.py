"""The page of a sweep is one file that needs nothing else, holds any names, and shows what is in the run folders."""

import csv
import itertools
import re
import shutil
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import sweep_page
from evaluation.sweep_page import GRID, best_first, mean_roc, points, ranked, write_page
from evaluation.sweep_table import Axes, Outcome, write_tables
from plots.heatmaps import GAP, TILE, Caption, Row, last_rows, sheet
from tests.evaluation.dataset.test_report import Page

ODD = '<script>alert("1")</script>&\udcff'
AXES = Axes(["part", ODD], {"a": [], "b": []}, {"random": [], ODD: [], "mine": []}, [0, 1])
VALUES = {"random": (0.6, 0.7), ODD: (0.9, 0.98), "mine": (0.5, 0.55)}  # image AUROC of each seed


def write_scores(folder, labels, scores):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "test_scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "score"])
        writer.writerows((f"{i}.png", int(label), score) for i, (label, score) in enumerate(zip(labels, scores)))


def write_sheet(folder, rows=5):
    pixels = torch.randint(0, 256, (rows, 3, 40, 40), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    captions = [Caption(i, "correct", [], True) for i in range(rows)]
    drawn = [Row(image, image[0].float(), None, None, caption) for image, caption in zip(pixels, captions)]
    paper = sheet(drawn, low=0.0, high=255.0, pixel_threshold=None, title="t")
    folder.mkdir(parents=True, exist_ok=True)
    paper.save(folder / "heatmaps.png")
    return paper


def outcomes_in(folder) -> dict[str, Outcome]:
    """Of two tasks, two detectors, three pretrainings and two seeds; `mine` is trained here, and fails for ODD/b."""
    found = {}
    write_sheet(folder, 1)
    for seed in (0, 1):
        run = folder / f"pretraining/mine/seed{seed}"
        run.mkdir(parents=True)
        lines = ['{"step": 1, "loss": 3}', "not JSON", '{"step": 2, "loss": 1.5, "knn20_top1": 0.5}']
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": "nan"}']))
        found[f"pretraining/mine/seed{seed}"] = Outcome({"method": "simclr", "loss": 1.5}, {})
    for task in AXES.tasks:
        for detector in AXES.detectors:
            for name, values in VALUES.items():
                for seed, value in enumerate(values):
                    cell = f"{task}/{detector}/{name}/seed{seed}"
                    place = folder / cell
                    place.mkdir(parents=True)
                    results = {"image_auroc": value + 0.01 * (detector == "b")}
                    if (task, detector, name) == (ODD, "b", "mine"):
                        results = {"error": "ValueError: <b>no & yes</b>"}
                    found[cell] = Outcome(results, {})
                    write_scores(place, [0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8])
            shutil.copy(folder / "heatmaps.png", folder / f"{task}/{detector}/{ODD}/seed0")
    return found


@pytest.fixture
def made(tmp_path):
    return tmp_path, outcomes_in(tmp_path)


WON = {("part", "a", "image_auroc"): ODD}


def test_one_file_that_holds_any_names(made):
    folder, outcomes = made
    write_page(folder, f"grid {ODD}", AXES, outcomes, ["image_auroc"], True, WON)
    text = (folder / "results.html").read_text()
    page = Page(text)
    assert page.open == [] and not {"script", "b", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text) and "url(" not in text and "@import" not in text
    assert all(about["src"].startswith("data:image/jpeg;base64,") for tag, about in page.tags if tag == "img")
    links = [about["href"] for tag, about in page.tags if tag == "a"]
    assert links and all((folder / unquote(a, errors="surrogateescape")).exists() for a in links if a[0] != "#"), links
    anchors = {about["id"] for _, about in page.tags if "id" in about}
    assert {link[1:] for link in links if link[0] == "#"} <= anchors
    assert "<b>no & yes</b>" in page.text and "grid <script>" in page.text  # as texts
    assert page.text.count("0.940± 0.057") == 2 and "0.525± 0.035" in page.text  # a, of both tasks
    assert "26 runs, 2 failed" in page.text


def test_only_the_winner_is_marked(made):
    folder, outcomes = made
    for won, count in ((WON, 1), ({}, 0)):
        write_page(folder, "grid", AXES, outcomes, ["image_auroc"], False, won)
        cells = re.findall(r'<td class="won".*?</td>', (folder / "results.html").read_text())
        assert len(cells) == count and all("0.940" in cell for cell in cells)


def test_the_best_stands_first(made):
    folder, outcomes = made
    assert ranked(AXES, outcomes, "part", "image_auroc") == ["b", "a"]
    found = {"x": None, "y": 0.1, "z": 0.9, "w": 0.1}
    assert best_first(found, "pixel_auroc") == ["z", "y", "w", "x"] and best_first(found, "loss") == [
        "y",
        "z",
        "w",
        "x",
    ]
    write_page(folder, "grid", AXES, outcomes, ["image_auroc"], False, {})
    roc = re.search(r'<svg [^>]*aria-label="ROC.*?</svg>', (folder / "results.html").read_text(), re.DOTALL)[0]
    names = [found for found in re.findall(r">([^<>]+)</text>", roc) if re.search(r" 0\.\d{3}$", found)]
    assert [name[-5:] for name in names] == ["0.660", "0.950", "0.535"]  # as in all charts, each with its color


def test_the_page_has_a_bounded_size(made, monkeypatch):
    folder, outcomes = made
    monkeypatch.setattr(sweep_page, "INLINE", 100)
    write_page(folder, "grid", AXES, outcomes, ["image_auroc"], False, {})
    text = (folder / "results.html").read_text()
    assert "<img" not in text and text.count("this page would be too large") == 4


def rate(scores, which, threshold) -> float:
    return float((scores[which] >= threshold).mean())


def height(corners, x) -> float:
    """Of the highest point at x on the line through these corners."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        if x0 <= x <= x1:
            found.append(max(y0, y1) if x0 == x1 else y0 + (x - x0) / (x1 - x0) * (y1 - y0))
    return max(found)


def test_roc_curves_are_means_of_step_functions(tmp_path):
    """Against a plain loop; ties are straight lines."""
    rng = np.random.default_rng(0)
    expected = []
    for seed in (0, 1):
        labels = rng.integers(0, 2, 40)
        scores = rng.normal(size=40).round(1) + labels
        write_scores(tmp_path / str(seed), labels, scores)
        levels = sorted({*scores.tolist()}, reverse=True)
        corners = [(0.0, 0.0), *((rate(scores, labels == 0, at), rate(scores, labels == 1, at)) for at in levels)]
        expected.append([height(corners, x) for x in GRID])
    found = mean_roc([tmp_path / "0", tmp_path / "1"])
    assert found[0] == (0, 0) and np.allclose(found[1:], np.stack([GRID, np.mean(expected, 0)], 1))
    write_scores(tmp_path / "normal", [0, 0], [0.1, 0.2])
    write_scores(tmp_path / "empty", [], [])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/test_scores.csv").write_bytes(b"label,score\n\xff,x\n")
    for name in ("normal", "empty", "broken", "nowhere"):
        assert mean_roc([tmp_path / "0", tmp_path / name]) == [], name


def test_curves_of_damaged_files(made):
    folder, _ = made
    run = folder / "pretraining/mine/seed0"
    assert points(run, "loss")[:2] == [(1, 3), (2, 1.5)] and points(run, "knn20_top1") == [(2, 0.5)]
    assert points(run, "nothing") == points(folder / "nowhere", "loss") == []
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(1000)))
    thin = points(run, "loss")
    assert len(thin) == 100 and thin[0] == (0, 0) and np.allclose(np.diff(np.array(thin), axis=0), 10)


def test_links_of_the_table_lead_to_run_folders(made):
    folder, outcomes = made
    text = write_tables(folder, "grid", AXES, outcomes, ["image_auroc"], False, WON)
    assert "][" not in text and text.count("**") == 2
    lines = (folder / "results.md").read_text(errors="surrogateescape")
    assert lines.count("**[0.940 ± 0.057][2]**") == 1 and "Bold: better" in lines
    targets = re.findall(r"^\[(\d+)\]: <(.*)>$", lines, re.MULTILINE)
    assert [int(number) for number, _ in targets] == list(range(1, 12))  # 12 cells, of which one failed
    assert all((folder / unquote(target, errors="surrogateescape")).is_dir() for _, target in targets)
    write_tables(folder, "grid", AXES, outcomes, ["image_auroc"], False, {})
    assert b"**" not in (folder / "results.md").read_bytes()


def test_the_last_rows_of_a_sheet(tmp_path):
    for rows in (1, 5):
        paper = write_sheet(tmp_path / str(rows), rows)
        cut = last_rows(Image.open(tmp_path / str(rows) / "heatmaps.png"), 3)
        assert cut.size == (2 * TILE + GAP, min(rows, 3) * (TILE + GAP) - GAP)
        for i in range(min(rows, 3)):
            line, column = divmod(rows - min(rows, 3) + i, 2)
            x, y = 24 + column * (2 * TILE + 2 * GAP + 240), 104 + line * (TILE + GAP)
            here, there = (x, y, x + cut.width, y + TILE), (0, i * (TILE + GAP), cut.width, i * (TILE + GAP) + TILE)
            assert paper.crop(here).tobytes() == cut.crop(there).tobytes(), (rows, i)
    assert last_rows(Image.new("RGB", (100, 20)), 3).size == (2 * TILE + GAP, 1)
