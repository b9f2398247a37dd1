"""Run a grid of pretraining x detector x task, skip what is done, and write one table.

    python sweep.py configs/sweeps/demo.yaml
    python sweep.py configs/sweeps/demo.yaml launcher="torchrun --nproc_per_node=4" also="data.size=64"

Every value is a piece of a command line. A pretraining that begins with a YAML file is a run of train_ssl.py, or of the
script before it (`my_train.py configs/simclr_neu.yaml ...`), whose last.pt the detectors then get as backbone.weights;
any other is overrides for the detectors (none: random weights). A detector may have a script before its YAML file too,
or be `eval.py task=knn ...`: what is measured is then the backbone itself. Words with the same key replace one another
in the order detector, task, pretraining, `also`, grid, seed; `also=` on the command line adds to the YAML's.

    grid: {optim.lr: [0.03, 0.3], method: [simclr, byol], seeds: [0, 1]}

makes a variant of every combination of values: of the pretraining runs, if there are any (and then their detectors get
the variant's `backbone` keys as well), else of the detectors. `seeds` in it are the sweep's.

Before the first cell runs, the config of every cell is built and checked: for mistakes, for the weights that its
pretraining gives, and for two cells that are the same. A cell is done if its results are there, its config has no
other value of a key that may change them, and its pretraining has the same results; else it runs anew. Its images are
not looked at again: after adding some, give also="resume=never". Results of another version of the code
(runtime/version.py) are kept and marked with an asterisk, or made anew with stale=rerun.

Several cells run at a time, one on each GPU of the machine, or on what `devices` has: `devices=cpu,cpu` runs two. Their
progress is then in .cells/<cell>.log. A pretraining comes before what needs it. {name} stands for a value:

    values: {parts: datasets/demo/scavport, archive: none}
    pretraining: {simclr: "configs/simclr_scavport.yaml data.root={parts}", ...}

`values.parts=/path/to/parts` then takes other images, and what has a value `none` is left out.

Writes runs/<run_name>/results.html, a page with curves and heat maps that needs no other file, results.md and
results.csv, and a run folder for every cell. In the tables the best of a row is bold where it is better than all others
by more than chance (evaluation/sweep_winners.py). A cell that fails is in the table with its error, and the others
still run.
"""

import runtime.threads  # before torch

import itertools
import json
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from evaluation.sweep_commands import NOTHING, filled, names_in, split, variants
from evaluation.sweep_page import write_page
from evaluation.sweep_table import Axes, Outcome, read_results, row_winners, with_numbers, write_tables
from runtime import checkpoint, config, errors, scripts
from runtime.files import REMOVING, empty, lock, locked, unlock, whole_file
from runtime.values import PathText, Seed
from runtime.version import TOP, another_version, code_version


@dataclass(kw_only=True)
class Config:
    pretraining: dict[str, str]  # name: a YAML of train_ssl.py with overrides, or the backbone's overrides
    detectors: dict[str, str]  # name: a YAML of train_anomaly.py with overrides, or a script with its words
    tasks: dict[str, str]  # name: overrides that say what data it is
    values: dict[str, str] = field(default_factory=dict)
    # {name} in a command stands for the words of the value `name`; a command with a value `none` is left out
    also: str = ""  # further overrides for every command
    grid: dict = field(default_factory=dict)  # {key: list of values} of which every combination is run
    seeds: list[Seed] = field(default_factory=list)
    # run every cell, pretraining included, with each of these; the table has mean and deviation
    stale: Literal["keep", "rerun"] = "keep"  # what happens to cells that another version of the code made
    metrics: list[str] = field(default_factory=lambda: ["image_auroc"])  # of results.json, rows of the table
    mean: bool = False  # add rows with the mean over the tasks, for one class after the other as the normal one
    devices: list[str] = field(default_factory=list)
    # run a cell on each of these at a time: GPUs as CUDA_VISIBLE_DEVICES has them, or cpu; empty: all visible GPUs
    launcher: str = ""  # for example torchrun --nproc_per_node=4, for one cell at a time; empty: one process for each
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


class Cell(NamedTuple):
    name: str  # its run folder below the sweep's
    words: list[str]  # of its command line: script, YAML file, overrides
    needs: str | None = None  # the pretraining run that must be there first
    weights: str | None = "any"  # what backbone.weights must be in its config; any: nothing is required


