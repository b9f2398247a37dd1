"""Edited checkpoints wherever one is read: refused in one line, or loaded with the very values that were saved.

At each of `PLACES` that is done which its script does up to where the values are in use; tests/attacks/edits.py has the
edits.
docs/results/reliability.md counts them.
"""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import eval as evaluate
import scavenge
import train_anomaly
import train_ssl
from evaluation.anomaly.compare import compare, load_scores
from evaluation.anomaly.prediction import examine, load_image, load_run, predicted
from evaluation.frozen import MeasureConfig
from models.anomaly import DetectorConfig, build_detector
from models.backbones import BACKBONES
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config, integrity
from runtime.errors import UserError
from runtime.run import Run
from tests.attacks.edits import SIGNED, UNSIGNED, Edit, made, packed, signed
from tests.attacks.test_images import at_most
from tests.images import write_classes, write_mvtec
from tests.networks import FourStages

BACKBONE = ["backbone=four_stages"]


class Stop(Exception):
    """The values are in use."""


class World(NamedTuple):
    """Runs whose checkpoints are edited, and what they are of."""

    top: Path
    states: dict[str, dict]  # of a checkpoint each
    words: dict[str, list[str]]  # of the command line that made it


@pytest.fixture(scope="module")
def four_stages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "four_stages", FourStages)
        yield


def make_world(top: Path, names: tuple[str, ...]) -> World:
    """With runs of these names, and what their checkpoints give."""
    write_classes(top / "classes", classes=2, each=4, size=24)
    write_mvtec(top / "mvtec", normal=6)
    about = ["device=cpu", f"runs={top}/runs", "log_every=1", "batch_size=2", *BACKBONE]
    ssl = [f"data.root={top}/classes", "data.size=24", "augment.size=16", "epochs=1", "holdout=0.25"]
    dino = ["augment.local_size=8", "method.prototypes=8", "method.hidden=8", "method.bottleneck=4"]
    mvtec = [f"data.root={top}/mvtec", "data.category=part", "data.size=32", "holdout=0.2"]
    words = {
        "dino": ["configs/demo/dino_demo.yaml", *ssl, *dino, "optim.name=adamw", "save.every=1"],
        "simclr": ["configs/demo/simclr_demo.yaml", *ssl, "method.out=4", "optim.name=sgd", "save.every=1"],
        "patchcore": ["configs/demo/patchcore_demo.yaml", *mvtec],
        "padim": ["configs/demo/padim_demo.yaml", *mvtec],
        "embedding": ["configs/demo/embedding_demo.yaml", *mvtec],
        "cflow": ["configs/demo/cflow_demo.yaml", *mvtec, "epochs=2", "save_every=1"]
        + ["detector.stages=2,3", "detector.blocks=1", "detector.fiber=4"],
    }
    words = {name: config.overlay(words[name], [*about, f"run_name={name}"]) for name in names}
    states = {}
    for name, each in words.items():
        (train_ssl if name in ("dino", "simclr") else train_anomaly).main(each)
        states[name] = checkpoint.load(top / "runs" / name)
    if "cflow" in states:
        states["cflow half"] = {key: value for key, value in states["cflow"].items() if key != "calibration"}
        states["cflow half"] |= {"step": 1, "fitted": False}
        words["cflow half"] = words["cflow"]
    states["scores"] = checkpoint.read(top / "runs" / "patchcore" / "test_scores.pt")
    states["foreign"] = {"epoch": 3, "state_dict": FourStages().state_dict(), "args": {"lr": 0.1, "names": ["a", "b"]}}
    return World(top, states, words)


@pytest.fixture(scope="module")
def world(four_stages, tmp_path_factory) -> World:  # noqa: ARG001
    return make_world(tmp_path_factory.mktemp("w"), ("dino", "simclr", "patchcore", "padim", "embedding", "cflow"))


@pytest.fixture(scope="module")
def small_world(four_stages, tmp_path_factory) -> World:  # noqa: ARG001
    return make_world(tmp_path_factory.mktemp("w"), ("simclr", "patchcore"))


# -------------------------------------------------------------------- where a checkpoint is read


