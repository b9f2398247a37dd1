"""train_anomaly.py with each kind of detector: results, killed and resumed, under torchrun, updates, errors."""

import functools
import json
import shutil

import pytest
import torch

import train_anomaly
from evaluation.anomaly.compare import load_scores
from models.anomaly import DETECTORS
from runtime import config
from runtime.errors import UserError
from tests.images import TOP, write_mvtec
from tests.models.anomaly.test_by_gradient import OPTIONS
from tests.processes import kill_script, script
from tests.slow import leaving

TINY = {
    "embedding": ["configs/demo/embedding_demo.yaml"],
    "patchcore": ["configs/demo/patchcore_demo.yaml"],
    "padim": ["configs/demo/padim_demo.yaml"],
    "subspace": ["configs/demo/subspace_demo.yaml"],
    "rd4ad": ["configs/demo/rd4ad_demo.yaml", "epochs=4", "save_every=3", "log_every=1"],
    "cdo": ["configs/demo/cdo_demo.yaml", "epochs=4", "save_every=3", "log_every=1"],
    "cutpaste": ["configs/demo/cutpaste_demo.yaml", "epochs=4", "save_every=3", "log_every=1"],
    "cflow": ["configs/demo/cflow_demo.yaml", "epochs=4", "save_every=3", "log_every=1", "detector.stages=2,3"]
    + ["detector.blocks=2", "detector.fiber=16"],
    "nsa": ["configs/demo/nsa_demo.yaml", "epochs=4", "save_every=3", "log_every=1"],
    "regad": ["configs/demo/regad_demo.yaml", "backbone=resnet18", "epochs=3", "save_every=3", "log_every=1"],
}
LONGER = ("cdo", "rd4ad")  # from random weights they sense it only after many steps
SENSES_A_SQUARE = {*TINY} - {"embedding", "cutpaste", "nsa"}  # no map; one of 2 x 2 patches; no gray in its own patches
for name in [name for name in DETECTORS if name not in TINY]:  # a new one has its first config
    loop = ["epochs=4", "save_every=3", "log_every=1"] if DETECTORS[name].by_gradient else []
    small = [f"detector.{key}={value}" for key, value in OPTIONS.get(name, {}).items()]
    first = min((TOP / "configs").glob(f"{name}_*.yaml"))
    TINY[name] = [str(first), "backbone=resnet18", "data.fit=squash", "data.resize=null", *loop, *small]
BY_GRADIENT = tuple(name for name in TINY if DETECTORS[name].by_gradient)
WITH_PROCESSES = leaving(BY_GRADIENT, ("patchcore", *BY_GRADIENT))
HEAVY = ("rd4ad", "cdo", "cutpaste", "cflow", "nsa", "regad")
FEW_SHOT = ("regad",)  # they learn from other categories and get 5 of the normal images, or all that there are
METRICS = ["image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro", "aupro_005", "aupro_001"]
METRICS += ["threshold", "pixel_threshold"]
COUNTS = ["n_train", "n_test_normal", "n_test_anomalous"]
KEYS = METRICS + COUNTS + ["seconds_fit", "seconds_threshold", "images_per_second"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("images"))


def words(name, images, runs, *more):
    about = [f"data.root={images}", "data.category=part", "data.size=64", f"runs={runs}", "run_name=run"]
    if name in FEW_SHOT:
        count = len(list((images / "part" / "train" / "good").glob("*.png")))
        about += [f"data.shots={min(count, 5)}", "data.draw=1", "data.others=null"]
        if not (images / "other").exists():
            write_mvtec(images, category="other")
    return config.overlay(TINY[name], about + ["batch_size=4", "holdout=0.2", "device=cpu"], list(more))


@pytest.mark.parametrize("name", leaving(HEAVY, TINY))
def test_a_run_leaves_everything_behind(name, images, tmp_path, capsys):
    run = words(name, images, tmp_path)
    train_anomaly.main(run)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "run"
    assert results == json.loads((folder / "results.json").read_text())
    assert set(KEYS) <= set(results)
    learned = 4 if name in FEW_SHOT else 10
    assert (results["n_train"], results["n_test_normal"], results["n_test_anomalous"]) == (learned, 4, 4)
    low, high = results["image_auroc_interval"]
    assert low <= results["image_auroc"] <= high
    assert results["per_defect"]["spot"]["n"] == 4
    assert (results["aupro"] is None) == (name == "embedding")
    assert (folder / "heatmaps.png").exists() == (name != "embedding")
    assert (folder / "neighbors.png").exists() == (name in ("embedding", "patchcore"))
    assert all((folder / file).exists() for file in ("scores.png", "curves.png", "test_scores.csv", "test_scores.pt"))
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["calibration"]["threshold"] == results["threshold"]
    assert state["names"][-1] == f"part/train/good/{10 if name in FEW_SHOT else 11:03d}.png"
    assert len(state["learned"]) == learned
    if name in SENSES_A_SQUARE and name not in LONGER:
        assert results["pixel_auroc"] > 0.8  # a bright square in noise is no riddle, even for random weights
    train_anomaly.main(run)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGER)
