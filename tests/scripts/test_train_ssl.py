"""train_ssl.py as a person runs it: what it leaves, killed and resumed, under torchrun, and its errors."""

import json
import shutil
import subprocess
from math import isfinite

import pytest
import torch
import yaml
from PIL import Image

import train_ssl
from models.backbones import BACKBONES
from models.ssl import SSL_METHODS
from models.weights.load import load_weights
from runtime import config
from runtime.errors import UserError
from tests.images import TOP, command, write_classes
from tests.models.ssl.test_methods import SMALL
from tests.processes import kill_script, script
from tests.slow import leaving

TINY = {  # four at 33 pixels: at 24 MobileNetV2 ends in single pixels, whose batch norms made gradients of 1e5 to inf
    "simclr": ["configs/demo/simclr_demo.yaml", "augment.size=24", "method.out=8"],
    "supcon": ["configs/supcon_neu.yaml", "augment.size=24", "method.out=8"],
    "revd": ["configs/revd_neu.yaml", "augment.size=32"],
    "dino": ["configs/demo/dino_demo.yaml", "augment.size=24", "augment.local_size=16", "method.prototypes=16"],
    "triplet": ["configs/triplet_scavport.yaml", "augment.size=24", "method.out=8"],
    "moco_v2": ["configs/moco_v2_scavport.yaml", "augment.size=24", "method.out=8", "method.queue=40"],
    "moco_v3": ["configs/moco_v3_scavport.yaml", "augment.size=33", "method.out=8", "method.hidden=16"],
    "byol": ["configs/byol_scavport.yaml", "augment.size=33", "method.out=8", "method.hidden=16"],
    "simsiam": ["configs/simsiam_scavport.yaml", "augment.size=24", "method.out=16", "method.bottleneck=4"],
    "barlow_twins": ["configs/barlow_twins_scavport.yaml", "augment.size=33", "method.out=8", "method.hidden=16"],
    "vicreg": ["configs/vicreg_scavport.yaml", "augment.size=33", "method.out=8", "method.hidden=16"],
    "psco": ["configs/psco_scavport.yaml", "augment.size=24", "method.out=8", "method.hidden=16", "method.queue=40"],
    "patch_position": ["configs/patch_position_scavport.yaml", "augment.size=11", "augment.gap=1", "augment.jitter=0"],
}
for name in [name for name in SSL_METHODS if name not in TINY]:  # a new one has its first config
    config_of_it = str(min((TOP / "configs").glob(f"{name}_*.yaml")))
    options = SMALL.get(name, {}) | dict.fromkeys(SSL_METHODS[name].in_epochs, 0)
    small = [f"method.{key}={value}" for key, value in options.items()]
    TINY[name] = [config_of_it, "data=folder", "augment.size=24", *small]
TINY["simclr with spd"] = [*TINY["simclr"], "spd=smooth_blend"]
TINY["byol with sam"] = [*TINY["byol"], "sam.rho=0.1"]
WITH_PROCESSES = leaving({*TINY} - {"simclr"}, TINY)
HEAVY = ("revd", "simclr with spd", "byol with sam", "patch_position", "supcon", "triplet", "moco_v3", "byol")
HEAVY += ("simsiam", "barlow_twins", "vicreg", "psco")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


def words(name, images, runs, *more):
    backbone = ["backbone.stem=cifar"] if name == "revd" else ["backbone=mobilenet_v2", "backbone.width=0.25"]
    about = [f"data.root={images}", "data.size=36", *backbone, f"runs={runs}", "run_name=run", "epochs=3"]
    about += ["batch_size=8", "save.every=3", "log_every=1", "device=cpu", "precision=fp32", "sync_bn=false"]
    return config.overlay(TINY[name], about + ["optim.warmup_epochs=0"], list(more))


