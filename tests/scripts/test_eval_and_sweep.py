"""eval.py on a checkpoint and on weights; sweep.py: a table, a second run that skips, a cell that fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml

import eval as evaluate
import sweep
import train_anomaly
import train_ssl
from evaluation.knn import knn_scores
from evaluation.sweep_table import Axes, Outcome, mean_rows
from runtime.errors import UserError
from tests.images import write_classes, write_mvtec
from tests.sweeps import table_of


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
def test_eval_needs_only_a_checkpoint(images, tmp_path, capsys):
    small = [f"data.root={images}", "data.size=32", f"runs={tmp_path}", "run_name=run", "epochs=1", "batch_size=8"]
    train_ssl.main(["configs/demo/simclr_demo.yaml", *small, "augment.size=24", "device=cpu"])
    for task in ("knn", "logistic", "linear"):
        evaluate.main([f"task={task}", f"checkpoint={tmp_path}/run/last.pt", "device=cpu"])
        out, err = capsys.readouterr()
        results, said = json.loads(out.splitlines()[-1]), err.count("kNN with k=200: there are only 36 training images")
        assert said == (task == "knn") and "UserWarning" not in err
        folder = tmp_path / "run" / f"eval_{task}"
        assert results == json.loads((folder / "results.json").read_text())
        assert (results["n_train"], results["n_test"], results["task"]) == (36, 12, task)
        assert 0 <= results["top1"] <= 1 and results["top5"] is None  # of three classes
        assert {"per_class", "macro_f1"} <= set(results) or "confusion" in results
        assert (folder / "confusion.png").exists() and (folder / "confused.png").exists()
    assert {"lr", "holdout_top1"} <= set(results)
    evaluate.main(["task=knn", f"checkpoint={tmp_path}/run", "device=cpu"])  # a run folder is its last.pt
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    first = json.loads((tmp_path / "run" / "eval_knn" / "results.json").read_text())
    assert again == first and again["features/std"] > 0 and not (tmp_path / "eval_knn").exists()
    about = ["backbone=resnet18", f"backbone.weights={tmp_path}/run", "data.name=folder", f"data.root={images}"]
    evaluate.main(["task=knn", *about, "data.size=32", f"runs={tmp_path}", "run_name=other", "device=cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == first["top1"]


def test_few_labels_and_features(images, tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    about = ["backbone.name=resnet18", f"backbone.weights={tmp_path}/weights.pth", f"runs={tmp_path}", "device=cpu"]
    about = ["configs/eval_folder.yaml", f"data.root={images}", "data.size=32", *about]
    evaluate.main([*about, "task=features"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    arrays = np.load(results["file"])
    assert arrays["classes"].tolist() == sorted(path.name for path in (images / "train").iterdir())
    for split, count in (("train", 36), ("test", 12)):
        assert arrays[f"{split}_features"].shape == (count, 512) == (count, results["width"])
        for name, label in zip(arrays[f"{split}_names"], arrays[f"{split}_labels"]):
            assert (images / name).is_file() and Path(name).parent.name == arrays["classes"][label]
    evaluate.main([*about, "task=few_label", "per_class=1,30", "draws=2"])
    out, err = capsys.readouterr()
    one, all_of_them = json.loads(out.splitlines()[-1])["few_label"]
    assert (one["n_labeled"], all_of_them["n_labeled"]) == (3, 36) and "have fewer than 30 training images" in err
    assert all_of_them["knn_top1_std"] == all_of_them["logistic_top1_std"] == 0  # the same images in each draw
    scores = knn_scores(
        *(torch.from_numpy(arrays[f"train_{what}"]) for what in ("features", "labels")),
        torch.from_numpy(arrays["test_features"]),
        k=20,
        temperature=0.07,
        n_classes=3,
    )
    assert all_of_them["knn_top1"] == (scores.argmax(1).numpy() == arrays["test_labels"]).mean()
    lines = [
        json.loads(line)
        for line in (Path(results["file"]).parents[1] / "eval_few_label/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 30] and lines[0]["few_label/knn_top1"] == one["knn_top1"]


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny"])
def test_protocol(images, tmp_path, capsys, backbone):
    patch = ["backbone.patch=8", "backbone.size=32"] if "vit" in backbone else []
    about = ["data.name=folder", f"data.root={images}", "data.size=32", f"runs={tmp_path}", "device=cpu", *patch]
    evaluate.main(["task=protocol", "protocol=dino", f"backbone={backbone}", "epochs=2", "train_batch=8", *about])
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert "crops of 32 x 32 pixels, tested on the center of images whose short side is 37 (bicubic)" in err
    assert (results["width"], results["epochs"], results["train_batch"]) == (768 if patch else 512, 2, 8)
    assert results["n_test"] == 12 and (tmp_path / "eval/eval_protocol/confusion.png").exists()
    lines = (tmp_path / "eval/eval_protocol/metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert second["lr"] == pytest.approx(first["lr"] / 2) == pytest.approx(1e-3 * 8 / 256 / 2)


def test_eval_of_published_weights(images, tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    about = ["backbone.name=resnet18", f"backbone.weights={tmp_path}/weights.pth", f"runs={tmp_path}"]
    evaluate.main(["configs/eval_folder.yaml", f"data.root={images}", "data.size=32", *about, "device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"knn20_top1", "knn200_top1"} <= set(results)


def test_eval_mistakes(images, tmp_path):
    with pytest.raises(UserError, match="one of: knn, linear"):
        evaluate.main(["task=nkn", "backbone=resnet18", f"data.root={images}", "data.name=folder", "data.size=32"])
    with pytest.raises(UserError, match="No such file"):
        evaluate.main(["task=knn", f"checkpoint={tmp_path}/nothing.pt"])
    with pytest.raises(UserError, match=r"is a folder without last\.pt"):
        evaluate.main(["task=knn", f"checkpoint={tmp_path}"])
    for wrong, message in {
        "task.k=0": r"task\.k=0 must be at least 1",
        "task.temperature=0": r"task\.temperature=0 must be above 0",
        "task=linear task.epochs=0": r"task\.epochs=0 must be at least 1",
    }.items():
        about = ["backbone=resnet18", f"data.root={images}", "data.name=folder", "data.size=32", f"runs={tmp_path}"]
        with pytest.raises(UserError, match=message):
            evaluate.main([*(["task=knn"] if "linear" not in wrong else []), *wrong.split(), *about])
        assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_one_class_is_no_test(task, tmp_path):
    """Every image would be called that class: top-1 1.0, whatever the backbone."""
    root = write_mvtec(tmp_path / "set")
    for data in (
        ["data.name=folder", f"data.root={root}/part/train"],
        ["data.name=mvtec", f"data.root={root}", "data.category=part"],
    ):
        about = [*data, "data.size=32", f"runs={tmp_path}", "device=cpu", "backbone=resnet18", "backbone.weights=null"]
        with pytest.raises(UserError, match=f"task={task} tells classes apart, but all training images .* of one"):
            evaluate.main([f"task={task}", *about])


@pytest.mark.slow
def test_compare_runs_on_the_same_images(tmp_path, capsys):
    write_mvtec(tmp_path / "mvtec")
    about = [f"data.root={tmp_path}/mvtec", "data.category=part", "data.size=32", f"runs={tmp_path}", "device=cpu"]
    train_anomaly.main(["configs/demo/embedding_demo.yaml", *about, "run_name=a"])
    train_anomaly.main(["configs/demo/patchcore_demo.yaml", *about, "run_name=b"])
    train_anomaly.main(["configs/demo/patchcore_demo.yaml", *about, "run_name=c", "detector.coreset=0.5"])
    values = {n: json.loads((tmp_path / n / "results.json").read_text()) for n in "abc"}
    capsys.readouterr()
    evaluate.main(["task=compare", f"runs={tmp_path}/a,{tmp_path}/b,{tmp_path}/c"])
    out, err = capsys.readouterr()
    rows = {(row["metric"], row["a"][-1], row["b"][-1]): row for row in json.loads(out.splitlines()[-1])["differences"]}
    assert ("pixel_auroc", "b", "c") in rows and ("pixel_auroc", "a", "b") not in rows  # embedding draws no maps
    for (metric, a, b), row in rows.items():
        assert row["difference"] == pytest.approx(values[b][metric] - values[a][metric], abs=1e-9)
        assert row["interval"][0] <= row["interval"][1] and 0 < row["p"] <= 1
    assert "| image_auroc" in err and (tmp_path / "a" / "eval_compare" / "results.json").exists()
    with pytest.raises(UserError, match="two run folders or more"):
        evaluate.main(["task=compare", f"runs={tmp_path}/a"])
    with pytest.raises(UserError, match=r"test_scores\.pt"):
        evaluate.main(["task=compare", f"runs={tmp_path}/a,{tmp_path}/nothing"])


def test_means_over_tasks_have_a_deviation():
    axes = Axes([f"draw{i}" for i in range(3)], {"d": []}, {"a": [], "b": []}, [])
    values = [0.90, 0.96, 0.99]
    outcomes = {f"draw{i}/d/a": Outcome({"f": value, "g": None}, {}) for i, value in enumerate(values)}
    outcomes |= {f"draw{i}/d/b": Outcome({"f": 0.5} if i else {"error": "failed"}, {}) for i in range(3)}
    row = ["mean", "d", "f", f"0.950 ± {np.std(values, ddof=1):.3f}", "-"]
    assert mean_rows(axes, outcomes, ["f", "g"]) == [row]
    assert mean_rows(axes._replace(tasks=["draw1"]), outcomes, ["f"]) == [["mean", "d", "f", "0.960", "0.500"]]


SWEEP = """
pretraining:
  random: ""
  simclr: configs/demo/simclr_demo.yaml data.root={classes} epochs=1 augment.size=24
  broken: backbone.weights=no.pt
