"""Run a grid of pretraining x detector x task, skip what is done, and write one table.

    python sweep.py configs/sweep_demo.yaml
    python sweep.py configs/sweep_demo.yaml launcher="torchrun --nproc_per_node=4"

Every value in the grid is a piece of a command line. A pretraining that begins with a YAML file is a run of
train_ssl.py, whose last.pt the detectors then get as backbone.weights; any other is overrides for the detectors (none:
random weights). A detector may also be `eval.py task=knn ...`: what is measured is then the backbone itself. Writes
runs/<run_name>/results.md and results.csv, and a run folder for every cell, heat maps in it. A cell that fails stands
in the table with its error, the rest goes on.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from evaluation.report import csv_table, markdown_table, with_interval
from training import config, errors
from training.files import whole_file
from training.values import PathText

SCRIPTS = ["train_ssl", "train_anomaly", "eval"]


@dataclass(kw_only=True)
class Config:
    pretraining: dict[str, str]
    detectors: dict[str, str]
    tasks: dict[str, str]
    also: str = ""  # further overrides for every command
    seeds: list[int] = ()  # run every cell, pretraining included, with each of these; the table has mean and deviation
    metrics: list[str] = ("image_auroc",)
    mean: bool = False  # add rows with the mean over the tasks, for one class after the other as the normal one
    launcher: str = ""  # for example torchrun --nproc_per_node=4; empty: one process for each cell
    runs: PathText = "runs"
    run_name: str


def main(argv: list[str]) -> None:
    cfg = config.load(Config, argv)
    top = config.run_folder(cfg)
    try:
        commands = plan(cfg)
    except ValueError as error:  # of shlex
        raise errors.UserError(f"a command line of the sweep cannot be split into words: {error}") from None
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SCRIPTS)  # torch is imported once, not once a cell
    began, outcomes = time.perf_counter(), {}
    for number, (name, words, needs) in enumerate(commands, 1):
        folder = top / name
        # a cell is its command, its YAML, and those of the pretraining here that it needs: a change makes it run anew
        record = "".join(describe(w) for n, w, _ in commands if n in (name, needs))
        known = (folder / "command.txt").read_text() if (folder / "command.txt").exists() else None
        if known == record and results_of(folder):
            say(number, commands, began, f"{name}: done before")
        elif needs and "error" in outcomes[needs]:
            outcomes[name] = {"error": f"its pretraining {needs} failed"}
            continue
        else:
            say(number, commands, began, f"{name}: python {shlex.join(words)}")
            if known not in (None, record):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "command.txt").write_text(record)
            if error := run(words, cfg.launcher, server):
                outcomes[name] = {"error": error}
                print(f"    failed: {error}", file=sys.stderr)
                continue
        outcomes[name] = json.loads(results_of(folder).read_text())
    write(cfg, top, outcomes)


def plan(cfg: Config) -> list[tuple[str, list[str], str | None]]:
    """(run folder below the sweep's, command, the pretraining run that must be there first) of every cell, in order."""
    also, commands, weights = shlex.split(cfg.also), [], {}
    for (pretraining, text), (end, seed) in itertools.product(cfg.pretraining.items(), repeats(cfg)):
        words = shlex.split(text)
        if words and words[0].endswith((".yaml", ".yml")):
            name = f"pretraining/{pretraining}{end}"
            words = config.overlay(words, also, seed, place(cfg, name))
            commands.append((name, ["train_ssl.py", *words], None))
            words, needs = [f"backbone.weights={Path(cfg.runs) / cfg.run_name / name / 'last.pt'}"], name
        else:
            needs = None
        weights[pretraining, end] = words, needs
    for (task, its_words), (detector, text) in itertools.product(cfg.tasks.items(), cfg.detectors.items()):
        for pretraining, (end, seed) in itertools.product(cfg.pretraining, repeats(cfg)):
            backbone, needs = weights[pretraining, end]
            name = f"{task}/{detector}/{pretraining}{end}"
            words = config.overlay(shlex.split(text), shlex.split(its_words), backbone, also, seed, place(cfg, name))
            script = [] if words[0].endswith(".py") else ["train_anomaly.py"]
            commands.append((name, [*script, *words], needs))
    return commands


def results_of(folder: Path) -> Path | None:
    """results.json of a run folder, or of the evaluation in it."""
    return next(iter(sorted(folder.glob("results.json")) + sorted(folder.glob("eval_*/results.json"))), None)


def repeats(cfg: Config) -> list[tuple[str, list[str]]]:
    """(end of the run folder's name, words of the command line) of each seed; one of nothing without seeds."""
    return [(f"/seed{seed}", [f"seed={seed}"]) for seed in cfg.seeds] or [("", [])]


def describe(words: list[str]) -> str:
    """A command and the text of the config file in it."""
    file = Path(words[1])
    return shlex.join(words) + "\n" + (file.read_text() if file.is_file() else "")


def place(cfg: Config, name: str) -> list[str]:
    return [f"runs={cfg.runs}", f"run_name={cfg.run_name}/{name}"]


def run(words: list[str], launcher: str, server) -> str | None:
    """Run one command; what it did wrong in one line, or None. Its progress goes to the terminal."""
    if launcher:
        try:
            done = subprocess.run([*shlex.split(launcher), *words], stdout=subprocess.DEVNULL)
        except OSError as error:
            raise errors.UserError(f"launcher={launcher} cannot be started: {error.strerror}") from None
        return f"exit status {done.returncode}; run it by itself to see why" if done.returncode else None
    receive, send = server.Pipe(duplex=False)
    process = server.Process(target=call_script, args=(words, send))
    process.start()
    send.close()
    try:
        error = receive.recv()
    except EOFError:  # killed before it could say anything
        process.join()
        error = f"the process died (exit code {process.exitcode}); out of memory?"
    process.join()
    return error


def call_script(words: list[str], send) -> None:
    """In a fresh process: `main` of the script, its errors sent back as one line."""
    error = None
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
    except errors.UserError as problem:
        error = str(problem)
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    send.send(error and " ".join(error.split()))


def say(number: int, commands: list, began: float, text: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - began), 60)
    print(f"[{number}/{len(commands)}, {minutes}:{seconds:02d}] {text}", file=sys.stderr)


