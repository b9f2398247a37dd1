"""The variants of a sweep's grid: their words, and names that any file system takes."""

import pytest

import sweep


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ({}, [""], [[]]),
        ({"optim.lr": 0.1}, ["_lr-0.1"], [["optim.lr=0.1"]]),
        ({"a.x": ["1"], "b.x": [2]}, ["_a.x-1_b.x-2"], [["a.x=1", "b.x=2"]]),
        ({"method.name": "a, b"}, ["_method-a", "_method-b"], [["method.name=a"], ["method.name=b"]]),
        ({"scale": [[0.2, 1], None]}, ["_scale-0.2,1", "_scale-none"], [["scale=0.2,1"], ["scale=none"]]),
    ],
)  # fmt: skip
def test_how_variants_are_spelled(values, names, words):
    assert sweep.variants(values) == list(zip(names, words))


def test_names_of_variants_are_names_of_folders(tmp_path):
    values = ["a/b", "a:b", "a b", "../..", "x" * 300, "x" * 301, "é" * 300]
    names = [name for name, _ in sweep.variants({"data.root": values})]
    assert len({*names}) == len(values) and names[0].startswith("_root-a_b-")
    for name in names:
        (tmp_path / f"part{name}").mkdir()
        assert (tmp_path / f"part{name}").parent == tmp_path and not set(name) & set('/\\:*?"<>| =')
