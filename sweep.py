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

Writes runs/<run_name>/results.md and results.csv, and a run folder for every cell, heat maps in it. A cell that fails
is in the table with its error, and the others still run.
"""

import runtime.threads  # before torch

import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from evaluation.sweep_table import Axes, Outcome, read_results, with_numbers, write_tables
from runtime import checkpoint, config, errors, scripts
from runtime.files import REMOVING, empty, lock, locked, unlock, whole_file
from runtime.values import PathText, Seed
from runtime.version import TOP, another_version, code_version


@dataclass(kw_only=True)
class Config:
    pretraining: dict[str, str]  # name: a YAML of train_ssl.py with overrides, or the backbone's overrides
    detectors: dict[str, str]  # name: a YAML of train_anomaly.py with overrides, or a script with its words
    tasks: dict[str, str]  # name: overrides that say what data it is
    also: str = ""  # further overrides for every command
    grid: dict = field(default_factory=dict)  # {key: list of values} of which every combination is run
    seeds: list[Seed] = field(default_factory=list)
    # run every cell, pretraining included, with each of these; the table has mean and deviation
    stale: Literal["keep", "rerun"] = "keep"  # what happens to cells that another version of the code made
    metrics: list[str] = field(default_factory=lambda: ["image_auroc"])  # of results.json, rows of the table
    mean: bool = False  # add rows with the mean over the tasks, for one class after the other as the normal one
    launcher: str = ""  # for example torchrun --nproc_per_node=4; empty: one process for each cell
    runs: PathText = "runs"  # folder of all runs
    run_name: str  # folder below it; the name of the YAML file unless given


MOST_VARIANTS = 10_000  # combinations of a grid's values


class Cell(NamedTuple):
    name: str  # its run folder below the sweep's
    words: list[str]  # of its command line: script, YAML file, overrides
    needs: str | None = None  # the pretraining run that must be there first
    weights: str | None = "any"  # what backbone.weights must be in its config; any: nothing is required


def main(argv: list[str]) -> None:
    cfg = load(argv)
    top, (axes, cells) = config.run_folder(cfg), plan(cfg)
    configs = check(cells)
    lock(top, ".cells")
    server = multiprocessing.get_context("forkserver")  # each cell a fresh process, but torch and ours imported once
    ours = [name for name in sys.modules if (TOP / name.partition(".")[0] / "__init__.py").exists()]
    server.set_forkserver_preload(ours)
    began, outcomes = time.perf_counter(), {}
    for number, (name, words, needs, _) in enumerate(cells, 1):
        folder, script = top / name, scripts.path_of(words[0])
        # says what is in the folder; not inside it, because resume=never removes that
        note = top / ".cells" / f"{name}.json"
        keys = config.flatten(configs[name])
        if needs and "error" in outcomes[needs].results:
            outcomes[name] = Outcome({"error": f"its pretraining {needs} failed"}, keys)
            continue
        pretrained = results_of(top / needs) if needs else None
        record = {"script": words[0], "config": configs[name], "pretraining": pretrained and pretrained.read_text()}
        known = read_note(note)
        stale = another_version(made_by(folder, known), script) if known else ""
        anew = known is not None and (is_another(known, record, words) or (stale != "" and cfg.stale == "rerun"))
        anew = anew or (known is None and needs is not None and os.path.exists(note))  # whose results they are is lost
        if known and results_of(folder) and not anew and not script_decides(known, record, words):
            say(number, cells, began, f"{name}: done before{stale and f', by {stale}; stale=rerun runs it anew'}")
        else:
            say(number, cells, began, f"{name}: python {shlex.join(words)}")
            version = known["version"] if known and not anew else code_version(script)
            error = clear(folder) if anew else None
            if not error:
                with whole_file(note, durable=True) as file:
                    json.dump(record | {"version": version}, file)
                error = scripts.run(words, cfg.launcher, server)
            if error or not results_of(folder):
                error = error or f"{words[0]} wrote no results.json in {folder}"
                outcomes[name] = Outcome({"error": error}, keys)
                print(f"    failed: {error}", file=sys.stderr)
                continue
            stale = another_version(made_by(folder, {"version": version}), script)
        written = results_of(folder)
        assert written is not None  # else it has failed, above
        results = with_numbers(read_results(written) or {}, cfg.metrics, written)
        outcomes[name] = Outcome(results, keys, bool(stale or (needs and outcomes[needs].stale)))

    print(write_tables(top, cfg.run_name, axes, outcomes, cfg.metrics, cfg.mean))
    images = f"{top}/*/*/*{'/*' if cfg.seeds else ''}/heatmaps.png"
    print(f"{top}/results.md, {top}/results.csv; images: {images}; curves: tensorboard --logdir {top}")
    failed = [name for name, outcome in outcomes.items() if "error" in outcome.results]
    stale = [name for name, outcome in outcomes.items() if outcome.stale]
    unlock(top)
    print(json.dumps({"cells": len(outcomes), "failed": failed, "stale": stale, "table": str(top / "results.md")}))
    if failed:
        sys.exit(1)


# -------------------------------------------------------------------- what is to be run


def load(argv: list[str]) -> Config:
    """The config, the command line's `also=` added to the YAML's, the grid's seeds moved to where seeds are."""
    further = [word.removeprefix("also=") for word in argv if word.startswith("also=")]
    cfg = config.load(Config, [word for word in argv if not word.startswith("also=")])
    cfg.also = shlex.join(config.overlay(*map(split, [cfg.also, *further])))
    cfg.grid = config.flatten(cfg.grid)  # sections are dotted keys as well
    if "seeds" in cfg.grid:
        if cfg.seeds:
            raise errors.UserError("seeds and grid.seeds are the same key: give one of them")
        cfg.seeds = config.coerce(cfg.grid.pop("seeds"), list[Seed], "grid.seeds")
    return cfg


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


