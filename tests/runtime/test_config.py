"""runtime/config.py: every way a key can be wrong, and every type a value can have."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from runtime.config import as_dict, build, flatten, load
from runtime.errors import UserError
from runtime.schema import choice
from runtime.values import coerce


class Small:
    def __init__(self, width, *, temperature: float = 0.5, layers: tuple[int, ...] = (1, 2), norm: bool = False):
        pass


def large(*, depth: int, scale: tuple[float, float] = (0.2, 1.0)):
    pass


TABLE = {"small": Small, "large": large}


@dataclass(kw_only=True)
class Method:
    name: str = choice(TABLE)
    weights: str | None = None
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Optim:
    lr: float
    weight_decay: float = 1e-4
    kind: Literal["cosine", "constant"] = "cosine"


@dataclass(kw_only=True)
class Config:
    method: Method
    optim: Optim
    extra: Optim | None = None
    epochs: int = 10
    fast: bool = False
    run_name: str = "x"


YAML = "method: {name: small, temperature: 0.1}\noptim: {lr: 1e-3}\n"


@pytest.fixture
def path(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "my_run.yaml").write_text(text)
        return str(tmp_path / "my_run.yaml")

    return write


def test_file_overrides_and_defaults(path):
    cfg = load(Config, [path(YAML), "optim.lr=2e-3", "epochs=1e2", "fast=yes", "method.layers=3,4,5"])
    assert cfg.optim == Optim(lr=2e-3)
    assert (cfg.epochs, cfg.fast, cfg.run_name, cfg.extra) == (100, True, "my_run", None)
    assert cfg.method.options == {"temperature": 0.1, "layers": (3, 4, 5), "norm": False}


def test_yaml_reads_1e_3_as_text_and_we_as_a_number(path):
    assert load(Config, [path(YAML)]).optim.lr == 0.001


def test_zero_and_value_with_equals_sign(path):
    cfg = load(Config, [path(YAML), "optim.weight_decay=0", "run_name=a=b"])
    assert cfg.optim.weight_decay == 0.0 and isinstance(cfg.optim.weight_decay, float)
    assert cfg.run_name == "a=b"


def test_name_alone_stands_for_its_section(path):
    assert load(Config, [path("method: small\noptim: {lr: 1}")]).method.name == "small"
    cfg = load(Config, [path(YAML), "method=large", "method.depth=3"])
    assert cfg.method.options == {"depth": 3, "scale": (0.2, 1.0)}


def test_optional_section(path):
    assert load(Config, [path(YAML), "extra.lr=1"]).extra == Optim(lr=1.0)


def test_resolved_config_reads_back(path):
    cfg = load(Config, [path(YAML)])
    assert as_dict(cfg)["method"] == {
        "name": "small",
        "weights": None,
        "temperature": 0.1,
        "layers": [1, 2],
        "norm": False,
    }
    assert build(Config, as_dict(cfg)) == cfg
    assert flatten(as_dict(cfg))["method.temperature"] == 0.1


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        (YAML + "epoch: 3", [], "unknown key 'epoch', did you mean 'epochs'"),
        (YAML, ["optim.weight_decy=0"], "unknown key 'optim.weight_decy', did you mean 'weight_decay'"),
        (YAML, ["method.temprature=1"], "unknown key 'method.temprature' (method=small), did you mean 'temperature'"),
        (YAML, ["method.depth=1"], "unknown key 'method.depth'"),
        (YAML, ["method.name=smal"], "did you mean 'small'?; one of: small, large"),
        (YAML, ["method=large"], "missing key 'method.depth'"),
        ("optim: {lr: 1}", [], "missing key 'method.name'; one of: small, large"),
        ("method: small", [], "missing key 'optim.lr'"),
        ("", [], "missing key 'method.name'"),
        (YAML, ["epochs=1.5"], "epochs='1.5' is not a valid whole number"),
        (YAML, ["epochs=nan"], "not a valid whole number"),
        (YAML, ["optim.lr=fast"], "optim.lr='fast' is not a valid number"),
        (YAML, ["fast=perhaps"], "not a valid true or false"),
        (YAML, ["optim.kind=cosin"], "optim.kind='cosin' is unknown; one of: cosine, constant"),
        (YAML, ["method=large", "method.depth=1", "method.scale=1"], "like 0.2,1.0"),
        (YAML.replace("0.1", "0.1, layers: true"), [], "method.layers[0]='true' is not a valid whole number"),
        ("method: {name: large, depth: 1, scale: 1}\noptim: {lr: 1}", [], "like 0.2,1.0"),
        ("method: small\noptim: {lr: [1]}", [], "optim.lr=['1'] is not a valid number"),
        ("method: small\noptim: 3", [], "optim must be a section of keys, not '3'"),
        (YAML, ["optim.lr.x=3"], "optim.lr={'x': '3'} is not a valid number"),
        (YAML, ["epochs"], "argument 'epochs' is not key=value"),
        ("- a\n- b", [], "must be a mapping"),
        ("epochs: 1\nepochs: 2", [], ":2: key 'epochs' is given twice"),
        ("optim: {lr: 1, lr: 2}", [], "key 'lr' is given twice"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_mistakes_are_named(path, text, arguments, message):
    with pytest.raises(UserError) as error:
        load(Config, [path(text), *arguments])
    assert message in str(error.value)


def test_missing_file():
    with pytest.raises(UserError, match=r"cannot read config file nowhere.yaml"):
        load(Config, ["nowhere.yaml"])


@pytest.mark.parametrize(
    "value, kind, result",
    [
        ("none", int | None, None),
        ("3", int | None, 3),
        (3, float, 3.0),
        (0, str, "0"),
        ("[0.2, 1]", tuple[float, float], (0.2, 1.0)),
        ([1, 2, 3], list[int], [1, 2, 3]),
        (256, tuple[int, ...], (256,)),
        ("256", tuple[int, ...], (256,)),
        ("256,384", tuple[int, ...], (256, 384)),
        (0.5, tuple[float, ...], (0.5,)),
        ("off", bool, False),
        ("123456789012345678", int, 123456789012345678),
    ],
)
def test_coerce(value, kind, result):
    assert coerce(value, kind, "key") == result
    assert type(coerce(value, kind, "key")) is type(result)