class Work(NamedTuple):
    """A cell, and what its run folder holds before it runs."""

    cell: Cell
    folder: Path
    note: Path  # says what is in the folder; not inside it, because resume=never removes that
    record: dict  # what the note has to say: the script, its config, and what its pretraining came to
    version: str  # of the code that is to end the cell, or has
    is_done: bool
    anew: bool  # what is in the folder has to go first
    stale: str  # another version of the code that made what is there


def main(argv: list[str]) -> None:
    cfg = load(argv)
    top, (axes, cells) = config.run_folder(cfg), plan(cfg)
    configs = check(cells)
    free = devices_of(cfg, configs)
    several = len(free) > 1
    lock(top, ".cells")
    server = multiprocessing.get_context("forkserver")  # each cell a fresh process, but torch and ours imported once
    ours = [name for name in sys.modules if (TOP / name.partition(".")[0] / "__init__.py").exists()]
    server.set_forkserver_preload(ours)
    began, waiting = time.perf_counter(), dict(enumerate(cells, 1))
    outcomes: dict[str, Outcome] = {}
    running: dict[scripts.Running, tuple[Work, str]] = {}  # and on which device
    with scripts.ends_with_all(running.keys()):
        while waiting or running:
            ready = (n for n, cell in waiting.items() if cell.needs is None or cell.needs in outcomes)
            number = next(ready, None) if free else None
            if number is None:
                ended = scripts.first_ended(running.keys())
                work, device = running.pop(ended)
                free.append(device)
                outcomes[work.cell.name] = outcome_of(work, ended.error, cfg.metrics, outcomes)
                continue
            work = look(cell := waiting.pop(number), top, configs[cell.name], cfg.stale)
            if cell.needs and "error" in outcomes[cell.needs].results:
                outcomes[cell.name] = failed(work, f"its pretraining {cell.needs} failed")
            elif work.is_done:
                by = work.stale and f", by {work.stale}; stale=rerun runs it anew"
                say(number, cells, began, f"{cell.name}: done before{by}")
                outcomes[cell.name] = outcome_of(work, None, cfg.metrics, outcomes)
            else:
                say(number, cells, began, f"{cell.name}: python {shlex.join(cell.words)}")
                if error := make_ready(work):
                    outcomes[cell.name] = outcome_of(work, error, cfg.metrics, outcomes)
                    continue
                device = free.pop(0)
                log = work.note.with_suffix(".log") if several else None
                running[scripts.Running(cell.words, cfg.launcher, server, environment(device), log)] = work, device

    outcomes = {cell.name: outcomes[cell.name] for cell in cells}  # the first that ended may be another
    won = row_winners(top, axes, outcomes, cfg.metrics)
    write_page(top, cfg.run_name, axes, outcomes, cfg.metrics, cfg.mean, won)
    print(write_tables(top, cfg.run_name, axes, outcomes, cfg.metrics, cfg.mean, won))
    images = f"{top}/*/*/*{'/*' if cfg.seeds else ''}/heatmaps.png"
    print(
        f"{top}/results.html, {top}/results.md, {top}/results.csv; images: {images}; curves: tensorboard --logdir {top}"
    )
    wrong = [name for name, outcome in outcomes.items() if "error" in outcome.results]
    stale = [name for name, outcome in outcomes.items() if outcome.stale]
    unlock(top)
    print(json.dumps({"cells": len(outcomes), "failed": wrong, "stale": stale, "table": str(top / "results.md")}))
    if wrong:
        sys.exit(1)


# -------------------------------------------------------------------- what is to be run


def load(argv: list[str]) -> Config:
    """The config, the command line's `also=` added to the YAML's, the grid's seeds moved to where seeds are."""
    further = [word.removeprefix("also=") for word in argv if word.startswith("also=")]
    cfg = config.load(Config, [word for word in argv if not word.startswith("also=")])
    cfg.also = shlex.join(config.overlay(*map(split, [cfg.also, *further])))
    cfg.grid = config.flatten(cfg.grid)  # sections are dotted keys as well
    fill(cfg)
    if "seeds" in cfg.grid:
        if cfg.seeds:
            raise errors.UserError("seeds and grid.seeds are the same key: give one of them")
        cfg.seeds = config.coerce(cfg.grid.pop("seeds"), list[Seed], "grid.seeds")
    return cfg


