"""The code is part of a result: any edit of it changes the version, nothing else does, and another is reported."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import predict
import train_anomaly
from runtime import version
from runtime.checkpoint import LAST, load, open_run, save
from tests.images import TOP, write_mvtec


@pytest.fixture
def repository(tmp_path):
    """A small one: two packages, a script that prints its version, a module and a folder that it imports, a test."""
    top = tmp_path / "repository"
    files = {
        "losses/__init__.py": "", "losses/deep/ntxent.py": "x = 1\n", "runtime/__init__.py": "",
        "mine.py": "import sub.part\n", "sub/part.py": "y = 2\n", "other.py": "z = 3\n", "README.md": "words\n",
        "tests/__init__.py": "", "tests/test_a.py": "", "benchmarks/step.py": "",
        "my_train.py": "import mine\nfrom runtime.version import code_version\nprint(code_version())\n",
    }  # fmt: skip
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    shutil.copy(TOP / "runtime" / "version.py", top / "runtime")
    git(top, "init", "-q")
    commit(top)
    return top


def git(top, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=top, check=True, stdout=subprocess.DEVNULL)


def commit(top):
    git(top, "add", "--", "*.py", "README.md")
    git(top, "commit", "-qm", "all")


def printed(top, script="my_train.py", cwd=None):
    """Commit, hash of the packages and hash of the script, as a run of the script prints them."""
    done = subprocess.run(
        [sys.executable, "-S", str(top / script)], cwd=cwd or top, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert re.fullmatch(r"(unknown|[0-9a-f]{10}\+?) [0-9a-f]{8}\.[0-9a-f]{8}\n", done.stdout), done.stdout
    commit, hashes = done.stdout.split()
    return commit, *hashes.split(".")


def test_what_changes_the_version_and_what_does_not(repository, tmp_path):
    commit_of, packages, own = first = printed(repository)
    assert not commit_of.endswith("+") and printed(repository, cwd=tmp_path) == first
    (repository / "README.md").write_text("other words\n")
    assert printed(repository) == (commit_of + "+", packages, own)
    commit(repository)
    assert printed(repository)[0] != commit_of and printed(repository)[1:] == (packages, own)
    for name in ("tests/test_a.py", "benchmarks/step.py", "other.py", "losses/notes.txt"):
        (repository / name).write_text("q = 9\n")
        assert printed(repository)[1:] == (packages, own), name
    shutil.copytree(repository, tmp_path / "elsewhere" / "moved")
    assert printed(tmp_path / "elsewhere" / "moved")[1:] == (packages, own)
    shutil.rmtree(tmp_path / "elsewhere" / "moved" / ".git")
    assert printed(tmp_path / "elsewhere" / "moved") == ("unknown", packages, own)
    shutil.copy(repository / "my_train.py", repository / "copied.py")
    assert printed(repository, "copied.py")[1:] == (packages, own)

    seen = {packages}
    (repository / "losses" / "deep" / "ntxent.py").write_text("x = 2\n")
    seen.add(printed(repository)[1])
    (repository / "losses" / "new.py").write_text("")  # that git does not know
    seen.add(printed(repository)[1])
    os.rename(repository / "losses" / "new.py", repository / "losses" / "renamed.py")
    seen.add(printed(repository)[1])
    (repository / "mypackage").mkdir()
    (repository / "mypackage" / "__init__.py").write_text("")
    seen.add(printed(repository)[1])
    assert len(seen) == 5 and printed(repository)[2] == own
    packages, seen = printed(repository)[1], {own}
    for name, text in (("my_train.py", "import mine\n"), ("mine.py", "w = 1\n"), ("sub/part.py", "y = 3\n")):
        (repository / name).write_text(text + (repository / name).read_text())
        seen.add(printed(repository)[2])
    assert len(seen) == 4 and printed(repository)[1] == packages


def test_an_edit_while_a_script_runs_is_not_in_its_version(repository, monkeypatch):
    script = repository / "my_train.py"
    edit = "import os, pathlib\nif 'EDIT' in os.environ:\n    pathlib.Path(__file__).write_text('other code')\n"
    script.write_text(script.read_text().replace("print(", edit + "print("))
    before = printed(repository)
    monkeypatch.setenv("EDIT", "")
    assert printed(repository)[1:] == before[1:] and script.read_text() == "other code"


def test_files_that_are_none_do_not_stop_a_run(repository):
    before = printed(repository)
    os.symlink("nowhere", repository / "losses" / ".#ntxent.py")  # an editor's lock
    (repository / "losses" / "folder.py").mkdir()
    assert printed(repository)[1:] == before[1:]
    (repository / "mine.py").write_text("this is no Python\n")
    assert version._imported(repository / "mine.py") == []


def test_two_versions_of_one_run(monkeypatch):
    """A run that one version began and another ended is of another version for both, and says which they were."""
    old = version.code_version()
    assert version.another_version(old) == ""
    assert version.another_version(f"0123456789+ {old.split()[1]}") == ""  # a commit that changes no code
    for unknown in (None, "unknown", "bc5813abcd"):  # of runs before there were hashes
        assert version.another_version(unknown).startswith("another version of the code (")
    with monkeypatch.context() as patch:
        patch.setattr(version, "_PACKAGES", "00000000")
        new = version.code_version()
        assert old in version.another_version(old) and new in version.another_version(old)
        version.goes_on_from(old)
        mixed = version.code_version()
        assert mixed == f"{old}, then {new}" and version.another_version(mixed)
        version.goes_on_from(mixed)  # once more, by the same
        assert version.code_version() == mixed
        version.goes_on_from(None)
        assert version.code_version() == new
    assert version.another_version(mixed) and version.another_version(mixed, with_script=False)
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    assert version.another_version(old) and not version.another_version(old, with_script=False)
    version.goes_on_from(None)


def test_a_resumed_run_says_that_another_version_began_it(tmp_path, capsys, monkeypatch):
    open_run(tmp_path / "run", {})
    old = version.code_version()
    save(tmp_path / "run" / LAST, {}, step=1, config={})
    open_run(tmp_path / "run", {})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(version, "_PACKAGES", "00000000")
    open_run(tmp_path / "run", {})
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/run resumes from a checkpoint of another version" in line
    assert old in line and "here is" in line and "resume=never" in line
    save(tmp_path / "run" / LAST, {}, step=2, config={})
    assert load(tmp_path / "run" / LAST)["version"].startswith(f"{old}, then ")
    open_run(tmp_path / "fresh", {})
    assert version.code_version().count("then") == 0


@pytest.mark.slow
def test_whoever_meets_results_of_another_version_says_so(tmp_path, capsys, monkeypatch):
    root = write_mvtec(tmp_path / "set", size=32, normal=6)
    words = ["configs/demo/patchcore_demo.yaml", f"data.root={root}", "data.category=part", "data.size=32"]
    words += [f"runs={tmp_path}", "device=cpu", "batch_size=4"]
    look = [str(tmp_path / "run"), str(root / "part" / "test" / "good"), f"out={tmp_path / 'out'}", "device=cpu"]

    def said(main, words):
        capsys.readouterr()
        main(words)
        return [line for line in capsys.readouterr().err.splitlines() if "another version" in line]

    assert said(train_anomaly.main, [*words, "run_name=run"]) == []
    made_by = json.loads((tmp_path / "run" / "results.json").read_text())["version"]
    assert load(tmp_path / "run" / LAST)["version"] == made_by == version.code_version()
    assert said(train_anomaly.main, [*words, "run_name=run"]) == said(predict.main, look) == []

    monkeypatch.setattr(version, "_PACKAGES", "00000000")
    (line,) = said(train_anomaly.main, [*words, "run_name=run"])
    assert line.startswith(f"done before, by another version of the code ({made_by}; here is ")
    assert "resume=never" in line
    (line,) = said(predict.main, look)
    assert made_by in line and "scores may differ" in line
    (line,) = said(train_anomaly.main, [*words, "run_name=new", f"update={tmp_path}/run/last.pt"])
    assert line.startswith("update: 0 images added") and made_by in line
    assert said(train_anomaly.main, [*words, "run_name=run", "resume=never"]) == []
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert state["version"] == version.code_version() and "then" not in state["version"]
