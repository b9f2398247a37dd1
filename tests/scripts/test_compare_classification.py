"""task=compare_classification and task=transfer: equal to the tasks of one backbone, in two processes, and mistakes."""

import csv
import json

import pytest

import eval as evaluate
import train_classifier
import train_ssl
from runtime.errors import UserError
from tests.images import write_classes
from tests.processes import script

NETWORK = "vit_tiny patch=8 size=32"  # of few features, on which logistic regression is fast
WORDS = ["backbone=vit_tiny", "backbone.patch=8", "backbone.size=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sets of images, and runs of pretraining and fine-tuning on the first."""
    place = tmp_path_factory.mktemp("place")
    images = write_classes(place / "images")
    write_classes(place / "others", classes=2, each=8)
    small = [f"data.root={images}", "data.size=32", "augment.size=32", f"runs={place}", "device=cpu"]
    small += [*WORDS, "epochs=1", "batch_size=8"]
    train_ssl.main(["configs/demo/simclr_demo.yaml", *small, "optim.warmup_epochs=0", "run_name=ssl"])
    train_classifier.main(["configs/demo/classifier_demo.yaml", *small, "unfreeze.head_epochs=0", "run_name=tuned"])
    return place


def data(place):
    return ["data.name=folder", f"data.root={place}/images", "data.size=32", f"runs={place}", "device=cpu"]


def compare(place, name):
    about = [*data(place), f"backbones={NETWORK}", f"checkpoints={place}/ssl,{place}/tuned/last.pt"]
    return ["task=compare_classification", *about, f"run_name={name}", "top_k=2", "average=weighted"]


def last(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def results(place):
    evaluate.main(compare(place, "compared"))
    return json.loads((place / "compared/eval_compare_classification/results.json").read_text())


@pytest.mark.slow
def test_each_is_measured_as_by_itself(place, results, capsys):
    rows = {(row["measure"], row["metric"], row["name"]): row for row in results["rows"]}
    own = {("knn", NETWORK): WORDS, ("logistic", "ssl"): [f"checkpoint={place}/ssl"]}
    own["knn", "tuned"] = [f"checkpoint={place}/tuned"]
    for (measure, name), words in own.items():
        evaluate.main([f"task={measure}", *words, *data(place)])
        assert rows[measure, "accuracy", name]["value"] == last(capsys)["top1"]
    tuned = json.loads((place / "tuned" / "results.json").read_text())
    assert rows["own head", "accuracy", "tuned"]["value"] == tuned["top1"]
    assert ("own head", "accuracy", "ssl") not in rows and len(rows) == 2 * 5 * 3 + 5
    folder = place / "compared" / "eval_compare_classification"
    table = (folder / "comparison.md").read_text()
    assert "| top-2" in table and "weighted average" in table and f"The first: {NETWORK} (knn)" in table
    with open(folder / "comparison.csv") as file:
        written = [*csv.DictReader(file)]
    assert [float(row["value"]) for row in written] == [row["value"] for row in results["rows"]]
    assert [float(row["low"]) for row in written] == [row["interval"][0] for row in results["rows"]]
    assert written[0]["difference_low"] == "" and float(written[1]["p"]) > 0  # the first, and one compared with it


@pytest.mark.slow
def test_two_processes_are_one(place, results):
    assert script(["eval.py", *compare(place, "two")], processes=2)["rows"] == results["rows"]


@pytest.mark.slow
def test_images_that_a_run_has_learned_from_are_not_new(place, capsys):
    """Where a file exchanges training and test images."""
    (place / "all").mkdir()
    for path in sorted((place / "images/train").iterdir()):
        (place / "all" / path.name).symlink_to(path)
    about = ["data.name=folder", f"data.root={place}/all", "data.size=32", f"runs={place}", "device=cpu"]
    small = [*about[1:], "augment.size=32", "epochs=1", "batch_size=8", "unfreeze.head_epochs=0", "run_name=leak"]
    train_classifier.main(["configs/demo/classifier_demo.yaml", *small, *WORDS])
    both = [f"backbones={NETWORK}", f"checkpoints={place}/leak", "measures=knn", "metrics=accuracy"]
    evaluate.main(["task=compare_classification", *about, *both])
    assert "warning: leak has learned" not in capsys.readouterr().err
    both[-1] = "metrics=accuracy,top_k"
    text = (place / "leak/splits.csv").read_text()
    (place / "exchanged.csv").write_text(text.replace(",test", ",x").replace(",train", ",test").replace(",x", ",train"))
    evaluate.main(["task=compare_classification", *about, *both, f"data.splits={place}/exchanged.csv"])
    learned = json.loads((place / "leak/results.json").read_text())["n_train"]
    err = capsys.readouterr().err
    assert f"warning: leak has learned from {learned} of the test images" in err and "top-5 is left out" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbones=resnet18"], "needs two or more"),
        ([f"backbones={NETWORK},{NETWORK}"], "names vit_tiny patch=8 size=32 twice"),
        (["backbones=resnet18,resnet19"], r"backbones\.name='resnet19' is unknown, did you mean"),
        (["backbones=resnet18,vit_tiny patch"], "is not key=value"),
        (["backbones=resnet18,vit_tiny dash=8"], r"unknown key 'backbones\.dash'"),
        (["backbones=resnet18", "checkpoints={place}/nothing"], "nothing"),
        (["backbones=resnet18,resnet34", "measures="], "needs measures and metrics"),
        (["backbones=resnet18,resnet34", "metrics=f1,recall,f1"], "metrics names f1 twice"),
        (["backbones=resnet18,resnet34", "metrics=top_k"], "the images have 3 classes; lower top_k=5"),
        (["backbones=resnet18,resnet34", "average=mean"], "macro, micro, weighted"),
        (["backbones=resnet18", "checkpoints={place}/tuned", "data.root={place}/others"], "not those of the images"),
    ],
)
def test_mistakes_are_one_line(place, words, message):
    about = [word for word in data(place) if not any("data.root" in more for more in words) or "data.root" not in word]
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["task=compare_classification", *about, *(w.format(place=place) for w in words), "run_name=bad"])
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value) and not (place / "bad").exists()


