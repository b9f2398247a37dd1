"""Damaged and hostile image files: decoded or refused in one line that names them, without hanging or much memory."""

import io
import json
import os
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from data import opening
from data.image_files import find_images
from data.images import decode, decode_mask, image_size, mask_values, readable
from runtime import errors
from runtime.errors import UserError
from tests.attacks.hostile_images import EITHER, KINDS, READ, REFUSED, huge_gif, png, write
from tests.attacks.limited import LIMIT
from tests.images import write_classes, write_mvtec
from tests.processes import start_script

EACH = 4  # of a kind; `make test-all` takes 8
TOTAL = 6 * 2**30  # bytes of a small machine, whatever runs the tests


@contextmanager
def at_most(seconds: int):
    """Interrupts what hangs, even in the system's `open`."""

    def end(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(function, path) -> str:
    """READ, or REFUSED with one line of at most 300 characters that names the file."""
    try:
        with at_most(20):
            function(path)
    except UserError as error:
        line, status = errors.explain(error)
        assert line is not None and status == 2 and "\n" not in line and len(line) - len(str(path)) <= 200
        assert str(path) in line and "data.on_error=skip" in line
        return REFUSED
    return READ


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_decoded_or_refused_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "total_memory", lambda: TOTAL, raising=False)
    for i in range(EACH):
        path, expected = write(kind, i, tmp_path)
        for function in (lambda path: decode(path, 32), lambda path: decode_mask(path, 32), mask_values, image_size):
            found = outcome(function, path)
            if function is image_size or (expected == REFUSED and kind == "floating point"):
                continue  # headers may well be whole; masks may have floating-point values
            assert found == expected or expected == EITHER, (path, function)
        assert find_images(tmp_path) == [str(path)]  # it is not left out in silence
        path.unlink()


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """An .eps under another name: Pillow would hand it to Ghostscript."""
    from PIL import EpsImagePlugin

    def run(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path, _ = write("postscript", 0, tmp_path)
    with pytest.raises(UserError, match="not an image of a known format"):
        decode(path, 8)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_a_lack_of_memory_is_no_broken_image(error, tmp_path, monkeypatch):
    """It ends a set that leaves out broken images, and is one line that names the image."""
    good = str(write("wrong extension", 0, tmp_path)[0])

    def load(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", load)
    with pytest.raises(MemoryError, match="too little memory for image") as raised:
        readable(lambda i: decode([good, good][i], 8), [good, good], "skip")
    line, status = errors.explain(raised.value)
    assert status == 2 and good in line and "\n" not in line and len(line) - len(good) <= 200


def stored(side=4000):
    """An image of which only the header has been read."""
    return Image.open(io.BytesIO(png(side, side, 8, 2)))


def test_threads_decode_only_what_fits_together(monkeypatch):
    """Fifteen images, of which three fit into half of what is free: always three at once, and all are decoded."""
    needed = opening.bytes_to_decode(stored())
    monkeypatch.setattr(opening, "free_memory", lambda _: 7 * needed)
    monkeypatch.setattr(opening, "total_memory", lambda: 100 * needed)
    lock, three, inside, most, done = threading.Lock(), threading.Barrier(3), 0, 0, 0

    def decodes():
        nonlocal inside, most, done
        with opening.memory_for(stored()):
            with lock:
                inside += 1
                most = max(most, inside)
            three.wait(60)
            with lock:
                inside -= 1
                done += 1

    threads = [threading.Thread(target=decodes) for _ in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (3, 15) and opening._KEPT.bytes == 0


def test_one_image_alone_is_refused_by_what_is_free_and_by_what_there_is(monkeypatch):
    needed = opening.bytes_to_decode(stored())
    monkeypatch.setattr(opening, "total_memory", lambda: 2 * needed)
    monkeypatch.setattr(opening, "free_memory", lambda _: 2 * needed)
    with opening.memory_for(stored()):
        pass
    monkeypatch.setattr(opening, "free_memory", lambda _: 2 * needed - 2)
    with pytest.raises(MemoryError, match=r"4000 x 4000 pixels take 0.24 GiB to decode, 0.48 GiB are free"):
        opening.memory_for(stored()).__enter__()
    monkeypatch.setattr(opening, "total_memory", lambda: 2 * needed - 2)
    with pytest.raises(ValueError, match=r"4000 x 4000 pixels .* over half of all 0\.48 GiB of memory"):
        opening.memory_for(stored()).__enter__()
    assert opening._KEPT.bytes == 0
    with opening.memory_for(stored(100)):  # nothing is asked of small ones
        pass


def test_a_forked_worker_does_not_wait_for_its_parents_threads(monkeypatch):
    needed = opening.bytes_to_decode(stored())
    monkeypatch.setattr(opening, "free_memory", lambda _: 2 * needed)
    monkeypatch.setattr(opening, "total_memory", lambda: 100 * needed)
    with opening.memory_for(stored()):
        child = os.fork()
        if not child:
            signal.alarm(20)
            with opening.memory_for(stored()):
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_workers_share_what_is_free(monkeypatch):
    monkeypatch.setattr(opening, "free_memory", lambda _: 1200)
    assert opening._free() == 1200
    monkeypatch.setattr(opening, "get_worker_info", lambda: type("Info", (), {"num_workers": 4}))
    assert opening._free() == 300


def test_a_gif_of_200_bytes_is_refused_by_what_it_claims(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(huge_gif(30_000))
    assert (tmp_path / "a.gif").stat().st_size < 1000
    monkeypatch.setattr(opening, "total_memory", lambda: TOTAL)
    with pytest.raises(UserError, match=r"a\.gif: 30000 x 30000 pixels take .* GiB to decode, over half of all 6"):
        decode(tmp_path / "a.gif", 224)


# -------------------------------------------------------------------- through the scripts, in 2 GiB more than idle


def under_limit(commands: list[list[str]], folder: Path) -> list[dict]:
    """The `limited.outcome` of each command, one after another in a process of their own."""
    (folder / "commands.json").write_text(json.dumps(commands))
    words = [str(Path(__file__).parent / "limited.py"), str(folder / "commands.json"), str(folder / "outcomes.json")]
    process = start_script(words, folder / "out")
    process.join()
    outcomes = json.loads((folder / "outcomes.json").read_text()) if (folder / "outcomes.json").exists() else []
    ended = (
        f"process ended with {process.exitcode} in {commands[len(outcomes) :][:1]}, {(folder / 'out.err').read_text()}"
    )
    assert process.exitcode == 0 and len(outcomes) == len(commands), ended
    for words, found in zip(commands, outcomes):
        assert found["bytes"] < LIMIT and "Traceback" not in found["err"], (words, found["err"][-3000:])
        assert "Warning" not in found["err"], (words, found["err"])
    return outcomes


def hostile_set(folder: Path, each: int = 8) -> dict[str, str]:
    """{path: what must become of it} of `each` files of every kind, written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = (write(kind, i, folder) for kind in KINDS for i in range(each))
    return {str(path): expected for path, expected in made}


def assert_named(files: dict[str, str], names: list[str]) -> None:
    """Of the files those are named that are refused, and none that can be read."""
    assert {path for path, expected in files.items() if expected == REFUSED} <= {*names}
    assert {*names} <= {path for path, expected in files.items() if expected != READ}


SSL = ["train_ssl.py", "configs/demo/simclr_demo.yaml", "augment.size=24", "method.out=8", "data.size=32", "epochs=1"]
SSL += ["backbone=mobilenet_v2", "backbone.width=0.25", "batch_size=8", "device=cpu", "optim.warmup_epochs=0"]
ANOMALY = ["train_anomaly.py", "configs/demo/padim_demo.yaml", "data.category=part", "data.size=32", "device=cpu"]


def commands_of(script: str, root: Path, runs: Path, on_error: str) -> list[str]:
    if script == "predict.py":
        return ["predict.py", str(runs / "run"), str(root), f"out={runs / 'out'}", "device=cpu"]
    more = [f"data.root={root}", f"runs={runs}", "run_name=run", f"data.on_error={on_error}"]
    return [*(SSL if script == "train_ssl.py" else ANOMALY), *more]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_ssl.py", "train_anomaly.py", "predict.py"])
def test_all_at_once_are_left_out_by_name(script, tmp_path):
    """With data.on_error=skip, and in predict.py, the run ends well, and what it left out is what it names."""
    runs, root = tmp_path / "runs", tmp_path / "set"
    below = {"train_ssl.py": "train/class0", "train_anomaly.py": "part/train/good", "predict.py": "below"}[script]
    before = []
    if script == "train_ssl.py":
        write_classes(root, classes=2, each=8)
    else:
        write_mvtec(root if script == "train_anomaly.py" else tmp_path / "normal")
    if script == "predict.py":
        before = [commands_of("train_anomaly.py", tmp_path / "normal", runs, "fail")]
    good = len(find_images(root))
    files = hostile_set(root / below)
    *_, found = under_limit([*before, commands_of(script, root, runs, "skip")], tmp_path)
    assert found["status"] in (0, 1), found["err"][-3000:]
    results = json.loads(found["out"].splitlines()[-1])
    if script == "predict.py":
        names, without = results["skipped"], results["without_heatmap"]
        assert results["images"] == len(files) - len(names) and good == 0
        assert all("long_and_thin" in path for path in without) and found["status"] == bool(without)
        assert all(f"skipped: cannot read image {path}: " in found["err"] for path in names)
        assert all(re.search(f"no heat map of {path}: it takes .* GiB are free", found["err"]) for path in without)
    else:
        [line] = [line for line in found["err"].splitlines() if "left out" in line and "not readable" in line]
        names = line.partition("not readable: ")[2].split(", ")
        assert f"left out {len(names)} of " in line and found["status"] == 0
    assert_named(files, names)
    count = len(names)
    took = f"{found['seconds']:.0f} s, {found['bytes'] / 2**30:.2f} GiB"
    print(f"{script}: {len(files)} files of {len(KINDS)} kinds, {count} named, {len(files) - count} used, {took}")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_ssl.py", "train_anomaly.py", "predict.py"])
def test_each_alone_ends_in_one_line_that_names_it(script, tmp_path):
    """With data.on_error=fail every refused file ends the run in one line and exit status 2, within a minute."""
    runs, commands, before = tmp_path / "runs", [], []
    files = hostile_set(tmp_path / "files", 2)
    files = {path: expected for path, expected in files.items() if expected == REFUSED}
    if script == "predict.py":
        normal = write_mvtec(tmp_path / "normal")
        before = [commands_of("train_anomaly.py", normal, runs, "fail")]
    places = []
    for number, path in enumerate(files):
        root = tmp_path / f"set{number}"
        if script == "train_ssl.py":
            write_classes(root, classes=1, each=8)
        elif script == "train_anomaly.py":
            write_mvtec(root, normal=2)
        below = {"train_ssl.py": "train/class0", "train_anomaly.py": "part/train/good", "predict.py": ""}[script]
        (root / below).mkdir(parents=True, exist_ok=True)
        places.append(root / below / Path(path).name)
        os.rename(path, places[-1])  # a link's target stays behind
        commands.append(commands_of(script, root, runs / f"{number}", "fail"))
        if script == "predict.py":
            commands[-1][1] = str(runs / "run")
    outcomes = under_limit([*before, *commands], tmp_path)[len(before) :]
    for place, found in zip(places, outcomes):
        lines = [line for line in found["err"].splitlines() if str(place) in line]
        ending = "cannot read image" if script != "predict.py" else "none of the 1 images"
        assert found["status"] == 2 and any(ending in line for line in lines + found["err"].splitlines()), found["err"]
        said = [line[line.index("cannot read image") :] for line in lines if "cannot read image" in line]
        assert said and all(len(line) - len(str(place)) <= 200 for line in said), found["err"]  # behind a progress bar
    seconds, most = (max(found[key] for found in outcomes) for key in ("seconds", "bytes"))
    print(f"{script}: {len(places)} files, each named in one line, {seconds:.1f} s and {most / 2**30:.2f} GiB at most")