def fill(cfg: Config) -> None:
    """Put the values in the place of their names, and leave out what has a value `none`; a line says so.

    Raises:
        UserError: a name that no value has, `also` with a value `none`, or nothing is left of a section.
    """
    out: dict[str, list[str]] = {}  # of each value `none`
    for section in ("pretraining", "detectors", "tasks"):
        texts, kept, lacking = getattr(cfg, section), {}, {}
        for name, text in texts.items():
            if key := next((key for key in names_in(text, cfg.values) if cfg.values[key] == NOTHING), None):
                lacking.setdefault(key, []).append(name)
            else:
                kept[name] = filled(text, cfg.values)
        if texts and not kept:
            keys = " or ".join(f"values.{key}" for key in lacking)
            raise errors.UserError(f"nothing is left of {section}: set {keys}")
        setattr(cfg, section, kept)
        for key, names in lacking.items():
            out.setdefault(key, []).extend(names)
    for key in names_in(cfg.also, cfg.values):
        if cfg.values[key] == NOTHING:
            raise errors.UserError(f"also={errors.cut(cfg.also)} needs values.{key}, which is {NOTHING}")
    cfg.also = filled(cfg.also, cfg.values)
    for key, names in out.items():
        print(f"left out, because values.{key} is not given: {', '.join(names)}", file=sys.stderr)


def plan(cfg: Config) -> tuple[Axes, list[Cell]]:
    """What the table goes over, and every cell in the order in which they run.

    Raises:
        UserError: a name that leads out of the sweep's folder, or two cells in one folder or one in the other's.
    """
    also, place = split(cfg.also), config.run_folder(cfg)
    for section in ("pretraining", "detectors", "tasks"):
        for name in getattr(cfg, section):
            config.require_below(name, f"a name in {section}", str(place))
    trained = [name for name, text in cfg.pretraining.items() if begins_with_file(split(text))]
    pretrainings = varied(cfg.pretraining, trained, cfg.grid)
    detectors = varied(cfg.detectors, [] if trained else list(cfg.detectors), cfg.grid)
    repeats = [(f"/seed{seed}", [f"seed={seed}"]) for seed in cfg.seeds] or [("", [])]
    given = any("backbone.weights=" in text for text in cfg.pretraining.values())
    cells, backbones = [], {}
    for (pretraining, (words, variant)), (end, seed) in itertools.product(pretrainings.items(), repeats):
        weights, needs = "any", None
        if begins_with_file(words):
            needs, script = f"pretraining/{pretraining}{end}", [] if words[0].endswith(".py") else ["train_ssl.py"]
            words = config.overlay(words, also, variant, seed, [f"runs={cfg.runs}", f"run_name={cfg.run_name}/{needs}"])
            cells.append(Cell(needs, [*script, *words]))
            weights = str(place / needs / "last.pt")
            words = [f"backbone.weights={weights}", *(w for w in variant if re.match(r"backbone[.=]", w))]
        elif trained or given:
            weights = next((w.partition("=")[2] for w in reversed(words) if w.startswith("backbone.weights=")), None)
        backbones[pretraining, end] = words, needs, weights
    for (task, text), (detector, (own, variant)) in itertools.product(cfg.tasks.items(), detectors.items()):
        for pretraining, (end, seed) in itertools.product(pretrainings, repeats):
            words, needs, weights = backbones[pretraining, end]
            name = f"{task}/{detector}/{pretraining}{end}"
            there = [f"runs={cfg.runs}", f"run_name={cfg.run_name}/{name}"]
            words = config.overlay(own, split(text), words, also, variant, seed, there)
            script = [] if words[0].endswith(".py") else ["train_anomaly.py"]
            cells.append(Cell(name, [*script, *words], needs, weights))
    folders = Counter(Path(cell.name) for cell in cells)
    for folder, count in folders.items():
        if count > 1:
            raise errors.UserError(f"two of the sweep's cells would be called {folder}: rename one")
        if within := next((parent for parent in folder.parents if parent in folders), None):
            raise errors.UserError(f"the cell {folder} would be in the folder of the cell {within}: rename one")
    of_detectors = {name: variant for name, (_, variant) in detectors.items()}
    of_pretrainings = {name: variant for name, (_, variant) in pretrainings.items()}
    return Axes(list(cfg.tasks), of_detectors, of_pretrainings, list(cfg.seeds)), cells


