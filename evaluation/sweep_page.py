"""results.html of a sweep: its table, curves and heat maps on one page, which needs no script and no other file."""

import csv
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from sklearn.metrics import roc_curve

from evaluation.sweep_table import (
    OF_PRETRAINING,
    STALE,
    WON,
    Axes,
    Outcome,
    Winners,
    columns,
    failed,
    mean_rows,
    pretraining_rows,
    starred,
    values,
    what_is_shown,
)
from evaluation.sweep_winners import MORE_IS_BETTER
from plots.bars import lines_svg
from plots.heatmaps import last_rows
from plots.page import page, safe, table, uri
from runtime.files import whole_file

ROWS = 3  # of each heatmaps.png
WIDTH = 190  # pixels of an image and its heat map
INLINE = 12 * 2**20  # bytes of images within the page
GRID = np.linspace(0, 1, 51)  # false-alarm rates at which ROC curves are averaged over the seeds
NOTHING = "<td>-</td>"  # a cell without the metric
STYLE = """
body { max-width: 1400px } .results td, .results th { padding: 5px 12px; vertical-align: top }
.results td { white-space: nowrap }
.results th:first-child, .results td:first-child { position: sticky; left: 0; background: #fff; padding-left: 0 }
.results tr.task td { font-weight: 600; padding-top: 14px; text-align: left }
.results td a { text-decoration: none; color: inherit; display: block }
.results td a:hover { text-decoration: underline }
.results small { display: block; color: #555 }
.results td.failed { color: #be1e1e; max-width: 220px; white-space: normal }
td.won { outline: 2px solid #191919; outline-offset: -2px; font-weight: 700 } td.won small { font-weight: normal }
.charts { display: flex; flex-wrap: wrap; gap: 8px 28px } .charts svg { flex: 0 1 auto } details { margin: 10px 0 }
"""


def write_page(
    folder: Path, title: str, axes: Axes, outcomes: dict[str, Outcome], metrics: list[str], mean: bool, won: Winners
) -> None:
    """Write the page into the sweep's folder, from which its links lead to the run folders."""
    wrong = sum("error" in outcome.results for outcome in outcomes.values())
    about = f"{len(outcomes)} runs, {wrong} failed. {what_is_shown(axes, mean)}."
    body = [f"<p>{safe(WON)} The darker a cell, the better; each leads to its run folder.</p>"]
    body.append(results(axes, outcomes, metrics, mean, won))
    if any(outcome.stale for outcome in outcomes.values()):
        body.append(f"<p>* {safe(STALE)}</p>")
    body.append(pretraining(folder, axes, outcomes))
    room = INLINE
    for number, task in enumerate(axes.tasks):
        body.append(f'<h2 id="task{number}">{safe(task)}</h2>')
        for detector in ranked(axes, outcomes, task, metrics[0]):
            name = f"{task}/{detector}"
            values_of = {key: value_of(axes, outcomes, metrics[0], f"{name}/{key}") for key in axes.pretrainings}
            names = best_first(values_of, metrics[0])
            charts = f'<div class="charts">{"".join(curves(folder, axes, outcomes, name, metrics[0]))}</div>'
            images = heatmaps(folder, axes, outcomes, name, names, metrics[0])
            if len(images) > room:
                images = "<p>The heat maps are in the run folders, for this page would be too large.</p>"
            room -= len(images)
            body.append(f"<h3>{safe(detector)}</h3>{charts}{images}")
    with whole_file(folder / "results.html", durable=True) as file:
        file.write(page(title, about, "".join(body), STYLE))