def transfer(place, name, *more):
    sets = [
        f"data.sets.{key}.{word}" for key in ("images", "others") for word in ("name=folder", f"root={place}/{key}")
    ]
    about = ["task=transfer", "data.name=mixed", "data.size=32", "device=cpu", f"runs={place}", f"run_name={name}"]
    return [*about, *WORDS, *sets, *more]


@pytest.mark.slow
def test_transfer_is_logistic_regression_on_each_set(place, capsys):
    evaluate.main(transfer(place, "sets"))
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    about = data(place)
    for row, (name, counts) in zip(results["sets"], {"images": (3, 36, 12), "others": (2, 16, 4)}.items(), strict=True):
        evaluate.main(["task=logistic", *WORDS, about[0], f"data.root={place}/{name}", *about[2:]])
        alone = last(capsys)
        assert (row["set"], row["n_classes"], row["n_train"], row["n_test"]) == (name, *counts)
        assert [row[key] for key in ("top1", "balanced_accuracy", "l2")] == [
            alone[key] for key in ("top1", "balanced_accuracy", "l2")
        ]
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
    assert results["top1"] == pytest.approx(sum(row["top1"] for row in results["sets"]) / 2)
    assert "| mean" in err and (place / "sets/eval_transfer/results.json").exists()


@pytest.mark.slow
def test_transfer_in_two_processes(place, capsys):
    evaluate.main(transfer(place, "sets_of_one"))
    assert script(["eval.py", *transfer(place, "sets_of_two")], processes=2)["sets"] == last(capsys)["sets"]


def test_transfer_of_a_checkpoint(place, capsys):
    words = [word for word in transfer(place, "x") if not word.startswith("backbone") and "data.size" not in word]
    evaluate.main([*words, f"checkpoint={place}/ssl"])
    assert [row["set"] for row in last(capsys)["sets"]] == ["images", "others"]
    assert (place / "ssl/eval_transfer/results.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.min_per_class=2"], r"data\.min_per_class has no place"),
        (["data.sets.one.name=folder", "data.sets.one.root={place}/single"], r"data\.sets\.one .* one class only"),
    ],
)
def test_mistakes_of_transfer(place, more, message):
    if not (place / "single").exists():
        write_classes(place / "single", classes=1)
    with pytest.raises(UserError, match=message):
        evaluate.main([*transfer(place, "bad_sets"), *(word.format(place=place) for word in more)])
    with pytest.raises(UserError, match=r"takes data\.name=mixed"):
        evaluate.main(["task=transfer", "backbone=resnet18", *data(place)])
