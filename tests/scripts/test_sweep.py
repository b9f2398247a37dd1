"""sweep.py with scripts that take no time: what each cell is, what is checked before, what is run anew, the tables."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import sweep
from tests.pictures import TOP
from training import config, grid, version
from training.errors import UserError

SCRIPT = """
import json, time
from dataclasses import dataclass, field
from pathlib import Path

from training import config
from training.version import code_version


def network():
    pass


@dataclass(kw_only=True)
class Backbone:
    name: str = config.choice(dict.fromkeys(["small", "x", "y"], network))
    weights: str | None = None
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Data:
    root: str = "pictures"
    workers: int = 0


@dataclass(kw_only=True)
class Optim:
    lr: float = 0.1


@dataclass(kw_only=True)
class Config:
    backbone: Backbone
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    k: int = 1
    flag: bool = False
    seed: int = 0
    resume: str = "auto"
    runs: str = "runs"
    run_name: str


def main(argv):
    cfg = config.load(Config, argv)
    folder = config.run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as file:
        file.write("called\\n")
    read = Path(cfg.backbone.weights).read_text() if cfg.backbone.weights else "random"
    if cfg.k < 0:
        raise ValueError("k is negative")
    (folder / "last.pt").write_text(f"lr {cfg.optim.lr} seed {cfg.seed}")
    results = {"image_auroc": cfg.k / 10, "read": read, "time": time.time(), "version": code_version()}
    (folder / "results.json").write_text(json.dumps(results))
"""


YAML = "backbone: {name: small}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with my_train.py, its copy my_test.py and a YAML file; the sweep is run in it."""
    for name in ("my_train.py", "my_test.py"):
        (tmp_path / name).write_text(SCRIPT)
    (tmp_path / "x.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BASE = {
    "pretraining": {"random": "", "mine": "my_train.py x.yaml"},
    "detectors": {"a": "my_test.py x.yaml", "b": "my_test.py x.yaml k=2"},
    "tasks": {"part": "data.root=part"},
    "run_name": "grid",
}


def write(place: Path, **keys) -> str:
    (place / "sweep.yaml").write_text(json.dumps(BASE | keys))  # JSON is YAML
    return "sweep.yaml"


def cells_of(place, words=(), **keys):
    _, cells = sweep.plan(sweep.load([write(place, **keys), *words]))
    return {cell.name: cell.words for cell in cells}, sweep.check(cells)


