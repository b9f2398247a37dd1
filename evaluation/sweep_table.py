"""results.md and results.csv of a sweep."""

import itertools
import os
import statistics
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from evaluation.sweep_winners import replicates, winner
from evaluation.tables import csv_table, markdown_table, with_interval
from runtime import checkpoint
from runtime.files import whole_file

OF_PRETRAINING = ["method", "steps", "loss", "knn20_top1", "seconds", "error"]  # columns of its own table
STALE = "made by another version of the code (results.csv: stale, version); stale=rerun runs these cells anew"
WON = "Bold: better than every other of its row by more than chance (evaluation/sweep_winners.py)."
Winners = dict[tuple[str, str, str], str]  # {(task, detector, metric): pretraining}
OF_THE_PLACE = ("runs", "run_name", "resume")  # keys that differ between cells and tell nothing


class Axes(NamedTuple):
    """What a sweep goes over. A name of a variant has its values of the grid's keys as words, others have none."""

    tasks: list[str]
    detectors: dict[str, list[str]]
    pretrainings: dict[str, list[str]]
    seeds: list[int]

    @property
    def ends(self) -> list[str]:
        """Of the cells' names, for each seed; an empty one without seeds."""
        return [f"/seed{seed}" for seed in self.seeds] or [""]


class Outcome(NamedTuple):
    """What a cell gave."""

    results: dict  # results.json, or {"error": ...}
    config: dict  # {dotted key: value}
    stale: bool = False  # made by a version of the code that is not this one


def read_results(path: Path) -> dict | None:
    """What a cell's results.json holds, None where it is not there, empty or damaged."""
    results = checkpoint.read_object(path)
    if not results or not isinstance(results.get("version", ""), str):
        return None
    for key, value in results.items():
        if key.endswith("_interval") and not (value is None or _is_interval(value)):
            return None
    return results


def _is_interval(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value)


def with_numbers(results: dict, metrics: list[str], path: Path) -> dict:
    """The results, or an error in their place where one of the metrics is not a number."""
    wrong = [key for key in metrics if not isinstance(results.get(key), int | float | None)]
    return {"error": f"{path}: {wrong[0]} is not a number"} if wrong else results


def write_tables(
    folder: Path, title: str, axes: Axes, outcomes: dict[str, Outcome], metrics: list[str], mean: bool, won: Winners
) -> str:
    """Write both files; returns the tables of results.md without its links: a row per task, detector and metric, a
    column per pretraining. results.csv has a row per cell, with all its single values and the keys in which cells
    differ."""
    with whole_file(folder / "results.md", durable=True) as file:
        about = f"{what_is_shown(axes, mean)}. {WON}" if won else f"{what_is_shown(axes, mean)}."
        file.write(f"# {title}\n\n{about}\n\n{tables(axes, outcomes, metrics, mean, won, linked=True)}")
    differ = differing([outcome.config for outcome in outcomes.values()])
    with whole_file(folder / "results.csv", durable=True) as file:
        file.write(csv_table([csv_row(name, outcome, differ) for name, outcome in outcomes.items()]))
    return tables(axes, outcomes, metrics, mean, won)


def tables(
    axes: Axes, outcomes: dict[str, Outcome], metrics: list[str], mean: bool, won: Winners, *, linked: bool = False
) -> str:
    """That of the pretraining runs and that of results, as Markdown; `linked`: each result to its run folder."""
    varied, rows, links = columns(axes.detectors), [], []
    for task, (detector, words), metric in itertools.product(axes.tasks, axes.detectors.items(), metrics):
        shown = [cell(axes, outcomes, metric, f"{task}/{detector}/{name}") for name in axes.pretrainings]
        if any(text != "-" for text in shown):
            for i, name in enumerate(axes.pretrainings):
                if linked and shown[i] != "-" and not failed(axes, outcomes, where := f"{task}/{detector}/{name}"):
                    links += [where] * (where not in links)
                    shown[i] = f"[{shown[i]}][{links.index(where) + 1}]"
                shown[i] = f"**{shown[i]}**" if won.get((task, detector, metric)) == name else shown[i]
            rows.append([task, detector, *values(varied, words), metric, *shown])
    rows += mean_rows(axes, outcomes, metrics) if mean else []
    table = markdown_table(["task", "detector", *varied, "metric", *axes.pretrainings], rows)
    if pretrained := pretraining_rows(axes, outcomes):
        table = markdown_table(["pretraining", *columns(axes.pretrainings), *OF_PRETRAINING], pretrained) + "\n" + table
    if any(outcome.stale for outcome in outcomes.values()):
        table += f"\n\\* {STALE}\n"
    targets = [f"[{number}]: <{quote(os.fsencode(where))}>\n" for number, where in enumerate(links, 1)]
    return table + "\n" * bool(targets) + "".join(targets)


def what_is_shown(axes: Axes, mean: bool) -> str:
    if axes.seeds:
        return "Mean ± standard deviation over seeds " + ", ".join(map(str, axes.seeds))
    intervals = "With 95 % bootstrap intervals over test images"
    return intervals + ("; of a mean ± standard deviation over the tasks" if mean else "")