def results(axes: Axes, outcomes: dict[str, Outcome], metrics: list[str], mean: bool, won: Winners) -> str:
    """The table: the best detector of each task first."""
    varied = columns(axes.detectors)
    header = ["detector", *varied, "metric", *axes.pretrainings]
    lines = [f"<tr>{tagged('th', header)}</tr>"]
    for number, task in enumerate(axes.tasks):
        lines.append(heading(f'<a href="#task{number}">{safe(task)}</a>', len(header)))
        for detector, metric in itertools.product(ranked(axes, outcomes, task, metrics[0]), metrics):
            about = tagged("td", [detector, *values(varied, axes.detectors[detector]), metric])
            best = won.get((task, detector, metric))
            names = {name: f"{task}/{detector}/{name}" for name in axes.pretrainings}
            cells = [cell(axes, outcomes, metric, names[name], name == best) for name in names]
            if any(text != NOTHING for text in cells):
                lines.append(f"<tr>{about}{''.join(cells)}</tr>")
    if mean and (rows := mean_rows(axes, outcomes, metrics)):
        lines.append(heading("mean over the tasks", len(header)))
        lines += [f"<tr>{tagged('td', texts)}</tr>" for _, *texts in rows]
    return f'<div class="wide"><table class="results">{"".join(lines)}</table></div>'


def heading(text: str, width: int) -> str:
    return f'<tr class="task"><td colspan="{width}">{text}</td></tr>'