def begins_with_file(words: list[str]) -> bool:
    return bool(words) and words[0].endswith((".yaml", ".yml", ".py"))


def varied(texts: dict[str, str], which: list[str], grid: dict) -> dict[str, tuple[list[str], list[str]]]:
    """{name: (its words, the grid's)}; `which` of the names are there once for each variant."""
    found = {}
    for name, text in texts.items():
        for end, words in variants(grid if name in which else {}):
            if name + end in found:
                raise errors.UserError(f"two of the sweep's cells would be called {errors.cut(name + end)}: rename one")
            found[name + end] = split(text), words
    return found


# -------------------------------------------------------------------- what is known before it runs


def check(cells: list[Cell]) -> dict[str, dict]:
    """{cell: its config}, resolved without running it; of a script that has none, its words and its YAML file's text.

    Raises:
        UserError: a config with a mistake, weights other than its pretraining's, or two cells that are the same.
    """
    configs, seen, unknown = {}, {}, {}
    for name, words, needs, weights in cells:
        try:
            found = scripts.config_of(words)
        except errors.UserError as error:
            raise errors.UserError(f"{errors.cut(name, 60)}: {error}") from None
        if found is None:
            unknown.setdefault(words[0], []).append(name)
            text = Path(words[1]).read_text() if len(words) > 1 and Path(words[1]).is_file() else ""
            found = {"words": [w for w in words if not w.startswith(("runs=", "run_name="))], "file": text}
        elif backbone := backbone_of(found):
            about = " ".join(w for w in words if re.match(r"backbone(\.name|\.weights)?=", w)) or "its YAML file"
            if weights != "any" and as_path(backbone["weights"]) != as_path(weights):
                raise errors.UserError(
                    f"{name}: backbone.weights would be {backbone['weights'] or 'none'}, but its pretraining gives "
                    f"{weights or 'none'}; {about} sets that: remove it from also, the detector or the task"
                )
            there = backbone_of(configs.get(needs or "", {})).get("name", backbone["name"])
            if backbone["name"] != there:
                raise errors.UserError(f"{name} has the backbone {backbone['name']}, its pretraining {there} ({about})")
            backbone["weights"] = needs or backbone["weights"]
        same = json.dumps([words[0], {key: value for key, value in found.items() if key not in ("runs", "run_name")}])
        if same in seen:
            raise errors.UserError(
                f"{name} and {seen[same]} are the same: something overrides the keys that tell them apart"
            )
        configs[name], seen[same] = found, name
    for script, names in unknown.items():
        line = f"{script} has no Config or schema(argv): {len(names)} cells are not checked before they run"
        print(line, file=sys.stderr)
    return configs


def backbone_of(resolved: dict) -> dict:
    """The backbone's section of a config, {} where there is none."""
    backbone = resolved.get("backbone")
    return backbone if isinstance(backbone, dict) and {"name", "weights"} <= {*backbone} else {}


def as_path(weights: str | None) -> Path | None:
    return None if weights is None or weights.lower() in ("none", "null", "") else Path(weights).expanduser()


def is_another(known: dict, record: dict, words: list[str]) -> bool:
    """Whether a run folder holds another cell than the record: keys that cannot change the result may differ, and keys
    that the folder is older than have their defaults."""
    if any(known[part] != record[part] for part in ("script", "pretraining")):
        return True
    schema = scripts.schema_of(words)
    before = config.completed(schema, known["config"]) if schema else known["config"]
    return bool(checkpoint.config_changes(before, record["config"]))


def script_decides(known: dict, record: dict, words: list[str]) -> bool:
    """Whether a cell that is done is given to its script, which repeats its results only if its images are the same."""
    roots = [config.flatten(of["config"]).get("data.root") or "" for of in (known, record)]
    return os.path.realpath(roots[0]) != os.path.realpath(roots[1]) or "resume=never" in words