def write(cfg: Config, top: Path, outcomes: dict[str, dict]) -> None:
    """results.md and results.csv; the tables also on the terminal, results.json's line last."""
    rows, ends = [], [end for end, _ in repeats(cfg)]

    def cell(metric: str, *place: str) -> str:
        """The figure of one cell: with its interval, or mean and deviation over the seeds."""
        found = [outcomes["/".join(place) + end] for end in ends]
        if errors := [outcome["error"] for outcome in found if "error" in outcome]:
            return errors[0]
        return spread([outcome.get(metric) for outcome in found]) if cfg.seeds else with_interval(found[0], metric)

    for task, detector, metric in itertools.product(cfg.tasks, cfg.detectors, cfg.metrics):
        shown = [cell(metric, task, detector, p) for p in cfg.pretraining]
        if any(text != "-" for text in shown):
            rows.append([task, detector, metric, *shown])
    rows += mean_rows(cfg, outcomes) if cfg.mean else []
    table = markdown_table(["task", "detector", "figure", *cfg.pretraining], rows)
    pretrained = [name for name in outcomes if name.startswith("pretraining/")]
    keys = ["method", "steps", "loss", "knn20_top1", "seconds", "error"]
    shown = [[n.removeprefix("pretraining/")] + [short(outcomes[n].get(key)) for key in keys] for n in pretrained]
    table = f"{markdown_table(['pretraining', *keys], shown)}\n{table}" if shown else table
    if cfg.seeds:
        brackets = "Mean ± standard deviation over seeds " + ", ".join(map(str, cfg.seeds))
    else:
        brackets = "In brackets: 95 % bootstrap intervals over test pictures"
        brackets += "; of a mean ± standard deviation over the tasks" if cfg.mean else ""
    with whole_file(top / "results.md") as file:
        file.write(f"# {cfg.run_name}\n\n{brackets}.\n\n{table}")
    with whole_file(top / "results.csv") as file:
        file.write(csv_table([{"run": name} | plain(outcome) for name, outcome in outcomes.items()]))
    print(table)
    cells = f"{top}/*/*/*{'/*' if cfg.seeds else ''}"
    print(f"{top}/results.md, {top}/results.csv; pictures: {cells}/heatmaps.png; curves: tensorboard --logdir {top}")
    failed = [name for name, outcome in outcomes.items() if "error" in outcome]
    print(json.dumps({"cells": len(outcomes), "failed": failed, "table": str(top / "results.md")}))
    if failed:
        sys.exit(1)


def mean_rows(cfg: Config, outcomes: dict[str, dict]) -> list[list[str]]:
    """Mean over the tasks of each figure, with its deviation over the seeds, or without seeds over the tasks; a dash
    where a cell failed or has none."""
    rows = []
    for detector, metric in itertools.product(cfg.detectors, cfg.metrics):
        shown = []
        for pretraining in cfg.pretraining:
            values = [  # a list of the tasks for each seed
                [outcomes[f"{task}/{detector}/{pretraining}{end}"].get(metric) for task in cfg.tasks]
                for end, _ in repeats(cfg)
            ]
            if any(None in each for each in values):
                shown.append("-")
            else:
                shown.append(spread([statistics.fmean(each) for each in values] if cfg.seeds else values[0]))
        if any(text != "-" for text in shown):
            rows.append(["mean", detector, metric, *shown])
    return rows


def spread(values: list[float | None]) -> str:
    """`0.943 ± 0.012`, mean and standard deviation (of the population that these are drawn from), or the one value."""
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def short(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(outcome: dict) -> dict:
    """Single values and the ends of intervals, for CSV."""
    flat = {key: value for key, value in outcome.items() if not isinstance(value, dict | list)}
    intervals = {k: v for k, v in outcome.items() if k.endswith("_interval") and v}
    return flat | {f"{key}_{end}": v[i] for key, v in intervals.items() for i, end in enumerate(("low", "high"))}


if __name__ == "__main__":
    errors.run(main)
