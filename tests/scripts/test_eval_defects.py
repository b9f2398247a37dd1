"""eval.py task=defects: a sheet of all kinds, of one kind with options, and mistakes."""

import json

import pytest
from PIL import Image

import eval as evaluate
import predict
from data.defects import DEFECTS
from runtime.errors import UserError
from tests.images import write_mvtec


@pytest.fixture
def words(tmp_path):
    write_mvtec(tmp_path / "mvtec")
    about = ["data.name=mvtec", f"data.root={tmp_path}/mvtec", "data.category=part", "device=cpu", f"runs={tmp_path}"]
    return ["task=defects", *about]


def test_a_sheet_of_all_kinds(words, tmp_path, capsys):
    evaluate.main([*words, "data.size=48", "images=3"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results["kinds"]) == list(DEFECTS) and 0.02 < results["kinds"]["cutpaste"]["masked"] < 0.2
    whole = Image.open(tmp_path / "eval" / "eval_defects" / "defects.png")
    evaluate.main([*words, "data.size=48", "images=3", "defect=cutpaste", "defect.area=0.5,0.6", "run_name=one"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results["kinds"]) == ["cutpaste"] and 0.4 < results["kinds"]["cutpaste"]["masked"] < 0.7
    one = Image.open(tmp_path / "one" / "eval_defects" / "defects.png")
    assert one.width == whole.width and 2 * one.height < whole.height


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["data.size=16"], "16 x 16 pixels are too small"),
        (["data.size=48", "defect=nas"], "one of: cutpaste"),
        (["data.size=48", "defect=nsa", "defect.gradients=both"], "gradients"),
        (["data.size=48", "images=0"], "images=0 must be at least 1"),
    ],
)
def test_mistakes(words, more, match):
    with pytest.raises(UserError, match=match):
        evaluate.main([*words, *more])


@pytest.mark.parametrize("main", [evaluate.main, predict.main])
def test_the_key_of_earlier_versions_names_the_new_one(main, words):
    words = ["run", "images"] if main is predict.main else words
    with pytest.raises(UserError, match="unknown key 'pictures': it is now 'images'"):
        main([*words, "pictures=3"])