detectors: {{embedding: configs/demo/embedding_demo.yaml, patchcore: configs/demo/patchcore_demo.yaml}}
tasks: {{part: data.root={mvtec} data.category=part}}
also: data.size=32 batch_size=8 device=cpu
metrics: [image_auroc, aupro]
mean: true
runs: {runs}
run_name: grid
"""


@pytest.mark.slow
def test_sweep(images, tmp_path, capfd):
    write_mvtec(tmp_path / "mvtec")
    path = tmp_path / "grid.yaml"
    path.write_text(SWEEP.format(classes=images, mvtec=tmp_path / "mvtec", runs=tmp_path / "runs"))

    def run():
        with pytest.raises(SystemExit) as end:  # a cell fails
            sweep.main([str(path)])
        assert end.value.code == 1
        return capfd.readouterr()

    out, err = run()
    top = tmp_path / "runs" / "grid"
    assert json.loads(out.splitlines()[-1])["failed"] == ["part/embedding/broken", "part/patchcore/broken"]
    table = table_of(top)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert ["task", "detector", "metric", "random", "simclr", "broken"] in rows
    cell = json.loads((top / "part" / "patchcore" / "simclr" / "results.json").read_text())
    shown = next(row for row in rows if row[:3] == ["part", "patchcore", "image_auroc"])
    low, high = cell["image_auroc_interval"]
    assert shown[4] == f"{cell['image_auroc']:.3f} [{low:.3f}, {high:.3f}]"
    assert "cannot read no.pt" in shown[5]
    mean = next(row for row in rows if row[:3] == ["mean", "patchcore", "image_auroc"])
    assert mean[4:6] == [f"{cell['image_auroc']:.3f}", "-"]  # of one task, and of a cell that failed
    assert (top / "results.csv").read_text().count("\n") == 1 + 7
    assert err.count("done before") == 0

    assert run().err.count("done before") == 5  # all but the broken ones, which are tried again

    path.write_text(path.read_text().replace("epochs=1", "epochs=2"))
    assert run().err.count("done before") == 2  # what stands on the changed pretraining runs again


def test_sweep_measures_backbones_themselves(images, tmp_path, capfd):
    """An eval.py in the place of a detector; random weights differ by the seed, and are the same the next time."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        "pretraining: {random: backbone.name=mobilenet_v2 backbone.width=0.25}\n"
        "detectors: {knn: eval.py task=knn device=cpu data.size=32}\n"
        f"tasks: {{stripes: data.name=folder data.root={images}}}\n"
        f"seeds: [0, 1]\nmetrics: [top1]\nruns: {tmp_path}/runs\nrun_name: grid\n"
    )
    sweep.main([str(path)])
    capfd.readouterr()
    cells = tmp_path / "runs" / "grid" / "stripes" / "knn" / "random"
    a, b = (json.loads((cells / f"seed{seed}/eval_knn/results.json").read_text()) for seed in (0, 1))
    assert f"{(a['top1'] + b['top1']) / 2:.3f}" in table_of(tmp_path / "runs" / "grid")
    sweep.main([str(path)])
    assert capfd.readouterr().err.count("done before") == 2
    features = [evaluate_once(images, tmp_path / name, seed) for name, seed in (("x", 0), ("y", 0), ("z", 1))]
    assert features[0] == features[1] != features[2]