def interrupted(script, words: list[str], patches: dict) -> None:
    """Call the script with these attributes of `Run` replaced; the one that raises `Stop` ends it."""
    opened: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(Run, name, value)
        patch.setattr(Run, "__init__", lambda run, cfg, init=Run.__init__: (opened.append(run), init(run, cfg))[1])
        patch.setattr(train_anomaly, "calibrate_and_test", no_more)
        try:
            script.main(words)
        except Stop:
            pass
        finally:
            for run in opened:
                if hasattr(run, "log"):
                    run.log.writer.close()  # else its thread goes on


def no_more(*_, **__):
    raise Stop


def resumed(world: World, name: str, folder: Path):
    """Resume as the script does, and make one step: what was restored."""
    script, kept, opened = (train_ssl if name in ("dino", "simclr") else train_anomaly), [None], Run.open

    def open_and_look(run, parts, *others):
        fresh = opened(run, parts, *others)
        state = {key: part.state_dict() for key, part in parts.items()} | fresh | {"step": run.start}
        kept[0] = integrity.checksum(state)
        return fresh

    words = config.overlay(world.words[name], [f"runs={folder.parent}", f"run_name={folder.name}"])
    interrupted(script, words, {"open": open_and_look, "save": no_more, "finish": no_more})
    return kept[0]


def weights(world: World, name: str, folder: Path):  # noqa: ARG001
    backbone, _ = build_backbone(config.build(BackboneConfig, {"name": "four_stages", "weights": f"{folder}/last.pt"}))
    return integrity.checksum(backbone.state_dict())


def task(world: World, name: str, folder: Path):  # noqa: ARG001
    """eval.py task=knn and task=linear, up to the backbone."""
    words = ["task=knn", f"checkpoint={folder}", "device=cpu"]
    cfg = config.load(MeasureConfig, words, *evaluate.stored(MeasureConfig, config.read(words)))
    backbone, _ = build_backbone(cfg.backbone)
    return integrity.checksum({"backbone": backbone.state_dict(), "data": config.as_dict(cfg.data)})


def load_backbone(world: World, name: str, folder: Path):  # noqa: ARG001
    images = sorted((world.top / "mvtec/part/test/good").glob("*"))
    return scavenge.load_backbone(folder, device="cpu")(images[:1]).tolist()


def load_foreign(world: World, name: str, folder: Path):  # noqa: ARG001
    images = sorted((world.top / "mvtec/part/test/good").glob("*"))
    return scavenge.load_backbone(folder / "last.pt", name="four_stages", device="cpu", size=32)(images[:1]).tolist()


def load_detector(world: World, name: str, folder: Path):  # noqa: ARG001
    images = sorted((world.top / "mvtec/part/test/spot").glob("*"))
    (found,) = scavenge.load_detector(folder, device="cpu")(images[:1])
    return [
        found.score,
        found.threshold,
        found.p_value,
        found.peak,
        os.path.basename(str(found.nearest_training_image)),
    ]


def predict(world: World, name: str, folder: Path):  # noqa: ARG001
    detector, geometry, state = load_run(folder)
    image = str(min((world.top / "mvtec/part/test/spot").glob("*")))
    about = {"batch_size": 1, "precision": state["config"]["precision"]}
    item, found = next(examine(detector, iter([load_image(image, geometry)[1]]), torch.device("cpu"), **about))
    row = predicted(item, found, state, state["calibration"]["threshold"])
    return [row.score, row.threshold, row.p_value, row.peak, row.nearest_training_image]


def update(world: World, name: str, folder: Path):
    """Up to the detector with one image fewer."""
    words = config.overlay(world.words[name], [f"update={folder}", f"runs={folder.parent}", "run_name=updated"])
    kept = [None]

    def look(run, done, **state):  # noqa: ARG001
        kept[0] = integrity.checksum(run.parts["model"].state_dict())
        raise Stop

    interrupted(train_anomaly, words, {"save": look})
    return kept[0]


def detector_weights(world: World, name: str, folder: Path):
    section = checkpoint.load(world.top / "runs" / name.split()[0])["config"]["detector"]
    cfg = config.build(DetectorConfig, section | {"weights": f"{folder}/last.pt"})
    torch.manual_seed(0)
    return integrity.checksum(build_detector(cfg, FourStages())[0].state_dict())


def compared(world: World, name: str, folder: Path):  # noqa: ARG001
    runs = [load_scores(world.top / "runs/patchcore/test_scores.pt"), load_scores(folder / "last.pt")]
    return compare(runs, ["a", "b"])["differences"]


