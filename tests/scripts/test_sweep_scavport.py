"""configs/sweeps/sweep_scavport.yaml from end to end, with a pretraining of each kind and each set, in small."""

import json
import re
from urllib.parse import unquote

import pytest
import torch
import torchvision

import sweep
from data.demo.generate import generate
from tests.data.datasets.layouts import write_dimo
from tests.evaluation.dataset.test_report import Page
from tests.images import TOP
from tests.sweeps import table_of

KEPT = ("imagenet", "supcon_scavport", "revd_archive", "simclr_dimo")  # of the columns, in their order
TASKS = ("anomalies", "class0", "dimo", "tiles")
DETECTORS = ("embedding", "patchcore", "rd4ad")


def reduced() -> str:
    """The file without the other columns and classes."""
    text = (TOP / "configs/sweeps/sweep_scavport.yaml").read_text()
    text = re.sub(r"^  class[1-7]: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"^  (?!{'|'.join(KEPT)})\w+_(scavport|archive|dimo): .*\n", "", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_whole_table_in_small(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(TOP)
    generate(tmp_path / "demo", scale=0.05, workers=0)
    write_dimo(tmp_path / "dimo", scenes=8)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "sweep_scavport.yaml").write_text(reduced().replace("datasets/demo", str(tmp_path / "demo")))
    words = [str(tmp_path / "sweep_scavport.yaml"), f"values.dimo={tmp_path}/dimo", f"runs={tmp_path}/runs"]
    words += [f"values.archive={tmp_path}/demo/condition", f"values.imagenet={tmp_path}/resnet18.pth"]
    small = "data.size=32 augment.size=32 epochs=1 batch_size=4 optim=adamw optim.lr=1e-3 optim.warmup_epochs=0"
    words += [f"values.pretrain={small} precision=fp32 sync_bn=false", "values.detect=data.size=32"]
    words += ["values.train=data.size=32 epochs=1 batch_size=4", "also=device=cpu"]

    sweep.main(words)
    out, err = capfd.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert (last["cells"], last["failed"], last["stale"]) == (3 + 4 * 3 * 4, [], []) and "left out" not in err
    top = tmp_path / "runs/sweep_scavport"
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in table_of(top).splitlines()]
    assert ["task", "detector", "metric", *KEPT] in rows
    shown = {(row[0], row[1]): row[3:] for row in rows if len(row) == 7 and row[2] == "image_auroc"}
    assert {(task, detector) for task in (*TASKS, "mean") for detector in DETECTORS} <= shown.keys()
    assert all(re.match(r"\d\.\d{3} ", text) for texts in shown.values() for text in texts)
    page = Page((top / "results.html").read_text())
    links = [about["href"] for tag, about in page.tags if tag == "a" and about["href"][0] != "#"]
    assert all((top / unquote(link)).exists() for link in links) and len({*links}) > 60
    assert sum(tag == "img" for tag, _ in page.tags) == len([*top.rglob("heatmaps.png")]) > 0

    sweep.main(words)
    assert capfd.readouterr().err.count("done before") == last["cells"]