def evaluate_once(images, runs, seed):
    words = ["task=linear", "device=cpu", "data.size=32", "data.name=folder", f"data.root={images}", f"runs={runs}"]
    evaluate.main([*words, "backbone.name=mobilenet_v2", "backbone.width=0.25", f"seed={seed}"])
    found = json.loads((runs / "eval" / "eval_linear" / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.slow
def test_sweep_over_seeds(images, tmp_path, capfd):
    write_mvtec(tmp_path / "mvtec")
    text = SWEEP.format(classes=images, mvtec=tmp_path / "mvtec", runs=tmp_path / "runs")
    text = text.replace("{part:", "{again: data.root=" + f"{tmp_path}/mvtec data.category=part holdout=0.3, part:")
    text = text.replace("embedding: configs/demo/embedding_demo.yaml, ", "")
    path = tmp_path / "grid.yaml"
    path.write_text("\n".join(line for line in text.splitlines() if "broken" not in line) + "\nseeds: [3, 4]\n")
    sweep.main([str(path)])
    top = tmp_path / "runs" / "grid"
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table_of(top).splitlines()]
    values = {}
    for task in ("again", "part"):
        for seed in (3, 4):
            folder = top / task / "patchcore" / "simclr" / f"seed{seed}"
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["seed"] == seed
            assert config["backbone"]["weights"] == str(top / "pretraining" / "simclr" / f"seed{seed}" / "last.pt")
            values[task, seed] = json.loads((folder / "results.json").read_text())["aupro"]
        mean, low, high = np.mean(x := [values[task, 3], values[task, 4]]), *x
        shown = next(row for row in rows if row[:3] == [task, "patchcore", "aupro"])
        assert shown[4] == f"{mean:.3f} ± {abs(high - low) / 2**0.5:.3f}"
    means = [(values["again", seed] + values["part", seed]) / 2 for seed in (3, 4)]
    shown = next(row for row in rows if row[:3] == ["mean", "patchcore", "aupro"])
    assert shown[4] == f"{np.mean(means):.3f} ± {abs(means[1] - means[0]) / 2**0.5:.3f}"
    assert "over seeds 3, 4" in table_of(top)
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {
        "cells": 2 + 8, "failed": [], "stale": [], "table": str(top / "results.md")
    }  # fmt: skip
