"""sweep.py before anything runs: what each cell is, and the mistakes that are found."""

import pytest

import sweep
from runtime.errors import UserError
from tests.images import TOP
from tests.sweeps import cells_of, make, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make(tmp_path)


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


def test_a_mistake_in_the_last_cell_is_found_before_the_first_runs(place):
    tasks = {f"t{i}": f"data.root=r{i}" for i in range(9)} | {"last": "data.rot=x"}
    with pytest.raises(UserError, match=r"last/a/random: unknown key 'data.rot', did you mean 'root'\?"):
        sweep.main([write(place, tasks=tasks)])
    with pytest.raises(UserError, match=r"part/b/random: .*no such|part/b/random: .*No such"):
        sweep.main([write(place, detectors={"a": "my_test.py x.yaml", "b": "my_test.py nothing.yaml"})])
    with pytest.raises(UserError, match=r"part/b/random: there is no script .*my_tset.py"):
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
        ({"also": "backbone.weights=x.pt"}, "part/a/random", "be x.pt, .* gives none; backbone.weights=x.pt sets"),
        ({"also": "backbone.weights=none", "pretraining": {"mine": "my_train.py x.yaml"}}, "part/a/mine",
         "be none, .* gives runs/grid/pretraining/mine/last.pt; backbone.weights=none sets"),
        ({"tasks": {"part": "backbone.weights=x.pt"}}, "part/a/random", "be x.pt, .* gives none"),
        ({"detectors": {"a": "my_test.py w.yaml"}}, "part/a/random", "be w.pt, .* gives none; its YAML file sets"),
        ({"pretraining": {"p": "backbone.weights=p.pt", "q": "backbone.weights=q.pt"}, "also": "backbone.weights=x.pt"},
         "part/a/p", "be x.pt, .* gives p.pt"),
        ({"pretraining": {"p": "backbone.weights=p.pt", "q": ""}, "detectors": {"a": "my_test.py w.yaml"}},
         "part/a/q", "be w.pt, .* gives none"),
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
        detectors={"patchcore": "configs/demo/patchcore_demo.yaml", "rd4ad": "configs/demo/rd4ad_demo.yaml"},
        tasks={task: f"data.root=x data.category={task}" for task in ("bottle", "tile", "screw")},
        also="backbone=resnet18",
        run_name="grid",
    )
    _, cells = sweep.plan(cfg)
    assert len(cells) == 3 + 24
    try:
        configs = sweep.check(cells)
    except UserError as error:
        assert "bottle/patchcore/simclr: backbone.weights would be none, but its pretraining gives runs/" in str(error)
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