def devices_of(cfg: Config, configs: dict[str, dict]) -> list[str]:
    """Where cells run, one at a time in each place: GPUs as CUDA_VISIBLE_DEVICES has them, `cpu`, or an empty text for
    one place that is as it is.

    Raises:
        UserError: `devices` beside a launcher, or beside a cell that names its device.
    """
    named = {str(its.get("device", "auto")): cell for cell, its in configs.items()}
    if not cfg.devices:
        if cfg.launcher or named.keys() - {"auto", "cuda"}:
            return [""]
        visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
        ids = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
        return [name.strip() for name in ids] or [""]
    if cfg.launcher:
        raise errors.UserError("devices gives each cell one device, and launcher gives a cell several: remove one")
    if fixed := next((name for name in named if name.startswith("cuda:")), None):
        raise errors.UserError(f"{named[fixed]} has device={fixed}, but devices gives each cell its own: remove one")
    return [*cfg.devices]


def environment(device: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device} if device else {}


# -------------------------------------------------------------------- a cell


def look(cell: Cell, top: Path, its_config: dict, policy: str) -> Work:
    """What is there of a cell, and whether it counts."""
    folder, note, script = top / cell.name, top / ".cells" / f"{cell.name}.json", scripts.path_of(cell.words[0])
    pretrained = results_of(top / cell.needs) if cell.needs else None
    record = {"script": cell.words[0], "config": its_config, "pretraining": pretrained and pretrained.read_text()}
    known = read_note(note)
    stale = another_version(made_by(folder, known), script) if known else ""
    anew = known is not None and (is_another(known, record, cell.words) or (stale != "" and policy == "rerun"))
    anew = anew or (known is None and cell.needs is not None and os.path.exists(note))  # whose results they are is lost
    done = bool(known and results_of(folder) and not anew and not script_decides(known, record, cell.words))
    version = known["version"] if known and not anew else code_version(script)
    return Work(cell, folder, note, record, version, done, anew, stale)


def make_ready(work: Work) -> str | None:
    """Remove what has to go and write the note; returns why that cannot be done."""
    if work.anew and (error := clear(work.folder)):
        return error
    with whole_file(work.note, durable=True) as file:
        json.dump(work.record | {"version": work.version}, file)
    return None


def outcome_of(work: Work, error: str | None, metrics: list[str], outcomes: dict[str, Outcome]) -> Outcome:
    """What a cell that is done or has ended gave, `error` if it failed."""
    written = None if error else results_of(work.folder)
    if written is None:
        error = error or f"{work.cell.words[0]} wrote no results.json in {work.folder}"
        print(f"    failed: {error} ({work.cell.name})", file=sys.stderr)
        return failed(work, error)
    results = with_numbers(read_results(written) or {}, metrics, written)
    script = scripts.path_of(work.cell.words[0])
    stale = another_version(made_by(work.folder, {"version": work.version}), script)
    needs = work.cell.needs
    return Outcome(results, config.flatten(work.record["config"]), bool(stale or (needs and outcomes[needs].stale)))


def failed(work: Work, error: str) -> Outcome:
    return Outcome({"error": error}, config.flatten(work.record["config"]))


def results_of(folder: Path) -> Path | None:
    """results.json of a run folder, or of the evaluation in it; one that is damaged does not count, nor one in a folder
    that is being emptied."""
    if os.path.exists(folder / REMOVING):
        return None
    found = sorted(folder.glob("results.json")) + sorted(folder.glob("eval_*/results.json"))
    return next((path for path in found if read_results(path) is not None), None)


def read_note(path: Path) -> dict | None:
    """What .cells/ has of a cell, None where it is not there or damaged: the cell's script then decides."""
    known = checkpoint.read_object(path) or {}
    kinds = {"script": str, "config": dict, "pretraining": str | None, "version": str}
    return known if all(key in known and isinstance(known[key], kind) for key, kind in kinds.items()) else None


def clear(folder: Path) -> str | None:
    """Remove what another config left in a cell's folder; returns why that cannot be done."""
    try:
        with locked(folder):
            empty(folder)
    except errors.UserError as error:
        return str(error)
    return None


def made_by(folder: Path, known: dict) -> str:
    """The version of the code that ended a cell, or of one that has not ended or does not say so, that began it."""
    results = results_of(folder)
    return ((read_results(results) or {}).get("version") if results else None) or known["version"]


def say(number: int, cells: list[Cell], began: float, text: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - began), 60)
    print(f"[{number}/{len(cells)}, {minutes}:{seconds:02d}] {text}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