def rows_of(place) -> dict[str, dict]:
    with open(place / "runs" / "grid" / "results.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def calls(place) -> dict[str, int]:
    """How often each cell was run since its folder was made."""
    top = place / "runs" / "grid"
    return {str(f.parent.relative_to(top)): len(f.read_text().split()) for f in sorted(top.rglob("calls"))}


def edit(script):
    script.write_text(script.read_text() + "# edited\n")
    version._script_hash.cache_clear()  # a sweep reads a script once


# -------------------------------------------------------------------- also, grid


def test_also_of_the_command_line_adds_to_that_of_the_yaml(place):
    one = {"detectors": {"a": "my_test.py x.yaml k=8"}}
    words, configs = cells_of(place, ["also=optim.lr=0.5 k=7", "also=flag=true"], also="k=3 seed=4", **one)
    assert len(words) == 3
    for name in words:
        assert [configs[name][key] for key in ("k", "seed", "flag")] == [7, 4, True]
        assert configs[name]["optim"]["lr"] == 0.5
        assert sum(word.startswith("k=") for word in words[name]) == 1, "a key twice is an error of the script"
    assert cells_of(place, also="flag=true")[1]["part/b/random"]["k"] == 2
    assert cells_of(place, ["also=data.root='a b'"])[1]["part/b/random"]["data"]["root"] == "a b"
    with pytest.raises(UserError, match=r"`k='3` cannot be split"):
        cells_of(place, ["also=k='3"])


def test_a_grid_is_the_product_of_its_values_for_pretraining_runs(place):
    values = {"optim.lr": [0.03, 0.3], "flag": [True, False], "seeds": [0, 1]}
    words, configs = cells_of(place, grid=values, also="optim.lr=9")
    names = [f"lr-{lr}_flag-{flag}" for lr in ("0.03", "0.3") for flag in ("true", "false")]
    runs = [f"mine_{name}/seed{seed}" for name in names for seed in (0, 1)]
    assert [name for name in words if name.startswith("pretraining/")] == [f"pretraining/{run}" for run in runs]
    assert len(words) == 8 + 2 * (8 + 2)  # random weights are no run, and are there once for each seed
    for run in runs:
        its = configs[f"pretraining/{run}"]
        assert f"lr-{its['optim']['lr']}_flag-{str(its['flag']).lower()}/seed{its['seed']}" in run
        cell = configs[f"part/a/{run}"]
        assert cell["backbone"]["weights"] == f"pretraining/{run}"
        assert (cell["optim"]["lr"], cell["seed"], cell["flag"]) == (9, its["seed"], False)


def test_a_grid_without_pretraining_runs_is_of_the_detectors(place):
    detectors = {"a": "my_test.py x.yaml k=8", "b": "my_test.py x.yaml flag=true"}
    _, configs = cells_of(place, pretraining={"random": ""}, detectors=detectors, grid={"k": [3, 4]}, also="k=9")
    assert {name: its["k"] for name, its in configs.items()} == {
        f"part/{detector}_k-{k}/random": k for detector in "ab" for k in (3, 4)
    }


def test_the_grids_backbone_is_that_of_the_detectors_too(place):
    _, configs = cells_of(place, grid={"backbone.name": ["x", "y"]}, pretraining={"mine": "my_train.py x.yaml"})
    assert {name: its["backbone"]["name"] for name, its in configs.items()} == {
        f"{where}/mine_backbone-{name}": name for where in ("pretraining", "part/a", "part/b") for name in "xy"
    }


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ({}, [""], [[]]),
        ({"optim.lr": 0.1}, ["_lr-0.1"], [["optim.lr=0.1"]]),
        ({"a.x": ["1"], "b.x": [2]}, ["_a.x-1_b.x-2"], [["a.x=1", "b.x=2"]]),
        ({"method.name": "a, b"}, ["_method-a", "_method-b"], [["method.name=a"], ["method.name=b"]]),
        ({"scale": [[0.2, 1], None]}, ["_scale-0.2,1", "_scale-none"], [["scale=0.2,1"], ["scale=none"]]),
    ],
)  # fmt: skip
def test_how_variants_are_spelled(values, names, words):
    assert grid.variants(values) == list(zip(names, words))


def test_names_of_variants_are_names_of_folders(tmp_path):
    values = ["a/b", "a:b", "a b", "../..", "x" * 300, "x" * 301, "é" * 300]
    names = [name for name, _ in grid.variants({"data.root": values})]
    assert len({*names}) == len(values) and names[0].startswith("_root-a_b-")
    for name in names:
        (tmp_path / f"part{name}").mkdir()
        assert (tmp_path / f"part{name}").parent == tmp_path and not set(name) & set('/\\:*?"<>| =')


def test_mistakes_in_a_grid(place):
    for values in ([], ["1", 1]):
        with pytest.raises(UserError, match=r"grid\.optim\.lr=.* must be a list of different values"):
            cells_of(place, grid={"optim.lr": values})
    with pytest.raises(UserError, match=r"seeds and grid\.seeds"):
        cells_of(place, grid={"seeds": [0]}, seeds=[1])
    with pytest.raises(UserError, match=r"called mine_k-1: rename one"):
        cells_of(place, grid={"k": [1]}, pretraining={"mine": "my_train.py x.yaml", "mine_k-1": ""})
    with pytest.raises(UserError, match=r"pretraining/mine_optim-3: .*optim"):
        cells_of(place, grid={"optim": [3]})
    assert len(cells_of(place, ["grid.optim.lr=1,2"])[0]) == 2 + 2 * 3


# -------------------------------------------------------------------- what is checked before the first cell runs


