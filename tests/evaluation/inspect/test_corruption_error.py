"""mCE and relative mCE against the paper's formulas in plain loops, and what is no reference."""

import json

import pytest

from data.corruptions import BENCHMARK
from evaluation.inspect.corruption_error import ALEXNET, ALEXNET_CLEAN, find_reference, summary
from runtime.errors import UserError

NAMES = ["fog", "snow", "spatter"]
MEASURE = "1 - top-1"


def rows(errors):
    return [{"corruption": name, "severity": s, "error": error} for name, own in errors.items() for s, error in own]


ERRORS = {"fog": [(1, 0.2), (3, 0.5)], "snow": [(1, 0.3), (3, 0.3)], "spatter": [(1, 0.9), (3, 1.0)]}


def written(folder, **change):
    found = {"severities": [1, 3], "measure": MEASURE, "clean_error": 0.2, "errors": {"fog": 0.4, "snow": 0.6}}
    (folder / "eval_robustness").mkdir(exist_ok=True)
    (folder / "eval_robustness" / "results.json").write_text(json.dumps(found | change))
    return str(folder)


def test_means_and_ratios(tmp_path):
    reference = find_reference(written(tmp_path), NAMES, [1, 3], MEASURE)
    found = summary(0.1, rows(ERRORS), reference)
    assert found["corruptions_in_mean"] == ["fog", "snow"]  # spatter is not of the benchmark
    assert found["corrupted_error"] == pytest.approx((0.35 + 0.3) / 2)
    assert found["degradation"] == pytest.approx((0.25 + 0.2) / 2)
    assert found["mce"] == pytest.approx((0.7 / 0.8 + 0.6 / 1.2) / 2)
    relative = ((0.1 + 0.4) / (0.2 + 0.2), (0.2 + 0.2) / (0.4 + 0.4))
    assert found["relative_mce"] == pytest.approx(sum(relative) / 2)


def test_without_a_reference_and_without_errors():
    found = summary(0.1, rows(ERRORS), None)
    assert found["mce"] is None and found["relative_mce"] is None and found["degradation"] is not None
    found = summary(None, rows({"fog": [(1, None), (3, 0.5)]}), None)
    assert found["corrupted_error"] is None and found["degradation"] is None
    assert summary(0.1, rows({"spatter": [(1, 0.4)]}), None)["corrupted_error"] is None


def test_a_reference_that_is_no_worse_under_a_corruption_has_no_relative_mce(tmp_path):
    reference = find_reference(written(tmp_path, clean_error=0.4), NAMES, [1, 3], MEASURE)
    found = summary(0.1, rows(ERRORS), reference)
    assert found["relative_mce"] is None and found["mce"] is not None


def test_alexnet_has_an_mce_of_1_and_resnet50_the_published_one():
    reference = find_reference("alexnet", list(BENCHMARK), [1, 2, 3, 4, 5], MEASURE)
    own = summary(ALEXNET_CLEAN, rows({name: [(1, ALEXNET[name])] for name in BENCHMARK}), reference)
    assert own["mce"] == pytest.approx(1) and own["relative_mce"] == pytest.approx(1)
    assert own["corrupted_error"] == pytest.approx(0.789, abs=5e-5)  # data.md's mean
    # the corruption errors of ResNet-50 in table 1 of the paper, in percent of AlexNet's, give its mCE of 76.7
    percent = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)
    errors = {name: [(1, share / 100 * ALEXNET[name])] for name, share in zip(BENCHMARK, percent)}
    assert summary(0.2385, rows(errors), reference)["mce"] == pytest.approx(0.767, abs=0.003)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severities": [1, 2]}, r"was measured at severities=\[1, 2\], not \[1, 3\]"),
        ({"measure": "1 - image AUROC"}, "errors of another kind: 1 - image AUROC, here 1 - top-1"),
        ({"errors": {"fog": 0.4}}, "has no error of snow"),
        ({"errors": {"fog": 0.4, "snow": None}}, "has no error of snow"),
        ({"clean_error": None}, "has no results of task=robustness"),
        ({"errors": [0.4]}, "has no results of task=robustness"),
    ],
)
def test_what_is_no_reference(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        find_reference(written(tmp_path, **change), NAMES, [1, 3], MEASURE)


def test_no_file_and_too_few_severities(tmp_path):
    with pytest.raises(UserError, match="give alexnet, or a run folder"):
        find_reference(str(tmp_path / "none"), NAMES, [1], MEASURE)
    with pytest.raises(UserError, match="all five severities"):
        find_reference("alexnet", NAMES, [1, 3], MEASURE)
    with pytest.raises(UserError, match="alexnet has errors of classes, and here they are 1 - image AUROC"):
        find_reference("alexnet", NAMES, [1, 2, 3, 4, 5], "1 - image AUROC")
    assert find_reference(None, NAMES, [1], MEASURE) is None
