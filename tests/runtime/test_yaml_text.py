"""YAML as it was written: texts keep their spelling, config.yaml reads back equal, and no file can hang the reader."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml

from runtime.config import as_dict, build, load, merge, read, run_folder
from runtime.errors import UserError
from runtime.values import PathText, Seed, coerce
from runtime.yaml_text import read_yaml


@dataclass(kw_only=True)
class Inner:
    text: str = "a"
    maybe: str | None = None


@dataclass(kw_only=True)
class Config:
    category: str = "x"
    maybe: str | None = None
    count: int = 1
    rate: float = 0.1
    flag: bool = False
    kind: Literal["on", "off", "01"] = "on"
    sizes: tuple[int, ...] = (1,)
    names: list[str] = ()
    place: PathText = "here"
    weights: PathText | None = None
    pairs: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    run_name: str = "x"


@pytest.fixture
def of(tmp_path):
    def config(text: str, *words: str) -> Config:
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
        return load(Config, [str(tmp_path / "a.yaml"), *words])

    return config


WRITTEN = ["01", "010", "0x10", "on", "no", "null", "None", "~x", "1e3", "1.0", "2024-01-01", "12:30", "1_000", ".5"]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_text_is_what_was_written(of, written):
    assert of(f"category: {written}").category == written
    assert of(f"category: '{written}'").category == written
    assert of(f"names: [{written}]\npairs: {{{written}: {written}}}").pairs == {written: written}
    assert of("", f"category={written}").category == written


@pytest.mark.parametrize("nothing", ["null", "~", "", "none", "'null'"])
def test_null_where_none_is_allowed(of, nothing):
    assert of(f"maybe: {nothing}\nweights: {nothing}\n").maybe is None
    assert of("maybe: a\nweights: b", f"maybe={nothing.strip(chr(39))}").maybe is None


def test_a_key_without_a_value_is_no_text(of):
    with pytest.raises(UserError, match="category=None is not a valid text"):
        of("category:")
    assert of("category: ''\ninner:\n").category == ""


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("count: 1e2", "count", 100),
        ("count: 010", "count", 10),
        ("count: 0x10", "count", 16),
        ("count: 9223372036854775807", "count", 2**63 - 1),
        ("rate: 1e-3", "rate", 0.001),
        ("rate: 1", "rate", 1.0),
        ("rate: .5", "rate", 0.5),
        ("flag: on", "flag", True),
        ("flag: No", "flag", False),
        ("kind: on", "kind", "on"),
        ("kind: 01", "kind", "01"),
        ("sizes: [256, 384]", "sizes", (256, 384)),
        ("sizes: 256", "sizes", (256,)),
        ("sizes: 256,384", "sizes", (256, 384)),
        ("names: []", "names", []),
    ],
)
def test_other_types_read_what_yaml_means(of, text, key, value):
    assert getattr(of(text), key) == value and type(getattr(of(text), key)) is type(value)


@pytest.mark.parametrize("written", [r"\ud800", r"a/\udfffb", r"\0", "x" * 256, "x/" * 2001])
def test_what_no_file_can_be_called_is_no_path(of, written):
    with pytest.raises(UserError, match=r"place=.* cannot be a path"):
        of(f'place: "{written}"')


def test_merge_keys_and_aliases(of):
    cfg = of("inner: &a {text: '01', maybe: b}\npairs: {<<: *a, text: c}")
    assert cfg.pairs == {"text": "c", "maybe": "b"}
    assert of("pairs: {<<: [{a: x}, {a: y, b: z}]}").pairs == {"a": "x", "b": "z"}  # the first of several wins


def test_what_config_yaml_holds_reads_back_equal(tmp_path):
    """Any text, as checkpoint.open_run writes it."""
    random.seed(0)
    letters = "aA01.:-#'\"~ \n\t{}[]&*!|>%@`,?\\é€😀\x85\u2028\x7f"
    texts = [*WRITTEN, "", " ", "a  b", "- a", "true", "\ufeffa", "x" * 300, *(["y " * 200])]
    texts += ["".join(random.choices(letters, k=random.randint(1, 12))) for _ in range(300)]
    for text in texts:
        cfg = Config(category=text, names=[text, "1"], pairs={text or "a": text}, rate=random.random() * 1e-6)
        cfg.inner.text, cfg.count, cfg.sizes = text, random.randint(-(2**63), 2**63 - 1), (1, 2)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_dict(cfg), sort_keys=False))
        assert load(Config, [str(tmp_path / "config.yaml")]) == cfg, repr(text)


def test_home_is_expanded_in_every_path(of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = of("place: ~/set\nweights: ~/w.pt")
    assert (cfg.place, cfg.weights) == ("/home/me/set", "/home/me/w.pt")
    assert of("", "weights=~/w.pt").weights == "/home/me/w.pt"
    assert of("category: ~/a", "place=a~/b") == Config(category="~/a", place="a~/b", run_name="a")


BOMB = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))  # 9 ** 11 values
BOMB = f"category: [&a0 [x], {BOMB}]"
LONG = "q" * 20_000
HOSTILE = [
    BOMB,
    "inner: &a {text: *a}",
    "names: &a [*a]",
    "names: " + "[" * 2000,
    "names: " + "[" * 30 + "]" * 30,
    "names: " + "{a: " * 100 + "b" + "}" * 100,
    "run_name: [a]",
    "category: {name: [x]}",
    "inner: [a]",
    "inner: {text: [x]}",
    f"count: {'9' * 400}",
    f"count: {'9' * 5000}",
    "count: 9223372036854775808",
    "count: inf",
    "count: .inf",
    "count: .nan",
    "rate: nan",
    "rate: inf",
    "rate: 1e999",
    f"rate: {'9' * 400}",
    "count: 1e30",
    "sizes: [inf]",
    "sizes: {a: 1}",
    "kind: [on]",
    "flag: {a: b}",
    "pairs: [a]",
    "pairs: {a: {b: {c: {d: e}}}}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    ": c",
    "names: !!set {a, b}",
    "category: !!binary aGk=",
    "category: !!python/object/apply:os.system [ls]",
    "category: !!timestamp 2024-01-01",
    'category: "a\\0b"',
    'place: "a\\0b"',
    f"place: {LONG}",
    f"weights: {'q' * 256}",
    f"category: [{LONG}]",
    f"{LONG}: 1",
    f"inner: {{{LONG}: 1}}",
    f"flag: {LONG}",
    f"count: {LONG}",
    f"kind: {LONG}",
    "a: b: c",
    "a\x01b: c",
    "%YAML 9.9\n---\na: b",
    "--- a\n--- b",
    "*nothing : a",
    f"category: *{LONG}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_one_short_line(of, text):
    with pytest.raises(UserError) as error:
        of(text)
    assert 10 < len(str(error.value)) < 300


def test_bytes_that_are_no_utf_8(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"category: \xff\xfe\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


RAW = "\udcff\udcfe"  # how Python shows bytes that are not UTF-8
TYPED = [
    f"category={RAW}",
    f"{RAW}=1",
    f"inner.{RAW}=1",
    f"count={RAW}",
    f"kind={RAW}",
    RAW,
    f"run_name={RAW}",
    f"category.{'a.' * 3000}b=1",
    f"{'a.' * 3000}b=1",
    f"inner.text.{'a.' * 3000}b=1",
    "=1",
    ".a=1",
    "a.=1",
    "a..b=1",
    f"{LONG}",
    f"{LONG}={LONG}",
    f"place={LONG}",
    f"count={'9' * 5000}",
]


@pytest.mark.parametrize("word", TYPED, ids=range(len(TYPED)))
def test_hostile_words_are_one_short_line(word):
    with pytest.raises(UserError) as error:
        build(Config, merge(Config, *read(["run_name=a"] * ("run_name" not in word) + [word])))
    assert 10 < len(str(error.value)) < 300


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5", "nan"])
def test_a_seed_has_32_bits(seed):
    assert coerce("4294967295", Seed, "seed") == 2**32 - 1 and coerce("0", Seed, "seed") == 0
    why = "is not a valid whole number" if seed in ("1.5", "nan") else "must be at least 0 and below 4294967296"
    with pytest.raises(UserError, match=f"^seed='?{seed}'? {why}"):
        coerce(seed, Seed, "seed")


@pytest.mark.parametrize(("runs", "name"), [("r", "q" * 256), ("r", "a/" * 3000), (RAW, "a"), ("r", "../a"), ("r", "")])
def test_a_run_folder_that_cannot_be(runs, name):
    with pytest.raises(UserError) as error:
        run_folder(SimpleNamespace(runs=runs, run_name=name))
    assert len(str(error.value)) < 300


def test_a_path_may_have_any_bytes():
    assert load(Config, [f"place={RAW}"]).place == RAW