def test_a_mistake_in_the_last_cell_is_found_before_the_first_runs(place):
    tasks = {f"t{i}": f"data.root=r{i}" for i in range(9)} | {"last": "data.rot=x"}
    with pytest.raises(UserError, match=r"last/a/random: unknown key 'data.rot', did you mean 'root'\?"):
        sweep.main([write(place, tasks=tasks)])
    with pytest.raises(UserError, match=r"part/b/random: .*no such|part/b/random: .*No such"):
        sweep.main([write(place, detectors={"a": "my_test.py x.yaml", "b": "my_test.py nothing.yaml"})])
    with pytest.raises(UserError, match=r"part/b/random: .*my_tset.py is not there"):
        sweep.main([write(place, detectors={"a": "my_test.py x.yaml", "b": "my_tset.py x.yaml"})])
    (place / "broken.py").write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match=r"part/b/random: broken.py cannot be imported: ModuleNotFoundError"):
        sweep.main([write(place, detectors={"a": "my_test.py x.yaml", "b": "broken.py x.yaml"})])
    (place / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"part/b/random: empty.py has no main"):
        sweep.main([write(place, detectors={"a": "my_test.py x.yaml", "b": "empty.py x.yaml"})])
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("keys", "cell", "why"),
    [
        ({"also": "backbone.weights=x.pt"}, "part/a/random", "be x.pt, .* means none; backbone.weights=x.pt does"),
        ({"also": "backbone.weights=none", "pretraining": {"mine": "my_train.py x.yaml"}}, "part/a/mine",
         "be none, .* means runs/grid/pretraining/mine/last.pt; backbone.weights=none does"),
        ({"tasks": {"part": "backbone.weights=x.pt"}}, "part/a/random", "be x.pt, .* means none"),
        ({"detectors": {"a": "my_test.py w.yaml"}}, "part/a/random", "be w.pt, .* means none; its YAML file does"),
        ({"pretraining": {"p": "backbone.weights=p.pt", "q": "backbone.weights=q.pt"}, "also": "backbone.weights=x.pt"},
         "part/a/p", "be x.pt, .* means p.pt"),
        ({"pretraining": {"p": "backbone.weights=p.pt", "q": ""}, "detectors": {"a": "my_test.py w.yaml"}},
         "part/a/q", "be w.pt, .* means none"),
    ],
)  # fmt: skip
def test_the_weights_of_a_cell_are_what_its_pretraining_means(keys, cell, why, place):
    (place / "w.yaml").write_text("backbone: {name: small, weights: w.pt}")
    with pytest.raises(UserError, match=f"^{cell}: backbone.weights would {why}"):
        cells_of(place, **keys)


def test_weights_may_come_from_elsewhere_if_no_pretraining_has_any(place):
    (place / "w.yaml").write_text("backbone: {name: small, weights: w.pt}")
    keys = {"pretraining": {"imagenet": "backbone.name=x"}, "detectors": {"a": "my_test.py w.yaml"}}
    assert cells_of(place, **keys)[1]["part/a/imagenet"]["backbone"] == {"name": "x", "weights": "w.pt"}
    keys["also"] = "backbone.weights=~/w.pt"
    assert "w.pt" in cells_of(place, **keys)[1]["part/a/imagenet"]["backbone"]["weights"]
    keys = {"pretraining": {"random": "backbone.weights=none", "p": "backbone.weights=~/p.pt"}}
    configs = cells_of(place, **keys, detectors={"a": "my_test.py w.yaml"})[1]
    assert configs["part/a/random"]["backbone"]["weights"] is None


def test_24_cells_do_not_show_random_weights_under_the_names_of_pretrainings(monkeypatch):
    """`also: backbone=resnet18` once replaced the section with the weights in it, in every column, in silence."""
    monkeypatch.chdir(TOP)
    pretraining = {m: f"configs/cpu_cifar10.yaml method={m} data.root=x" for m in ("simclr", "supcon", "vicreg")}
    cfg = sweep.Config(
        pretraining=pretraining | {"random": ""},
        detectors={"patchcore": "configs/patchcore_demo.yaml", "rd4ad": "configs/rd4ad_demo.yaml"},
        tasks={task: f"data.root=x data.category={task}" for task in ("bottle", "tile", "screw")},
        also="backbone=resnet18",
        run_name="grid",
    )
    _, cells = sweep.plan(cfg)
    assert len(cells) == 3 + 24
    try:
        configs = sweep.check(cells)
    except UserError as error:
        assert "bottle/patchcore/simclr: backbone.weights would be none, but its pretraining means runs/" in str(error)
        assert "backbone=resnet18 does that" in str(error)
    else:
        for cell in cells:
            assert configs[cell.name]["backbone"]["weights"] == cell.needs, cell


def test_two_cells_that_are_the_same_are_a_mistake(place):
    with pytest.raises(UserError, match=r"part/b/random and part/a/random are the same"):
        cells_of(place, also="k=5")
    with pytest.raises(UserError, match=r"other/a/random and part/a/random are the same"):
        cells_of(place, tasks={"part": "data.root=part", "other": ""}, also="data.root=x")
    with pytest.raises(UserError, match=r"part/a/mine has the backbone x, its pretraining y \(backbone.name=x"):
        detectors = {"a": "my_test.py x.yaml backbone.name=x"}
        cells_of(place, pretraining={"mine": "my_train.py x.yaml backbone.name=y"}, detectors=detectors)


