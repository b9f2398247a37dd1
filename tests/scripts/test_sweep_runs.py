"""sweep.py with a script that takes no time: what is run anew, and what the tables say."""

import json
import shutil

import pytest

import sweep
from runtime import version
from tests.sweeps import SCRIPT, YAML, calls, edit, make, rows_of, table_of, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make(tmp_path)


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
    table = table_of(place / "runs" / "grid")
    assert "| 0.100* | 0.100* |" in table and "stale=rerun" in table and "| mine |" in table
    rows = rows_of(place)
    assert [rows[name]["stale"] for name in names] == ["", "yes", "yes", "yes", "yes"]
    last, done = run(place, capfd, stale="rerun")
    assert done == dict.fromkeys(names, "run") | {"pretraining/mine": "done"} and last["stale"] == []
    assert "*" not in table_of(place / "runs" / "grid")
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
    table = table_of(place / "runs" / "grid")
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
    lines = table_of(place / "runs" / "grid").splitlines()
    table = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert ["pretraining", "optim.lr", "method", "steps", "loss", "knn20_top1", "seconds", "error"] in table
    assert ["mine_lr-0.7/seed1", "0.7"] in [row[:2] for row in table]
    assert ["task", "detector", "metric", "random", "mine_lr-0.5", "mine_lr-0.7"] in table
    rows = rows_of(place)
    assert {"optim.lr", "k", "seed", "data.root", "backbone.weights"} <= set(rows["part/a/random/seed0"])
    assert not {"flag", "run_name", "runs", "data.workers"} & set(rows["part/a/random/seed0"])
    assert rows["part/b/mine_lr-0.7/seed1"]["k"] == "2"
    assert rows["pretraining/mine_lr-0.7/seed1"]["optim.lr"] == "0.7"
    assert rows["part/a/mine_lr-0.7/seed1"]["backbone.weights"] == "pretraining/mine_lr-0.7/seed1"

    run(place, capfd, grid={"k": [3, 4]}, pretraining={"random": ""}, detectors={"a": "my_test.py x.yaml"}, mean=True)
    lines = table_of(place / "runs" / "grid").splitlines()
    table = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert ["task", "detector", "k", "metric", "random"] in table
    assert ["part", "a_k-4", "4", "image_auroc", "0.400"] in table
    assert ["mean", "a_k-4", "4", "image_auroc", "0.400"] in table
    assert rows_of(place)["part/a_k-4/random"]["k"] == "4"


def test_a_script_without_a_config_is_run_unchecked(place, capfd):
    text = SCRIPT.replace("class Config", "class _Config").replace("(Config", "(_Config")
    (place / "free.py").write_text(text.replace(', "version": code_version()', ""))
    keys = {"pretraining": {"mine": "free.py x.yaml"}, "detectors": {"a": "free.py x.yaml k=3"}}
    sweep.main([write(place, **keys)])
    assert "free.py has no Config or schema(argv): 2 cells are not checked before they run" in capfd.readouterr().err
    assert calls(place) == {"part/a/mine": 1, "pretraining/mine": 1} and rows_of(place)["part/a/mine"]["stale"] == ""
    sweep.main([write(place, **keys)])
    assert capfd.readouterr().err.count("done before") == 2
    (place / "x.yaml").write_text(YAML + "k: 2")
    sweep.main([write(place, **keys)])
    assert calls(place) == {"part/a/mine": 1, "pretraining/mine": 1}  # made anew
    assert "done before" not in capfd.readouterr().err


def test_a_script_that_leaves_no_results_has_failed(place, capfd):
    (place / "silent.py").write_text("def main(argv):\n    pass\n")
    with pytest.raises(SystemExit):
        sweep.main([write(place, pretraining={"mine": "silent.py x.yaml"})])
    rows = rows_of(place)
    assert rows["pretraining/mine"]["error"] == "silent.py wrote no results.json in runs/grid/pretraining/mine"
    assert rows["part/a/mine"]["error"] == "its pretraining pretraining/mine failed"
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["failed"] == list(rows)