def test_a_longer_training_finds_a_bright_square_from_random_weights(name, images, tmp_path, capsys):
    train_anomaly.main(words(name, images, tmp_path, "epochs=30"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pixel_auroc"] > 0.8


@pytest.mark.slow
def test_masks_of_some_defects(images, tmp_path, capsys):
    """Without masks: the same image metrics; pixel metrics are those of the set without these images."""
    for name in ("set", "fewer"):
        shutil.copytree(images, tmp_path / name)
        shutil.copytree(tmp_path / name / "part/test/spot", tmp_path / name / "part/test/unmarked")
        (tmp_path / name / "part/ground_truth/spot/003_mask.png").unlink()
    (tmp_path / "fewer/part/test/spot/003.png").unlink()
    shutil.rmtree(tmp_path / "fewer/part/test/unmarked")
    with pytest.raises(UserError, match=r"spot/003\.png has no mask .*data\.masks=some"):
        train_anomaly.main(words("patchcore", tmp_path / "set", tmp_path / "all"))
    found = {}
    for name in ("set", "fewer"):
        train_anomaly.main(words("patchcore", tmp_path / name, tmp_path / f"runs_{name}", "data.masks=some"))
        out, err = capsys.readouterr()
        found[name] = json.loads(out.splitlines()[-1])
        assert ("warning: 5 (" in err and "of 8 defective images have no mask" in err) == (name == "set")
        rows = {line.split()[1]: line.split("|")[4:8] for line in err.splitlines() if line.startswith("| ")}
        assert name == "fewer" or {cell.strip() for cell in rows["unmarked"]} == {"-"}
    for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_005", "aupro_001"):
        assert found["set"][key] == found["fewer"][key]
        assert found["set"]["per_defect"]["unmarked"][key] is None
    assert found["set"]["n_test_anomalous"] == 8 and found["set"]["per_defect"]["unmarked"]["image_auroc"] is not None


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(name, images, tmp_path):
    first = script(["train_anomaly.py", *words(name, images, tmp_path / "a")])
    again = ["train_anomaly.py", *words(name, images, tmp_path / "b")]
    folder = tmp_path / "b" / "run"
    if name in BY_GRADIENT:
        kill_script(again, folder / "metrics.jsonl", 5)  # the checkpoint is of step 3
        assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    else:  # fitted in one pass: what remains after a kill is nothing, or the fitted detector without results
        script(again)
        (folder / "results.json").unlink()
    second = script(again)
    whole, resumed = (torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in "ab")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    for key in METRICS + COUNTS:
        assert first[key] == second[key]


@pytest.mark.slow
def test_a_score_of_the_whole_test_set_is_fitted_on_it(images, tmp_path, capsys):
    states = []
    for split in ("train", "test"):
        train_anomaly.main(words("cflow", images, tmp_path / split, f"detector.normalize={split}"))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["normalized_on"] == split
        states.append(torch.load(tmp_path / split / "run" / "last.pt", weights_only=True)["model"])
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == ["likeliest"]


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_two_processes(name, images, tmp_path):
    words_of = functools.partial(words, name, images)
    own = ["holdout=0"] if name == "patchcore" else []  # each process leaves out its own images
    results = script(["train_anomaly.py", *words_of(tmp_path / "two", *own)], processes=2)
    assert set(KEYS) <= set(results)
    if name == "patchcore":  # no batch norm in training: two processes are one
        one = script(["train_anomaly.py", *words_of(tmp_path / "one", *own)])
        states = [torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in ("one", "two")]
        torch.testing.assert_close(states[0]["model"]["bank.entries"], states[1]["model"]["bank.entries"])
        for key in METRICS:
            assert results[key] == pytest.approx(one[key], abs=1e-5)


@pytest.mark.parametrize("name", leaving(HEAVY, TINY))
def test_without_held_out_normals_each_is_left_out_in_turn(name, images, tmp_path, capsys):
    train_anomaly.main(words(name, images, tmp_path, "holdout=0"))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    normals = 5 if name in FEW_SHOT else 12
    assert results["n_train"] == normals and results["image_auroc"] is not None
    if name in BY_GRADIENT:  # networks cannot forget an image
        assert results["threshold"] is None and results["n_normals"] == 0
    else:
        assert results["threshold"] > 0 and results["n_normals"] == normals


@pytest.mark.parametrize(
    ("shots", "options"), [(2, ["detector.k=2"]), (3, ["detector.distance=mahalanobis"]), (1, ["detector.k=1"])]
)
def test_where_no_image_can_be_left_out_there_is_no_threshold(shots, options, images, tmp_path, capsys):
    about = ["data.name=few_shot", f"data.shots={shots}", "holdout=null", *options]
    train_anomaly.main(words("embedding", images, tmp_path, *about))
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert (results["n_train"], results["n_normals"], results["threshold"]) == (shots, 0, None)
    assert 0 <= results["image_auroc"] <= 1 and err.count("no threshold: ") == 1


@pytest.mark.slow
def test_few_shots_learn_elsewhere_once_and_keep_every_support(images, tmp_path, capsys):
    """Another draw needs neither training nor other categories; nothing is held out unless it is said."""

    def results(name, *more):
        own = config.overlay(["data.name=few_shot", "data.shots=3", "holdout=null"], list(more))
        train_anomaly.main(words(name, images, tmp_path, *own))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    first = results("regad", "epochs=1")
    assert (first["n_train"], first["threshold"]) == (3, None)
    assert (tmp_path / "run" / "heatmaps.png").exists()  # with the colors' scale of the good test images
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    shutil.copytree(images / "part", tmp_path / "alone" / "part")
    weights = [f"detector.weights={tmp_path}/run/last.pt", "epochs=0", f"data.root={tmp_path}/alone"]
    same, other = (results("regad", *weights, f"data.draw={draw}", f"run_name={draw}") for draw in (1, 2))
    for key in METRICS:
        assert same[key] == first[key]
    assert other["n_train"] == 3 and other["pixel_auroc"] != first["pixel_auroc"]
    again = torch.load(tmp_path / "2" / "last.pt", weights_only=True)
    assert len(set(again["names"])) == 3 and not torch.equal(again["model"]["mean"], trained["mean"])
    assert all(torch.equal(again["model"][n], v) for n, v in trained.items() if n.startswith(("backbone", "trans")))
    assert results("cdo", "epochs=1", "batch_size=2", "run_name=cdo")["n_train"] == 3
    assert results("regad", *weights, "holdout=0.3", "run_name=held")["n_normals"] == 1
    baseline = results("embedding", "run_name=embedding")
    assert (baseline["n_train"], baseline["n_normals"]) == (3, 3)


@pytest.mark.slow
def test_an_update_learns_what_is_new_and_forgets_what_is_gone(images, tmp_path, capsys):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    good = copy / "part" / "train" / "good"
    new = [(good / f"{i:03d}.png").rename(tmp_path / f"{i:03d}.png") for i in (3, 7)]
    train_anomaly.main(words("patchcore", copy, tmp_path, "holdout=0"))
    before = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for path in new:
        path.rename(good / path.name)
    (good / "005.png").unlink()
    again = words("patchcore", copy, tmp_path, "holdout=0", f"update={tmp_path}/run/last.pt")
    capsys.readouterr()
    train_anomaly.main(config.overlay(again, ["run_name=updated"]))
    assert "2 images added, 1 removed, 11 in all" in capsys.readouterr().err
    after = torch.load(tmp_path / "updated" / "last.pt", weights_only=True)
    banks = [
        {(s["names"][image], row, column) for image, row, column in s["model"]["bank.origins"].tolist()}
        for s in (before, after)
    ]
    added, gone = banks[1] - banks[0], banks[0] - banks[1]
    assert {name for name, *_ in added} <= {"part/train/good/003.png", "part/train/good/007.png"}
    assert {name for name, *_ in gone} == {"part/train/good/005.png"}
    with pytest.raises(UserError, match=r"fitted with detector.coreset=0.1, this config says 0.2"):
        train_anomaly.main(config.overlay(again, ["run_name=other", "detector.coreset=0.2"]))


@pytest.mark.slow
def test_original_resolution_and_padding(tmp_path, capsys):
    images, results, counted = write_mvtec(tmp_path, size=96, width=160), [], []
    for more in (["pixels=original"], ["data.fit=pad"], ["data.fit=crop", "data.resize=80"], ["data.size=48,80"]):
        train_anomaly.main(words("patchcore", images, tmp_path, *more, "resume=never"))
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert results[-1]["pixel_auroc"] > 0.8
        histograms = load_scores(tmp_path / "run" / "test_scores.pt").histograms
        counted.append((histograms.negatives + histograms.positives).sum(1).tolist())
    original, pad, crop, wide = (set(pixels) for pixels in counted)
    assert original == {96 * 160} and crop == {64 * 64} and wide == {48 * 80}
    assert pad == {38 * 64}  # 64 x 64, of which the image takes 38.4 rows
