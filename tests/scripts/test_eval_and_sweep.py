"""eval.py on a checkpoint and on weights; sweep.py: a table, a second run that skips, a cell that fails."""

import json

import pytest
import torch
import torchvision

import eval as evaluate
import sweep
import train_ssl
from tests.pictures import write_classes, write_mvtec
from training.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("pictures"))


def test_eval_needs_only_a_checkpoint(pictures, tmp_path, capsys):
    small = [f"data.root={pictures}", "data.size=32", f"runs={tmp_path}", "run_name=run", "epochs=1", "batch_size=8"]
    train_ssl.main(["configs/simclr_demo.yaml", *small, "augment.size=24", "device=cpu"])
    for task in ("knn", "linear"):
        evaluate.main([f"task={task}", f"checkpoint={tmp_path}/run/last.pt", "device=cpu"])
        results = json.loads(capsys.readouterr().out.splitlines()[-1])
        folder = tmp_path / "run" / f"eval_{task}"
        assert results == json.loads((folder / "results.json").read_text())
        assert (results["n_train"], results["n_test"], results["task"]) == (36, 12, task)
        assert 0 <= results["top1"] <= results["top5"] <= 1
        assert {"per_class", "macro_f1"} <= set(results) or "confusion" in results
        assert (folder / "confusion.png").exists()
    assert {"lr", "holdout_top1"} <= set(results)


def test_eval_of_published_weights(pictures, tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    about = ["backbone.name=resnet18", f"backbone.weights={tmp_path}/weights.pth", f"runs={tmp_path}"]
    evaluate.main(["configs/eval_folder.yaml", f"data.root={pictures}", "data.size=32", *about, "device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"knn20_top1", "knn200_top1"} <= set(results)


def test_eval_mistakes(pictures, tmp_path):
    with pytest.raises(UserError, match="one of: knn, linear"):
        evaluate.main(["task=nkn", "backbone=resnet18", f"data.root={pictures}", "data.name=folder", "data.size=32"])
    with pytest.raises(UserError, match="No such file"):
        evaluate.main(["task=knn", f"checkpoint={tmp_path}/nothing.pt"])


SWEEP = """
pretraining:
  random: ""
  simclr: configs/simclr_demo.yaml data.root={classes} epochs=1 augment.size=24
  broken: backbone.weights=no.pt
detectors: {{embedding: configs/embedding_demo.yaml, patchcore: configs/patchcore_demo.yaml}}
tasks: {{part: data.root={mvtec} data.category=part}}
also: data.size=32 batch_size=8 device=cpu
metrics: [image_auroc, aupro]
runs: {runs}
run_name: grid
"""


def test_sweep(pictures, tmp_path, capfd):
    write_mvtec(tmp_path / "mvtec")
    path = tmp_path / "grid.yaml"
    path.write_text(SWEEP.format(classes=pictures, mvtec=tmp_path / "mvtec", runs=tmp_path / "runs"))

    def run():
        with pytest.raises(SystemExit) as end:  # a cell fails
            sweep.main([str(path)])
        assert end.value.code == 1
        return capfd.readouterr()

    out, err = run()
    top = tmp_path / "runs" / "grid"
    assert json.loads(out.splitlines()[-1])["failed"] == ["part/embedding/broken", "part/patchcore/broken"]
    table = (top / "results.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert ["task", "detector", "figure", "random", "simclr", "broken"] in rows
    cell = json.loads((top / "part" / "patchcore" / "simclr" / "results.json").read_text())
    shown = next(row for row in rows if row[:3] == ["part", "patchcore", "image_auroc"])
    low, high = cell["image_auroc_interval"]
    assert shown[4] == f"{cell['image_auroc']:.3f} [{low:.3f}, {high:.3f}]"
    assert "cannot read no.pt" in shown[5]
    assert (top / "results.csv").read_text().count("\n") == 1 + 7
    assert err.count("done before") == 0

    assert run().err.count("done before") == 5  # all but the broken ones, which are tried again

    path.write_text(path.read_text().replace("epochs=1", "epochs=2"))
    assert run().err.count("done before") == 2  # what stands on the changed pretraining runs again