def tagged(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{safe(text)}</{tag}>" for text in texts)


def cell(axes: Axes, outcomes: dict[str, Outcome], metric: str, name: str, is_winner: bool) -> str:
    """The metric of one cell over its deviation or interval, a link to the run folder."""
    if error := failed(axes, outcomes, name):
        return f'<td class="failed"><a href="{address(name)}">{safe(error)}</a></td>'
    value = value_of(axes, outcomes, metric, name)
    if value is None:
        return NOTHING
    found = [outcomes[name + end] for end in axes.ends]
    interval, below = found[0].results.get(f"{metric}_interval"), ""
    if len(found) > 1:
        below = f"± {statistics.stdev(outcome.results[metric] for outcome in found):.3f}"
    elif interval and not axes.seeds:
        below = f"{interval[0]:.3f} to {interval[1]:.3f}"
    text = starred(f"{value:.3f}", any(outcome.stale for outcome in found))
    shade = min(max(2 * value - 1, 0), 1) if metric.endswith(MORE_IS_BETTER) else 0
    look = f'class="{"won" if is_winner else ""}" style="background: rgb(8 81 156 / {0.4 * shade:.2f})"'
    return f'<td {look}><a href="{address(name)}">{text}<small>{below}</small></a></td>'


def value_of(axes: Axes, outcomes: dict[str, Outcome], metric: str, name: str) -> float | None:
    """The mean over the seeds."""
    found = [outcomes[name + end].results.get(metric) for end in axes.ends]
    return None if None in found else statistics.fmean(found)


def best_first(names: dict[str, float | None], metric: str) -> list[str]:
    """Those without a value last; else in the order given where values are equal, or more of the metric is no better,
    as of losses and times."""
    sign = -1 if metric.endswith(MORE_IS_BETTER) else 0
    return sorted(names, key=lambda name: math.inf if names[name] is None else sign * names[name])


def ranked(axes: Axes, outcomes: dict[str, Outcome], task: str, metric: str) -> list[str]:
    """The detectors, that with the best cell first."""

    def best(detector: str) -> float | None:
        cells = [value_of(axes, outcomes, metric, f"{task}/{detector}/{name}") for name in axes.pretrainings]
        return max((value for value in cells if value is not None), default=None)

    return best_first({detector: best(detector) for detector in axes.detectors}, metric)


def pretraining(folder: Path, axes: Axes, outcomes: dict[str, Outcome]) -> str:
    """Table and curves of the pretraining runs; nothing without any."""
    rows = pretraining_rows(axes, outcomes)
    if not rows:
        return ""
    names = [name for name in axes.pretrainings if f"pretraining/{name}{axes.ends[0]}" in outcomes]
    links = "".join(f'<a href="{address(f"pretraining/{name}")}">{safe(name)}</a>' for name in names)
    knn, charts = {}, []
    for name in names:
        runs = {end: folder / f"pretraining/{name}{end}" for end in axes.ends}
        lines = {end.strip("/") or "loss": points(run, "loss") for end, run in runs.items()}
        charts.append(lines_svg(name, lines, "step", "loss"))
        knn[name] = points(runs[axes.ends[0]], "knn20_top1")
    charts.append(lines_svg("kNN on held-out images", knn, "step", "accuracy, k = 20"))
    header = ["pretraining", *columns(axes.pretrainings), *OF_PRETRAINING]
    body = f'{table(header, rows)}<nav>{links}</nav><div class="charts">{"".join(charts)}</div>'
    return f"<h2>Pretraining</h2>{body}"


def points(run: Path, key: str, most: int = 100) -> list[tuple[float, float]]:
    """(step, value) of a curve in metrics.jsonl, evenly thinned out; none where there is no such file or curve."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
            found.append((float(values["step"]), float(values[key])))
        except (ValueError, KeyError, TypeError):  # damaged, or without this curve
            continue
    return found[:: max(1, -(-len(found) // most))] if found else []


def curves(folder: Path, axes: Axes, outcomes: dict[str, Outcome], name: str, metric: str) -> Iterator[str]:
    """ROC curves, means over the seeds, and the losses of detectors that are trained, by the first seed. A pretraining
    has the same color in all charts."""
    names = axes.pretrainings
    roc = {pretraining: mean_roc([folder / f"{name}/{pretraining}{end}" for end in axes.ends]) for pretraining in names}
    if any(roc.values()):
        known = {key: value_of(axes, outcomes, metric, f"{name}/{key}") for key in names}
        notes = {key: f"{value:.3f}" for key, value in known.items() if value is not None}
        yield lines_svg(f"ROC, {metric}", roc, "false-alarm rate", "detection rate", notes=notes, unit=True)
    losses = {pretraining: points(folder / f"{name}/{pretraining}{axes.ends[0]}", "loss") for pretraining in names}
    if any(losses.values()):
        yield lines_svg("Training", losses, "step", "loss")


def mean_roc(runs: list[Path]) -> list[tuple[float, float]]:
    """The detection rate at each false-alarm rate of GRID, the mean over runs; nothing if one has no test scores."""
    rates = []
    for run in runs:
        try:
            with open(run / "test_scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = [(int(row["label"]), float(row["score"])) for row in csv.DictReader(file)]
        except (OSError, ValueError, KeyError, TypeError):  # none there, or damaged
            return []
        labels, scores = [label for label, _ in rows], [score for _, score in rows]
        if {*labels} != {0, 1} or not np.isfinite(scores).all():
            return []
        false, true, _ = roc_curve(labels, scores)
        left = np.searchsorted(false, GRID, "right") - 1  # the highest point at or before each rate
        right = np.minimum(left + 1, len(false) - 1)  # the lowest one after it
        share = (GRID - false[left]) / np.maximum(false[right] - false[left], 1e-12)
        rates.append(true[left] + share * (true[right] - true[left]))
    return [(0.0, 0.0), *zip(GRID.tolist(), np.mean(rates, 0).tolist())]


def heatmaps(folder: Path, axes: Axes, outcomes: dict[str, Outcome], name: str, names: list[str], metric: str) -> str:
    """What the heatmaps.png of each pretraining's first seed ends with, in small."""
    figures = []
    for pretraining in names:
        run = f"{name}/{pretraining}{axes.ends[0]}"
        try:
            with Image.open(folder / run / "heatmaps.png") as sheet:
                paper = last_rows(sheet.convert("RGB"), ROWS)
        except (OSError, ValueError):
            continue
        paper.thumbnail((WIDTH, paper.height))
        value = value_of(axes, outcomes, metric, f"{name}/{pretraining}")
        caption = pretraining if value is None else f"{pretraining}\n{value:.3f}"
        image = f'<img src="{uri(paper)}" width="{paper.width}" height="{paper.height}" alt="">'
        link = f'<a href="{address(run, "heatmaps.png")}">{image}</a>'
        figures.append(f"<figure>{link}<figcaption>{safe(caption)}</figcaption></figure>")
    return f'<div class="tiles">{"".join(figures)}</div>' if figures else ""


def address(run: str, file: str = "") -> str:
    """Of a run folder or a file in it, from the page."""
    return safe(quote(os.fsencode(f"{run}/{file}")))
