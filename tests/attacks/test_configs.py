"""Mutated configs are answered by a config, or by one short line, and soon; never by a traceback or a hang."""

import collections
import os
import random
import resource
import signal
import socket
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import eval as evaluate
import sweep
import train_anomaly
import train_classifier
import train_ssl
from evaluation.tasks import module_of
from runtime import config, errors
from runtime.errors import UserError
from runtime.run import Run
from runtime.yaml_text import read_yaml
from tests.attacks.configs import BOMB, FILES, NUMBERS, Raw, ends, keys_of, mutation, put, script_of, written
from tests.images import TOP, write_classes, write_mvtec
from tests.processes import start_script
from tests.scripts import test_train_anomaly, test_train_classifier, test_train_ssl

MOST = 300  # characters of a line
SECONDS = 1.0  # of computing, until an answer
ROOM = 3 * 2**30  # bytes of memory beyond those of a script that has been started
PATIENCE = 300  # seconds for a run of four steps, on a machine that does other things


class Hang(BaseException):
    """Not an Exception, which something might catch."""


@pytest.fixture
def clock():
    """Ends the test that computes for longer than SECONDS between two calls, or waits for something."""

    def stop(number, _):
        raise Hang(signal.Signals(number).name)

    def start(seconds: float = SECONDS) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * seconds)

    before = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    yield start
    start(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def fault_of(line: str) -> str:
    """What is wrong with a line for the user, if anything."""
    if not line.startswith("error: ") or len(line) > MOST + len("error: "):
        return f"{len(line)} characters"
    return "control characters" if any(unicodedata.category(letter) == "Cc" for letter in line) else ""


def assert_line(error: UserError) -> None:
    line, status = errors.explain(error)
    assert status == 2 and not fault_of(line), line[:1000]


def answer(script: ModuleType, path: str) -> None:
    """What a script does with its config before it reads anything else."""
    if script is sweep:
        cfg = sweep.load([path])
        config.run_folder(cfg)
        sweep.check(sweep.plan(cfg)[1])
    elif script is evaluate:
        layers = config.read([path])
        task = module_of(config.chosen(layers, "task"))
        config.load(task.Config, [path], *evaluate.stored(task.Config, layers))
    else:
        cfg = config.load(script.Config, [path])
        script.check(cfg, Run(cfg))


def assert_answered(numbers, folder: Path, clock) -> collections.Counter:
    """How many of the mutations work, and how many are a line."""
    count, wrong = collections.Counter(), []
    for number in numbers:
        about, text = mutation(number)
        path = folder / "config.yaml"
        path.write_bytes(text)
        script, kind = script_of(yaml.load(FILES[number % len(FILES)].read_text(), yaml.BaseLoader)), "works"
        clock()
        try:
            answer(script, str(path))
        except UserError as error:
            clock(0)
            line, kind = errors.explain(error)[0], "line"
            if fault := fault_of(line):
                wrong.append(f"{about}: {fault}: {line[:500]!r}")
        except (Exception, Hang) as error:
            clock(0)
            wrong.append(f"{about}: {type(error).__name__} {str(error)[:300]}")
        clock(0)
        count[kind] += 1
    assert not wrong, "\n\n".join(wrong)
    assert not Path("hacked").exists()
    return count


def test_a_hundred_mutations_are_answered(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(TOP)
    count = assert_answered(range(0, 1000, 10), tmp_path, clock)
    assert count["works"] >= 5 and count["line"] >= 50 and count.total() == 100


@pytest.mark.slow
def test_a_thousand_mutations_are_answered(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(TOP)
    count = assert_answered(range(1000), tmp_path, clock)
    assert count.total() == 1000
    print(dict(count))


# ---------------------------------------------------------------- whole runs


def plain(schema: type, words: list[str]) -> dict:
    """The resolved config of a command line as nested texts."""
    return yaml.load(yaml.safe_dump(config.as_dict(config.load(schema, words))), yaml.BaseLoader)


def small_runs(folder: Path) -> list[tuple[str, type, dict]]:
    """Of every method and detector: the script, its schema and a config of a few steps."""
    classes, parts = write_classes(folder / "classes", each=6), write_mvtec(folder / "parts", normal=8)
    found = []
    for name in test_train_ssl.TINY:
        words = test_train_ssl.words(name, classes, folder / "runs", "epochs=1", "batch_size=6", "data.workers=0")
        found.append(("train_ssl.py", train_ssl.Config, plain(train_ssl.Config, words)))
    for more in ([], [*test_train_classifier.MIXED, *test_train_classifier.EARLY]):
        words = test_train_classifier.words(
            classes, folder / "runs", "epochs=1", "batch_size=6", "data.workers=0", *more
        )
        found.append(("train_classifier.py", train_classifier.Config, plain(train_classifier.Config, words)))
    for name in test_train_anomaly.TINY:
        short = ["epochs=1"] if name in test_train_anomaly.BY_GRADIENT else []
        words = test_train_anomaly.words(name, parts, folder / "runs", *short, "data.workers=0")
        found.append(("train_anomaly.py", train_anomaly.Config, plain(train_anomaly.Config, words)))
    return found


ELSEWHERE = {"runs", "run_name", "root", "others", "update", "compile", "name", "options", "epochs", "device"}


def one_number(raw: dict, schema: type, draw: random.Random) -> tuple[str, dict]:
    """The config with a number in place of another: half of them at the ends of the key's range, half any."""
    keys = [key for key in keys_of(schema, raw) if not ELSEWHERE & {*key}]
    keys = [key for key in keys if (len(key) == 2) == isinstance(raw.get(key[0]), dict)]  # no section as a number
    while True:
        key = draw.choice(keys)
        there = raw.get(key[0]) if len(key) == 1 else raw[key[0]].get(key[1])
        if values := (ends(schema, raw, key) if draw.random() < 0.5 else [v for v in NUMBERS if len(v) < 30]):
            value = draw.choice(values)
            value = f"[{', '.join([value] * len(there))}]" if isinstance(there, list) else value
            put(raw, key, Raw(value))
            return f"{'.'.join(key)}={value}", raw


def assert_runs(numbers, folder: Path) -> collections.Counter:
    """How many of so many small runs, each with another number, work, and how many are a line."""
    runs, count, wrong = small_runs(folder), collections.Counter(), []
    for number in numbers:
        script, schema, raw = runs[number % len(runs)]
        about, raw = one_number(yaml.load(written(raw), yaml.BaseLoader), schema, random.Random(f"run {number}"))
        about = f"{number}: {script} {raw.get('method') or raw.get('detector')} {about}"
        raw["run_name"] = f"run{number}"
        path, out = folder / f"{number}.yaml", folder / f"{number}.out"
        path.write_text("\n".join(f"{written(key)}: {written(value)}" for key, value in raw.items()))
        process = start_script([script, str(path)], out)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        resource.prlimit(process.pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            wrong.append(f"{about} has not ended after {PATIENCE} s")
            continue
        said = Path(f"{out}.err").read_text()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if process.exitcode not in (0, 2) or len(lines) != (process.exitcode == 2) or "Traceback" in said:
            wrong.append(f"{about}: {said[-1000:]}")
        wrong += [f"{about}: {line}" for line in lines if len(line) > MOST + len("error: ")]
        count["line" if lines else "works"] += 1
    assert not wrong, "\n\n".join(wrong)
    return count


@pytest.mark.slow
def test_a_hundred_and_fifty_runs_with_one_number_changed(tmp_path):
    count = assert_runs(range(150), tmp_path)
    assert count.total() == 150 and count["works"] >= 20
    print(dict(count))


# ---------------------------------------------------------------- files, and what is no file

DENSE = {  # of about the largest size that a file may have
    "brackets": "a: " + "[" * 3000,
    "braces": "{a: " * 50_000,
    "dashes": "- " * 100_000,
    "list": "a: [" + "1," * 100_000 + "]",
    "keys": "\n".join(f"k{i}: {i}" for i in range(20_000)),
    "bomb": f"a: [&a0 [x], {BOMB}]",
    "long alias": f"a: [&a {'q' * 50_000}, {', '.join(['*a'] * 5000)}]",
    "lines": "a: |\n" + " x\n" * 60_000,
    "escapes": 'a: "' + "\\x41" * 60_000 + '"',
    "too large": "#" * 10**6,
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_files_are_read_or_refused_soon(name, tmp_path, clock):
    (tmp_path / "a.yaml").write_text(DENSE[name])
    clock()
    try:
        config.load(train_ssl.Config, [str(tmp_path / "a.yaml")])
    except UserError as error:
        clock(0)
        assert_line(error)
    else:
        raise AssertionError("it is no config")


def test_what_is_no_file_is_named(tmp_path, clock):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to("loop")
    for name in (*(tmp_path / n for n in ("fifo", "socket", "loop", "nothing")), tmp_path, "/dev/zero", "/dev/tty"):
        clock()
        with pytest.raises(UserError, match="cannot read config file") as error:
            read_yaml(name)
        assert_line(error.value)
    (tmp_path / "link").symlink_to(TOP / "configs" / "simclr_neu.yaml")
    assert read_yaml(tmp_path / "link")["method"]["name"] == "simclr"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_other_encodings(encoding, tmp_path):
    (tmp_path / "a.yaml").write_bytes("data: {name: folder}\n".encode(encoding))
    if encoding == "utf-8-sig":
        assert read_yaml(tmp_path / "a.yaml") == {"data": {"name": "folder"}}
    else:
        with pytest.raises(UserError, match="is not valid YAML") as error:
            read_yaml(tmp_path / "a.yaml")
        assert_line(error.value)


NAMES = ["a\nb", "a\x1b[31mb", "a\tb", "\x7f", "a\rb", "\u202eb", "q" * 250, "\udcff", "{0}%s", " ", "-h", "é😀", "a b"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_config_files(name, tmp_path):
    """What is wrong in it is one line of printable characters, whatever the file is called."""
    path = tmp_path / name
    for text in ("", "a: [", "epochs: 1\nepochs: 1", "- a", "nothing: 1", "&a [*a]"):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            config.load(train_ssl.Config, [str(path)])
        assert_line(error.value)


@pytest.mark.parametrize(("keys", "values"), [(20, 100), (2000, 2)])
def test_a_grid_of_more_cells_than_anyone_can_run(keys, values, tmp_path, clock):
    each = ", ".join(map(str, range(values)))
    grid = ", ".join(f"optim.k{i}: [{each}]" for i in range(keys))
    (tmp_path / "a.yaml").write_text((TOP / "configs/sweeps/demo.yaml").read_text() + f"grid: {{{grid}}}\n")
    clock()
    with pytest.raises(UserError, match="combinations") as error:
        sweep.plan(sweep.load([str(tmp_path / "a.yaml")]))
    assert_line(error.value)
