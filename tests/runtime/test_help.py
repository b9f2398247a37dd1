"""`--help` of every script: each key with type, value and a line from the source, readable in 120 columns."""

import dataclasses
import subprocess
import sys
import typing

import pytest

import eval as evaluate
import predict
import sweep
import train_anomaly
import train_classifier
import train_ssl
from data import DATASETS
from data.augment.recipes import RECIPES
from data.defects import DEFECTS
from evaluation.frozen import MEASURES
from evaluation.tasks import TASKS, module_of
from losses.pseudo_labels import PSEUDO_LABELS
from losses.supervised import LOSSES
from models.anomaly import DETECTORS
from models.backbones import BACKBONES
from models.classifier import HEADS
from models.ssl import SSL_METHODS
from runtime import help
from runtime.schema import choice, chooser_of, option_types, section_of
from tests.images import TOP
from training.optim import OPTIMIZERS

TABLES = {
    "data": DATASETS,
    "backbone": BACKBONES,
    "method": SSL_METHODS,
    "detector": DETECTORS,
    "augment": RECIPES,
    "defect": DEFECTS,
    "optim": OPTIMIZERS,
    "task": MEASURES,
    "head": HEADS,
    "loss": LOSSES,
    "semi": PSEUDO_LABELS,
}
SCHEMAS = [
    train_ssl.Config,
    train_anomaly.Config,
    predict.Config,
    sweep.Config,
    train_classifier.Config,
    *(module_of(task).Config for task in TASKS),
]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(TOP)
    monkeypatch.setenv("COLUMNS", "110")


@pytest.fixture
def printed(capsys):
    def of(main, *words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capsys.readouterr()
        assert end.value.code == 0 and err == ""
        assert max(map(len, out.splitlines())) <= 120
        return out

    return of


def rows(text: str) -> dict[str, list[str]]:
    """{key: words of its row} of the part below the script's own docstring."""
    words = [line.split() for line in text.partition("\nKeys, ")[2].splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in reversed(words) if row}


@pytest.mark.parametrize("section", TABLES)
def test_every_option_has_its_line(section):
    bare = [
        f"{section}={name} {key}"
        for name, constructor in TABLES[section].items()
        for key in option_types(constructor)
        if len(help.option_lines(constructor).get(key, "")) < 5
    ]
    assert bare == []


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: f"{schema.__module__}.{schema.__name__}")
def test_every_key_has_its_line(schema):
    hints, lines = typing.get_type_hints(schema), help.field_lines(schema)
    assert [field.name for field in dataclasses.fields(schema) if field.name not in lines] == []
    for section in filter(None, map(section_of, hints.values())):
        chooser, lines = chooser_of(section), help.field_lines(section)
        spare = {"options", chooser.name} if chooser else set()
        assert {field.name for field in dataclasses.fields(section)} - spare <= {*lines}, section


@pytest.mark.parametrize(
    ("main", "schema"),
    [(train_ssl, SCHEMAS[0]), (train_anomaly, SCHEMAS[1]), (predict, SCHEMAS[2]), (sweep, SCHEMAS[3])]
    + [(train_classifier, SCHEMAS[4])],
    ids=lambda x: x.__name__,
)
def test_every_script_lists_all_keys_without_arguments(main, schema, printed):
    found = rows(text := printed(main.main, "--help"))
    assert text.startswith(main.__doc__.splitlines()[0]) and printed(main.main, "-h") == text
    for field in dataclasses.fields(schema):
        section = section_of(typing.get_type_hints(schema)[field.name])
        names = [f"{field.name}.{f.name}" for f in dataclasses.fields(section)] if section else [field.name]
        assert {name for name in names if not name.endswith(".options")} <= {*found}


def test_a_name_adds_its_options_with_their_defaults(printed):
    found = rows(printed(train_ssl.main, "method=simclr", "--help"))
    for key, (_, default) in option_types(SSL_METHODS["simclr"]).items():
        assert found[f"method.{key}"][1] == help._written(default), key
    assert found["method.temperature"][:4] == ["number", "0.5", "0.1", "for"]
    assert found["method.head"][:5] == ["choice", "mlp", "mlp", "|", "linear;"]
    assert "method.queue" in rows(printed(train_ssl.main, "--help", "method.name=moco_v2"))