def test_a_script_without_a_config_is_run_unchecked(place, capfd):
    text = SCRIPT.replace("class Config", "class _Config").replace("(Config", "(_Config")
    (place / "free.py").write_text(text.replace(', "version": code_version()', ""))
    keys = {"pretraining": {"mine": "free.py x.yaml"}, "detectors": {"a": "free.py x.yaml k=3"}}
    sweep.main([write(place, **keys)])
    assert "free.py does not show its config: 2 cells are not checked before they run" in capfd.readouterr().err
    assert calls(place) == {"part/a/mine": 1, "pretraining/mine": 1} and rows_of(place)["part/a/mine"]["stale"] == ""
    sweep.main([write(place, **keys)])
    assert capfd.readouterr().err.count("done before") == 2
    (place / "x.yaml").write_text(YAML + "k: 2")
    sweep.main([write(place, **keys)])
    assert calls(place) == {"part/a/mine": 1, "pretraining/mine": 1}  # made anew
    assert "done before" not in capfd.readouterr().err


# -------------------------------------------------------------------- what is run anew, and what the tables say


def run(place, capfd, words=(), **keys):
    """The last line's values, and for each cell what was done: `run` or `done`."""
    sweep.main([write(place, **keys), *words])
    out, err = capfd.readouterr()
    lines = [line.split("] ", 1)[1].split(": ", 1) for line in err.splitlines() if line.startswith("[")]
    return json.loads(out.splitlines()[-1]), {
        name: "run" if text.startswith("python") else "done" for name, text in lines
    }


def test_what_is_done_stays_unless_something_that_counts_changed(place, capfd):
    keys = {"grid": {"optim.lr": [0.5, 0.7]}, "detectors": {"a": "my_test.py x.yaml"}}
    last, done = run(place, capfd, **keys)
    names = [
        "pretraining/mine_lr-0.5",
        "pretraining/mine_lr-0.7",
        "part/a/random",
        "part/a/mine_lr-0.5",
        "part/a/mine_lr-0.7",
    ]
    assert done == dict.fromkeys(names, "run") and last["failed"] == last["stale"] == []
    rows = rows_of(place)
    assert [rows[name]["read"] for name in names[2:]] == ["random", "lr 0.5 seed 0", "lr 0.7 seed 0"]

    everything = dict.fromkeys(names, "done")
    assert run(place, capfd, **keys)[1] == everything
    for harmless in ("data.workers=3", "resume=auto"):
        assert run(place, capfd, also=harmless, **keys)[1] == everything, harmless
    assert run(place, capfd, [f"runs={place}/runs"], **keys)[1] == everything
    assert run(place, capfd, **keys | {"tasks": {"part": f"data.root={place}/./part"}})[1] == everything
    assert set(calls(place).values()) == {1}

    # another place of the images: the scripts look whether they are the same ones
    moved = run(place, capfd, **keys | {"tasks": {"part": "data.root=moved"}})[1]
    assert moved == everything | dict.fromkeys(names[2:], "run") and calls(place)["part/a/random"] == 2
    assert run(place, capfd, also="resume=never", **keys)[1] == dict.fromkeys(names, "run")

    # other results of a pretraining: its cells run anew, others do not
    (place / "runs" / "grid" / names[0] / "results.json").unlink()
    assert run(place, capfd, also="resume=never", **keys)[1] == dict.fromkeys(names, "run")
    run(place, capfd, **keys)
    shutil.rmtree(place / "runs" / "grid" / names[0])
    assert run(place, capfd, **keys)[1] == everything | {names[0]: "run", "part/a/mine_lr-0.5": "run"}
    # a key that counts
    (place / "x.yaml").write_text(YAML + "flag: true")
    assert run(place, capfd, **keys)[1] == dict.fromkeys(names, "run") and set(calls(place).values()) == {1}