def row_winners(folder: Path, axes: Axes, outcomes: dict[str, Outcome], metrics: list[str]) -> Winners:
    """{(task, detector, metric): pretraining} of the rows in which one is better than all others by more than
    chance; those that failed are left out."""
    found = {}
    for task, detector in itertools.product(axes.tasks, axes.detectors):
        names = [n for n in axes.pretrainings if not failed(axes, outcomes, f"{task}/{detector}/{n}")]
        cells = {name: [f"{task}/{detector}/{name}{end}" for end in axes.ends] for name in names}
        row = {name: [outcomes[cell].results for cell in its] for name, its in cells.items()}
        drawn = replicates({name: [folder / cell for cell in its] for name, its in cells.items()}, metrics)
        best = {metric: winner(metric, row, drawn.get(metric, {})) for metric in metrics}
        found |= {(task, detector, metric): name for metric, name in best.items() if name}
    return found


def columns(names: dict[str, list[str]]) -> list[str]:
    """The keys of the grid that tell these names apart."""
    return list(dict.fromkeys(word.partition("=")[0] for words in names.values() for word in words))


def values(keys: list[str], words: list[str]) -> list[str]:
    given = dict(word.split("=", 1) for word in words)
    return [given.get(key, "-") for key in keys]


def cell(axes: Axes, outcomes: dict[str, Outcome], metric: str, name: str) -> str:
    """The metric of one cell: with its interval, or mean and deviation over the seeds."""
    if error := failed(axes, outcomes, name):
        return error
    found = [outcomes[name + end] for end in axes.ends]
    if axes.seeds:
        return spread([outcome.results.get(metric) for outcome in found], any(outcome.stale for outcome in found))
    return starred(with_interval(found[0].results, metric), found[0].stale)


def failed(axes: Axes, outcomes: dict[str, Outcome], name: str) -> str | None:
    """The first error of a cell's seeds."""
    errors = [outcomes[name + end].results.get("error") for end in axes.ends]
    return next(filter(None, errors), None)


def mean_rows(axes: Axes, outcomes: dict[str, Outcome], metrics: list[str]) -> list[list[str]]:
    """Mean over the tasks of each metric, with its deviation over the seeds, or without seeds over the tasks; a dash
    where a cell failed or has none."""
    varied, rows = columns(axes.detectors), []
    for (detector, words), metric in itertools.product(axes.detectors.items(), metrics):
        shown = []
        for pretraining in axes.pretrainings:
            found = [  # a list of the tasks for each seed
                [outcomes[f"{task}/{detector}/{pretraining}{end}"] for task in axes.tasks] for end in axes.ends
            ]
            seen = [[outcome.results.get(metric) for outcome in each] for each in found]
            if any(None in each for each in seen):
                shown.append("-")
            else:
                over = [statistics.fmean(each) for each in seen] if axes.seeds else seen[0]
                shown.append(spread(over, any(outcome.stale for each in found for outcome in each)))
        if any(text != "-" for text in shown):
            rows.append(["mean", detector, *values(varied, words), metric, *shown])
    return rows


def pretraining_rows(axes: Axes, outcomes: dict[str, Outcome]) -> list[list[str]]:
    """Of each pretraining run here: its name, values of the grid's keys, and what it came to."""
    varied, rows = columns(axes.pretrainings), []
    for (name, words), end in itertools.product(axes.pretrainings.items(), axes.ends):
        if outcome := outcomes.get(f"pretraining/{name}{end}"):
            own = [short(outcome.results.get(key)) for key in OF_PRETRAINING]
            rows.append([starred(name + end, outcome.stale), *values(varied, words), *own])
    return rows


def differing(configs: list[dict]) -> list[str]:
    """The keys with more than one value among the configs that have them."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in OF_THE_PLACE)
    return [key for key in keys if len({repr(config[key]) for config in configs if key in config}) > 1]


def csv_row(name: str, outcome: Outcome, differ: list[str]) -> dict:
    """Single values and the ends of intervals, after the keys in which cells differ."""
    row = {"run": name, "stale": "yes" if outcome.stale else ""}
    row |= {key: outcome.config[key] for key in differ if key in outcome.config}
    row |= {key: value for key, value in outcome.results.items() if not isinstance(value, dict | list)}
    intervals = {key: value for key, value in outcome.results.items() if key.endswith("_interval") and value}
    return row | {f"{key}_{end}": v[i] for key, v in intervals.items() for i, end in enumerate(("low", "high"))}


def spread(values: list[float | None], stale: bool = False) -> str:
    """`0.943 ± 0.012`, mean and standard deviation (of the population that these are drawn from), or the one value."""
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return starred(f"{statistics.fmean(values):.3f}{deviation}", stale)


def starred(text: str, stale: bool) -> str:
    return f"{text}*" if stale and text != "-" else text


def short(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