def test_a_file_shows_its_values_and_the_command_line_above_them(printed):
    found = rows(printed(train_ssl.main, "configs/byol_scavport.yaml", "optim.lr=0.7", "sam.rho=2", "--help"))
    shown = {key: words[1] for key, words in found.items() if len(words) > 1}
    assert (shown["optim.name"], shown["optim.lr"], shown["optim.warmup_epochs"]) == ("lars", "0.7", "10")
    assert (shown["data.size"], shown["sam.rho"], shown["run_name"]) == ("384", "2", "byol_scavport")
    assert (
        found["augment.blur_p"][:3] == ["2", "numbers", "1,0.1"]
        and shown["backbone.weights"] == "none"
        and "optim.eta" in shown
    )
    assert rows(printed(train_ssl.main, "--help"))["optim.lr"][1] == "required"


def test_help_does_nothing_else(printed, tmp_path):
    text = printed(predict.main, "--help", str(tmp_path), "x")
    assert "threshold" in rows(text)
    assert printed(train_anomaly.main, "configs/padim_mvtec.yaml", f"runs={tmp_path}/runs", "-h")
    assert list(tmp_path.iterdir()) == []


def test_eval_lists_its_tasks_and_the_keys_of_one(printed):
    text = printed(evaluate.main, "--help")
    assert all(any(line.startswith(f"  {task} ") for line in text.splitlines()) for task in TASKS)
    assert {"task.k", "checkpoint"} <= {*rows(printed(evaluate.main, "--help", "task=knn"))}
    assert "task.epochs" in rows(printed(evaluate.main, "task=linear", "-h"))
    compare = rows(printed(evaluate.main, "task=compare", "-h"))
    assert compare["runs"][0] == "paths" and "data.name" not in compare


def test_only_the_first_process_prints(monkeypatch, printed):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="empty"):  # max of no lines
        printed(train_ssl.main, "--help")


def test_kinds_are_words_and_no_python_classes(printed):
    assert rows(printed(sweep.main, "--help"))["grid"][0] == "map"


def test_a_reader_that_closes_early():
    program = "from runtime import help; help.show('word ' * 9 + chr(10) * 300_000)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


# ---------------------------------------------------------------- lines from the source


class Parent:
    """What it does. More of it.

    Args:
        inherited: of the parent.
        own: not this one.
    """

    def __init__(self, *, inherited: int = 1):
        pass


class Child(Parent):
    """A child (Someone et al. 2020): of a parent. More.

    Args:
        first, second: of both,
            over two lines.
        own: a line: with a colon.

    Raises:
        error: not an option.
    """

    def __init__(self, *, inherited: int = 1, first: int = 2, second: str = "", own: bool = False):
        pass


@dataclasses.dataclass(kw_only=True)
class Base:
    name: str = choice({"child": Child})
    size: tuple[int, int] = (1, 2)  # behind it
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Section(Base):
    """Not a line."""

    plain: int = 1
    below: float | None = None
    # on a line of its own,
    # or two
    text: str = "# no comment"  # behind a text
    long: dict[str, int] = dataclasses.field(
        default_factory=dict  # inside
    )

    def method(self):
        value = 1  # not of a field
        return value


def test_lines_of_fields():
    expected = {"below": "on a line of its own, or two", "text": "behind a text", "long": "inside"}
    assert help.field_lines(Section) == {"size": "behind it"} | expected


def test_lines_of_options():
    both = "of both, over two lines."
    expected = {"first": both, "second": both, "own": "a line: with a colon.", "inherited": "of the parent."}
    assert help.option_lines(Child) == expected
    assert help._sentence(Child) == "A child (Someone et al. 2020): of a parent"


def test_a_table_as_a_person_sees_it():
    @dataclasses.dataclass(kw_only=True)
    class Schema:
        part: Base
        flag: bool = True  # a line that is long enough to be wrapped where the width of a terminal ends, which is here

    text = help.keys(Schema, {"part": {"name": "child", "own": "yes"}}).partition("too.\n\n")[2]
    assert text.splitlines() == [
        "part: ",
        "  part.name       name        child  one of child",
        "  part.size       2 integers  1,2    behind it",
        "  part=child: A child (Someone et al. 2020): of a parent",
        "  part.inherited  integer     1      of the parent",
        "  part.first      integer     2      of both, over two lines",
        '  part.second     text        ""     of both, over two lines',
        "  part.own        true|false  yes    a line: with a colon",
        "",
        "All other keys",
        "  flag  true|false  true  a line that is long enough to be wrapped where the width of a terminal ends, which",
        "                          is here",
    ]