PLACES = {
    "dino": [resumed, weights, task, load_backbone],
    "simclr": [resumed, weights, task],
    "patchcore": [resumed, predict, load_detector, update, weights],
    "padim": [resumed, predict, load_detector],
    "embedding": [resumed, predict],
    "cflow": [predict, detector_weights],
    "cflow half": [resumed, detector_weights],
    "scores": [compared],
    "foreign": [weights, load_foreign],
}


# -------------------------------------------------------------------- the attack


def outcome(place, world: World, name: str, contents: bytes, expected, capsys) -> tuple[str, Any]:
    """What became of a checkpoint: `refused`, `same`, `said`, or what is wrong; and what the place gave."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place_of_it:
        folder = Path(place_of_it) / "r"
        folder.mkdir()
        for file in ("config.yaml", "metrics.jsonl") if name != "foreign" else ():
            run = "patchcore" if name == "scores" else name.split()[0]
            if (original := world.top / "runs" / run / file).exists():
                shutil.copy(original, folder)
        (folder / "last.pt").write_bytes(contents)
        capsys.readouterr()
        try:
            with at_most(60):
                found = place(world, name, folder)
        except UserError as error:
            return judged(str(error).replace(str(folder), "F"), name, place), None
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", None
        finally:
            assert not os.path.exists("sprung"), "code ran"
    if found == expected:
        return "same", found
    return "said" if "begin as in a fresh run" in capsys.readouterr().err else "other values", found


def judged(line: str, name: str, place) -> str:
    if len(line) > 300 or "\n" in line:
        return f"no short line: {line}"
    if "download" in line and name != "foreign":
        return f"nothing to download: {line}"
    if place is resumed and "resume=never" not in line:
        return f"no way out: {line}"
    return "refused"


def valid(edit: Edit, *, foreign: bool) -> bool:
    """Whether a run could have saved what the file holds: its checksum is right, or it has none as old checkpoints, and
    the config lacks a key that has a default, a parameter had no gradient yet, an image or the curves were others.
    Other people's files have no checksum but those of the zip format, which are right where records were written anew,
    and their weights may be of any precision."""
    if foreign:
        return edit.kind in ("record changed", "records swapped", "dtype")
    optional = ("config.", "optimizer.state.", "calibration.scores", "part", "seconds", "names.")
    deleted = edit.kind == "deleted" and edit.place.startswith(optional)
    renamed = edit.kind in ("deleted", "renamed", "added") and edit.place.startswith(("curves.", "metrics."))
    return edit.signature in (SIGNED, UNSIGNED) and (deleted or renamed)


def attack(world: World, count: int, seed: int, capsys, most: int = 9) -> Counter:
    """So many edits, each at (at most) so many places where its checkpoint is read."""
    rng, results, wrong, expected = random.Random(seed), Counter(), [], {}
    for number in range(count):
        name = [*world.states][number % len(world.states)]
        state, ours = world.states[name], name != "foreign"
        others = [other for key, other in world.states.items() if key.split()[0] != name.split()[0] and key != "scores"]
        edit = made(state, others, rng, ours=ours)
        for place in rng.sample(PLACES[name], min(most, len(PLACES[name]))):
            if (name, place) not in expected:
                whole = packed(signed(state) if ours else state)
                found, expected[name, place] = outcome(place, world, name, whole, None, capsys)
                assert found == "other values", found  # than None
            found, _ = outcome(place, world, name, edit.contents, expected[name, place], capsys)
            another = edit.kind == "other run" and place is not resumed
            if found == "other values" and (another or valid(edit, foreign=not ours)):
                found = "valid"
            results[found if found in ("refused", "same", "said", "valid") else "wrong"] += 1
            if found not in ("refused", "same", "said", "valid"):
                wrong.append(f"{number} {name} {place.__name__} {edit.kind} {edit.signature} {edit.place}: {found}")
    with capsys.disabled():
        print(json.dumps({"edits": count, "readings": sum(results.values()), **results}))
    assert not wrong, f"{len(wrong)} of {sum(results.values())}:\n" + "\n".join(wrong)
    return results


@pytest.mark.slow
def test_300_edited_checkpoints_in_every_place_where_one_is_read(world, capsys):
    attack(world, 300, 0, capsys)


def test_edited_checkpoints(small_world, capsys):
    attack(small_world, 40, 0, capsys, most=1)
