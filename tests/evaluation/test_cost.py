"""task=describe: operations against counts by hand and by the papers; one table for any list of backbones."""

import json

import pytest
import torch
from torch import nn

import eval as eval_script
from evaluation.cost import describe
from models.backbones import BACKBONES
from runtime.errors import UserError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)

    def forward_stages(self, x, last=4):
        return [self.conv(x)] * last

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


def metrics(backbone, size=32, **options):
    options = {"batch_size": 2, "device": torch.device("cpu"), "dtype": torch.float32} | options
    return describe(backbone, size, **options)


def test_a_convolution_by_hand():
    found = metrics(Tiny())
    assert found["parameters"] == 8 * 3 * 9
    assert found["gflops"] == pytest.approx(2 * 16 * 16 * 8 * 3 * 9 / 1e9)  # a product and a sum for each weight
    assert found["features"] == 8 and found["stages"] == [[8, 16, 16]] * 4
    assert found["images_per_second"] > 0
    assert metrics(Tiny(), dtype=torch.bfloat16)["gflops"] == found["gflops"]


@pytest.mark.parametrize("name, multiply_adds", [("resnet50", 4.09), ("vit_small", 4.6), ("convnext_tiny", 4.46)])
def test_published_operations(name, multiply_adds):
    """In 10^9 multiply-adds at 224 x 224, as torchvision's and DINO's tables give them, attention included."""
    assert metrics(BACKBONES[name](), 224, batch_size=1)["gflops"] / 2 == pytest.approx(multiply_adds, rel=0.015)


def test_a_table_of_any_list(tmp_path, capsys):
    """In this process: it starts no others and leaves no state."""
    words = [
        "backbones=mobilenet_v2 width=0.25,vit_tiny patch=8 size=32",
        "size=32",
        "batch_size=2",
        f"runs={tmp_path}",
    ]
    eval_script.main(["task=describe", *words, "precision=bf16"])
    printed = capsys.readouterr()
    results = json.loads(printed.out.splitlines()[-1])["backbones"]
    assert list(results) == ["mobilenet_v2 width=0.25", "vit_tiny patch=8 size=32"]
    assert results["vit_tiny patch=8 size=32"]["stages"] == [[192, 4, 4]] * 4
    rows = [line for line in printed.err.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and rows[3].startswith("| vit_tiny patch=8 size=32 | 5,")
    assert json.loads((tmp_path / "eval" / "eval_describe" / "results.json").read_text())["backbones"] == results


@pytest.mark.parametrize(
    "words, message",
    [
        (["backbones=resnet1"], "backbones.name='resnet1' is unknown, did you mean 'resnet18'"),
        (["backbones=resnet18 depth=3"], "depth"),
        ([], "missing key 'backbones'"),
        (["backbones="], "task=describe needs backbones: names with their options, or all"),
        (["backbones=vit_tiny", "size=50"], "patches of 16 x 16 pixels, but 50 x 50 is not a multiple"),
        (["backbones=resnet18", "batch_size=0"], "batch_size"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    with pytest.raises(UserError) as error:
        eval_script.main(["task=describe", f"runs={tmp_path}", *words])
    assert message in str(error.value) and "\n" not in str(error.value)