def split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise errors.UserError(f"`{errors.cut(text)}` cannot be split into words: {error}") from None


def variants(grid: dict) -> list[tuple[str, list[str]]]:
    """(end of a run folder's name, words of a command line) of each combination; one of nothing for an empty grid.

    `{"optim.lr": [0.03, 0.3], "method": ["byol"]}` gives `_lr-0.03_method-byol` with `optim.lr=0.03 method=byol`, ...
    """
    keys = [key.removesuffix(".name") for key in grid]
    short = [key.rpartition(".")[2] for key in keys]
    short = [last if short.count(last) == 1 else key for last, key in zip(short, keys)]
    found, lists = [], [spelled(key, values) for key, values in grid.items()]
    if math.prod(map(len, lists)) > MOST_VARIANTS:
        raise errors.UserError(f"the grid has more than {MOST_VARIANTS} combinations of values: remove some")
    for values in itertools.product(*lists):
        name = "".join(f"_{key}-{value}" for key, value in zip(short, values))
        found.append((folder_name(name), [f"{key}={value}" for key, value in zip(grid, values)]))
    return found


def spelled(key: str, values) -> list[str]:
    """The values of one of the grid's keys as a command line spells them; a list in the list is one value."""
    if isinstance(values, str):
        values = [value.strip() for value in values.split(",") if value.strip()]
    lists = [v if isinstance(v, list) else [v] for v in (values if isinstance(values, list) else [values])]
    texts = [",".join(_text(part) for part in parts) for parts in lists]
    if not texts or len({*texts}) < len(texts):
        raise errors.UserError(f"grid.{errors.cut(key)}={errors.shown(values)} must be a list of different values")
    return texts


def _text(value) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def folder_name(text: str) -> str:
    """`text` as part of a folder's name on any system; a hash stands for characters that such a name
    cannot have and for what is beyond 80 characters."""
    safe = re.sub(r"[^\w.,+-]", "_", text)[:80]
    return safe if safe == text else f"{safe}-{sha256(text.encode()).hexdigest()[:6]}"


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