def test_results_of_another_version_are_marked_and_made_anew_on_demand(place, capfd):
    last, _ = run(place, capfd)
    names = ["pretraining/mine", "part/a/random", "part/a/mine", "part/b/random", "part/b/mine"]
    assert list(rows_of(place)) == names and last["stale"] == []
    made_by = rows_of(place)["part/a/mine"]["version"]
    assert made_by == version.code_version(place / "my_test.py")

    edit(place / "my_test.py")
    last, done = run(place, capfd)
    assert set(done.values()) == {"done"} and last["stale"] == names[1:]
    table = (place / "runs" / "grid" / "results.md").read_text()
    assert "| 0.100* | 0.100* |" in table and "stale=rerun" in table and "| mine  " in table
    rows = rows_of(place)
    assert [rows[name]["stale"] for name in names] == ["", "yes", "yes", "yes", "yes"]
    last, done = run(place, capfd, stale="rerun")
    assert done == dict.fromkeys(names, "run") | {"pretraining/mine": "done"} and last["stale"] == []
    assert "*" not in (place / "runs" / "grid" / "results.md").read_text()
    assert rows_of(place)["part/a/mine"]["version"] == version.code_version(place / "my_test.py") != made_by

    edit(place / "my_train.py")
    last, done = run(place, capfd)
    assert set(done.values()) == {"done"}
    assert last["stale"] == ["pretraining/mine", "part/a/mine", "part/b/mine"]  # what stands on it as well
    last, done = run(place, capfd, stale="rerun")
    assert done == dict.fromkeys(names, "run") | {"part/a/random": "done", "part/b/random": "done"}
    assert last["stale"] == [] and set(calls(place).values()) == {1}


def test_one_stale_seed_marks_the_mean(place, capfd):
    keys = {"seeds": [0, 1], "mean": True, "pretraining": {"random": ""}, "detectors": {"a": "my_test.py x.yaml k=3"}}
    run(place, capfd, **keys)
    path = place / "runs" / "grid" / "part" / "a" / "random" / "seed1" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "bc5813abcd"}))
    assert run(place, capfd, **keys)[0]["stale"] == ["part/a/random/seed1"]
    table = (place / "runs" / "grid" / "results.md").read_text()
    assert table.count("| 0.300 ± 0.000* |") == 2  # the cell, and the mean over the tasks


def test_what_was_begun_by_another_version_is_not_resumed_with_rerun(place, capfd):
    (place / "x.yaml").write_text(YAML + "k: -1")
    keys = {"pretraining": {"random": ""}, "detectors": {"a": "my_test.py x.yaml"}}
    for words in ([], []):
        with pytest.raises(SystemExit):
            run(place, capfd, words, **keys)
        assert "| ValueError: k is negative |" in capfd.readouterr().out
    assert calls(place) == {"part/a/random": 2}  # the same cell goes on
    edit(place / "my_test.py")
    with pytest.raises(SystemExit):
        run(place, capfd, ["stale=rerun"], **keys)
    assert calls(place) == {"part/a/random": 1}


def test_the_tables_show_the_keys_that_differ(place, capfd):
    run(place, capfd, grid={"optim.lr": [0.5, 0.7], "seeds": [0, 1]})
    lines = (place / "runs" / "grid" / "results.md").read_text().splitlines()
    table = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert ["pretraining", "optim.lr", "method", "steps", "loss", "knn20_top1", "seconds", "error"] in table
    assert ["mine_lr-0.7/seed1", "0.7"] in [row[:2] for row in table]
    assert ["task", "detector", "figure", "random", "mine_lr-0.5", "mine_lr-0.7"] in table
    rows = rows_of(place)
    assert {"optim.lr", "k", "seed", "data.root", "backbone.weights"} <= set(rows["part/a/random/seed0"])
    assert not {"flag", "run_name", "runs", "data.workers"} & set(rows["part/a/random/seed0"])
    assert rows["part/b/mine_lr-0.7/seed1"]["k"] == "2"
    assert rows["pretraining/mine_lr-0.7/seed1"]["optim.lr"] == "0.7"
    assert rows["part/a/mine_lr-0.7/seed1"]["backbone.weights"] == "pretraining/mine_lr-0.7/seed1"

    run(place, capfd, grid={"k": [3, 4]}, pretraining={"random": ""}, detectors={"a": "my_test.py x.yaml"}, mean=True)
    lines = (place / "runs" / "grid" / "results.md").read_text().splitlines()
    table = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert ["task", "detector", "k", "figure", "random"] in table
    assert ["part", "a_k-4", "4", "image_auroc", "0.400"] in table
    assert ["mean", "a_k-4", "4", "image_auroc", "0.400"] in table
    assert rows_of(place)["part/a_k-4/random"]["k"] == "4"
    assert config.load(sweep.Config, ["sweep.yaml"]).grid == {"k": [3, 4]}