@pytest.mark.parametrize("name", leaving(HEAVY, TINY))
def test_a_run_leaves_everything_behind(name, images, tmp_path, capsys):
    train_ssl.main(words(name, images, tmp_path, "save.best=true", "save.keep_last=2", "accumulate=2"))
    folder = tmp_path / "run"
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert err.count("kNN with k=200: there are only") == 1 and "UserWarning: kNN" not in err
    assert results == json.loads((folder / "results.json").read_text())
    assert results["steps"] == 12 and 0 <= results["knn20_top1"] <= 1 and isfinite(results["loss"])
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "last.pt", "best.pt", "metrics.jsonl", "step_00000009.pt", "step_00000012.pt"} <= names
    assert not any("unfinished" in n for n in names) and "step_00000006.pt" not in names
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 13))
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 12 and state["config"]["method"]["name"] == name.split()[0]
    # a second call finds the run done and only says its results again
    train_ssl.main(words(name, images, tmp_path, "save.best=true", "save.keep_last=2", "accumulate=2"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results


@pytest.mark.slow
def test_a_checkpoint_ends_a_mean_of_the_curves_and_best_needs_a_figure(images, tmp_path):
    train_ssl.main(words("simclr", images, tmp_path, "log_every=5"))  # saved every 3 steps
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [3, 5, 6, 9, 10, 12]
    with pytest.raises(UserError, match=r"save\.best keeps the best kNN metric"):
        train_ssl.main(words("simclr", images, tmp_path, "save.best=true", "holdout=0", "run_name=other"))


def test_what_is_left_out_is_said_and_a_flat_folder_is_learned_whole(images, tmp_path, capsys):
    few = ("epochs=1", "augment.size=24")
    flat, one = tmp_path / "flat", tmp_path / "undivided"
    flat.mkdir()
    for i, path in enumerate(sorted((images / "train").rglob("*.png"))[:20]):
        shutil.copy(path, flat / f"{i}.png")
    train_ssl.main(words("simclr", flat, tmp_path, *few, "run_name=flat"))
    assert "\ndata: all 20 images are learned from\n" in capsys.readouterr().err
    shutil.copytree(images / "train", one)
    train_ssl.main(words("simclr", one, tmp_path, *few, "run_name=one"))
    line = "data: 27 of 36 images are learned from, 6 kept for testing (data.test_fraction=0.2), 3 held out (holdout"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(name, images, tmp_path):
    script(["train_ssl.py", *words(name, images, tmp_path / "a")])
    again = ["train_ssl.py", *words(name, images, tmp_path / "b")]
    kill_script(again, tmp_path / "b" / "run" / "metrics.jsonl", 5)  # the checkpoint is of step 3
    assert torch.load(tmp_path / "b" / "run" / "last.pt", weights_only=True)["step"] < 12
    script(again)
    whole, resumed = (torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in "ab")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert str(whole["optimizer"]) == str(resumed["optimizer"])
    assert losses(tmp_path / "a" / "run") == losses(tmp_path / "b" / "run")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_two_processes(name, images, tmp_path):
    results = script(["train_ssl.py", *words(name, images, tmp_path, "epochs=1")], processes=2)
    assert results["steps"] == 4 and isfinite(results["loss"])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5  # one writer only


@pytest.mark.slow
def test_spd_leaves_no_trace_in_a_checkpoint_and_weight_0_none_in_the_weights(images, tmp_path):
    for run, more in {"plain": [], "zero": ["spd=smooth_blend", "spd.weight=0"]}.items():
        train_ssl.main(words("simclr", images, tmp_path, "epochs=1", f"run_name={run}", *more))
    plain, zero = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("plain", "zero"))
    assert plain.keys() == zero.keys()
    for key in plain:
        tracked = "running" in key or "tracked" in key  # statistics of the further views, too
        assert torch.equal(plain[key], zero[key]) != tracked, key
    assert losses(tmp_path / "plain") == losses(tmp_path / "zero")
    points = [json.loads(line) for line in (tmp_path / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert all(-2 <= point["stats/spd"] <= 2 for point in points if "loss" in point)
    report = load_weights(BACKBONES["mobilenet_v2"](width=0.25), tmp_path / "zero" / "last.pt")
    assert "from part online" in report


@pytest.mark.slow
def test_sam_climbs_and_with_rho_0_changes_nothing(images, tmp_path):
    for run, more in {
        "plain": [],
        "zero": ["sam.rho=0"],
        "sam": ["sam.rho=0.1"],
        "own": ["sam.rho=0.1", "sam.m_sharpness=true"],
        "asam": ["sam.adaptive=true"],
    }.items():
        train_ssl.main(words("byol", images, tmp_path, "epochs=1", "accumulate=2", f"run_name={run}", *more))
    plain, zero, sam, own, asam = (
        torch.load(tmp_path / run / "last.pt", weights_only=True)["model"]
        for run in ("plain", "zero", "sam", "own", "asam")
    )
    for key, value in plain.items():
        assert torch.equal(zero[key], value) and torch.equal(own[key], sam[key]), key  # one process is all of them
        if "tracked" in key:  # batch norms' statistics take pass 1 alone
            assert torch.equal(sam[key], value)
    weight = "online.backbone.features.0.0.weight"
    assert not torch.equal(sam[weight], plain[weight]) and not torch.equal(sam[weight], asam[weight])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_m_sharpness_with_two_processes(accumulate, images, tmp_path):
    for run, more in {"all": [], "own": ["sam.m_sharpness=true"], "zero": ["sam.m_sharpness=true", "sam.rho=0"],
                      "plain": ["sam.rho=0"]}.items():  # fmt: skip
        about = ["epochs=1", "batch_size=16", f"accumulate={accumulate}", "sam.rho=0.1", f"run_name={run}"]
        about = config.overlay(about, more)
        script(["train_ssl.py", *words("byol", images, tmp_path, *about)], processes=2)
    shared, own, zero, plain = (
        torch.load(tmp_path / run / "last.pt", weights_only=True)["model"]["online.backbone.features.0.0.weight"]
        for run in ("all", "own", "zero", "plain")
    )
    assert torch.equal(zero, plain) and not torch.equal(own, shared) and not torch.equal(own, plain)


@pytest.mark.slow
def test_overfit_learns_eight_images_in_one_set_of_views(images, tmp_path, capsys):
    train_ssl.main(words("simclr", images, tmp_path, "overfit=8", "epochs=30", "save.every=100"))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    curve = losses(tmp_path / "run")
    assert results["steps"] == 30 and "knn20_top1" not in results
    assert "batch_size: 8" in (tmp_path / "run" / "config.yaml").read_text()
    assert curve[30] < 0.5 * curve[1]
    ids = []
    loader = train_ssl.Loader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ssl, "Loader", lambda *a, **k: ids.append(k["indices"]) or loader(*a, **k))
        train_ssl.main(words("simclr", images, tmp_path, "overfit=8", "epochs=1", "run_name=other"))
    assert len(ids[0]) == 8 and ids[0].min() == 0 and ids[0].max() == 35  # from all classes


@pytest.mark.slow
def test_a_collapse_is_said_once_and_kept(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ssl, "embedding_health", lambda _: {"embedding/std": 0.01})
    train_ssl.main(words("byol", images, tmp_path, "log_every=1"))
    said = [line for line in capsys.readouterr().err.splitlines() if "collapse to a point" in line]
    assert len(said) == 1 and "step 6: embedding/std 0.01 is below 0.05" in said[0]


def test_constant_features_are_said_at_once_while_embeddings_look_healthy(images, tmp_path, capsys):
    """12 steps of batches of 8 leave MobileNetV2's running statistics far from settled."""
    train_ssl.main(words("simclr", images, tmp_path, "eval_every=1"))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    points = [m for m in metrics if "knn20_top1" in m]
    assert len(points) == 3 and all(0 <= m["features/std"] < 1e-4 for m in points)
    assert all(m["features/effective_rank"] < 1.01 and m["knn20_top1"] == pytest.approx(1 / 3) for m in points)
    assert min(m["embedding/std"] for m in metrics if "loss" in m) > 0.5
    said = [line for line in capsys.readouterr().err.splitlines() if "in eval mode images have nearly" in line]
    assert len(said) == 3 and "step 4: features/std" in said[0] and "kNN is guessing; in train mode" in said[0]


@pytest.mark.slow
def test_which_network_counts_is_kept_in_the_checkpoint(images, tmp_path):
    for name, kept in (("byol", "online"), ("dino", "target")):
        train_ssl.main(words(name, images, tmp_path, "epochs=1", f"run_name={name}"))
        report = load_weights(BACKBONES["mobilenet_v2"](width=0.25), tmp_path / name / "last.pt")
        assert f" from part {kept} (auto prefers it to " in report


def test_mistakes_are_one_line(images, tmp_path):
    def error(*more):
        with pytest.raises(UserError) as caught:
            train_ssl.main(words("simclr", images, tmp_path, *more))
        return str(caught.value)

    assert "did you mean 'temperature'" in error("method.temprature=1")
    assert "nowhere" in error("data.root=nowhere")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "class").symlink_to(images / "train" / "class0")
    assert "supcon learns from classes" in error("method=supcon", f"data.root={tmp_path}/one")
    assert "triplet needs a defect: set defect=cutpaste" in error("method=triplet")
    assert "simclr has no use for a defect" in error("defect=cutpaste")
    assert "Triplet takes 3 views, and augment makes 2" in error("method=triplet", "defect=cutpaste", "augment=none")
    assert "SimCLR takes 2 or more views, and augment makes 1: use augment=simclr" in error("augment=none")
    assert "a step makes 16 embeddings and the queue holds 8" in error("method.bank=8")
    assert "overfit=100 must be 0 or a number of images, 36 at most" in error("overfit=100")
    assert "LARS decays no biases" in error("optim=lars", "optim.lr=1", "optim.decay_norms=true")
    assert "sync_bn=true would undo method.splits" in error("method=moco_v2", "method.splits=2", "sync_bn=true")
    assert "SimCLR has no predictor: set it to false" in error("optim.fix_predictor_lr=true")
    assert "sam.rho=-1 must be at least 0" in error("sam.rho=-1")
    assert "batch_size=7 is no multiple" in error("batch_size=7", "accumulate=2")
    assert "batch" in error("batch_size=512")
    assert "spd.name='smoth_blend' is unknown, did you mean 'smooth_blend'" in error("spd=smoth_blend")
    assert "missing key 'spd.name'; one of: cutpaste" in error("spd.weight=0.1")
    assert "spd.weight=-1 must be at least 0" in error("spd=smooth_blend", "spd.weight=-1")
    assert "images of 24 x 24 pixels are too small for Scar" in error("spd=scar")
    assert "unknown key 'spd.soft' (spd=smooth_blend), did you mean 'softness'" in error(
        "spd=smooth_blend", "spd.soft=1"
    )
    for geometry in (["data.fit=pad"], ["data.fit=crop", "data.resize=40"]):
        assert "pretraining needs whole images: data.fit=squash" in error(*geometry)
    assert torch.cuda.is_available() or "no CUDA device" in error("device=cuda")
    train_ssl.main(words("simclr", images, tmp_path, "epochs=1", "holdout=0"))
    assert "optim.lr: 0.001 -> 2.0" in error("epochs=1", "holdout=0", "optim.lr=2")
    for every, place in ((3, "there is no checkpoint yet"), (1, "the last good checkpoint is ")):
        huge = ["optim=sgd", "optim.lr=1e10", "optim.bias_lr_scale=1e10"]
        diverging = error(*huge, "resume=never", "epochs=2", f"save.every={every}")
        assert "the loss is nan by step 3" in diverging and place in diverging


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["spd=smooth_blend"]])
def test_images_stored_at_their_native_size(tmp_path, capsys, more):
    """Not squares; kNN sees them in the size of the views. What blurred views would need is said at the start."""
    for path in write_classes(tmp_path / "images", size=44).rglob("*.png"):
        with Image.open(path) as image:
            image.crop((0, 0, 44, 30)).save(path)
    about = words("simclr", tmp_path / "images", tmp_path, "data.size=native", "epochs=1", *more)
    train_ssl.main(about)
    captured = capsys.readouterr()
    assert "blurred" not in captured.err and 0 <= json.loads(captured.out.splitlines()[-1])["knn20_top1"] <= 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["size"] == [30, 44]
    vit = ["backbone=vit_tiny", "backbone.patch=8", "run_name=vit"]  # for which 30 x 44 would not do
    train_ssl.main(config.overlay([word for word in about if not word.startswith("backbone")], vit))
    train_ssl.main(about)  # finished before, with the same config
    train_ssl.main(words("simclr", tmp_path / "images", tmp_path, "data.size=16", "epochs=1", "run_name=small", *more))
    assert "images of 30 x 44 (median) are stored at 16 x 16; data.size=" in capsys.readouterr().err
    with Image.open(path) as image:
        image.crop((0, 0, 20, 20)).save(tmp_path / "images" / "train" / "class0" / "other.png")
    with pytest.raises(UserError, match=r"native needs images of one size: .* has 30 x 44, .*other\.png has 20 x 20"):
        train_ssl.main(about)


@pytest.mark.slow
def test_exit_status_two_without_traceback(tmp_path):
    words = ["train_ssl.py", "configs/demo/simclr_demo.yaml", "epoch=3", f"runs={tmp_path}/runs"]
    done = subprocess.run(command(words), cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: unknown key 'epoch', did you mean 'epochs'?"]
    assert not list(tmp_path.iterdir())
