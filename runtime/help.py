"""`--help`: a script's keys with types, values and a line each, read from the source code, which has them anyway.

The line of a dataclass field is its comment. That of a constructor's option is its entry under `Args:` in the docstring
of the constructor, of a class that it inherits from, or of their module.
"""

import ast
import dataclasses
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Sequence

from runtime.errors import cut
from runtime.schema import chooser_of, hints_of, option_types, options_of, section_of
from runtime.values import PathText, rules_of

MISSING = (dataclasses.MISSING, inspect.Parameter.empty)
KINDS = {bool: "true|false", int: "integer", float: "number", str: "text", PathText: "path"}


def asked(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def show(text: str) -> None:
    """Print on rank 0, and end the program: exit status 0."""
    try:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)
    except (
        BrokenPipeError
    ):  # the reader, such as `head`, has closed the pipe; Python's last flush must not fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def keys(schema: type, raw: dict) -> str:
    """The docstring of the script that `schema` belongs to, and all keys with the values that `raw` gives them."""
    hints, lines = hints_of(schema), field_lines(schema)
    blocks, single = [], []
    for field in dataclasses.fields(schema):
        section, value, line = section_of(hints[field.name]), _value(raw, field), lines.get(field.name, "")
        if section is None:
            single.append(_row(field.name, hints[field.name], value, line))
        else:
            absent = " (left out, unless one of its keys is set)" if value is None else ""
            rows = _section(section, raw.get(field.name) or {}, field.name)
            blocks.append(f"{field.name}: {line}{absent}\n{_table(rows)}")
    about = inspect.cleandoc(sys.modules[schema.__module__].__doc__ or "")
    how = "Keys, their types, values and meaning."
    if blocks:
        how += "\n`section=name` is short for `section.name=name`; with --help it shows the options of that name, too."
    return "\n\n".join([about, how, *blocks, *["All other keys\n" * bool(blocks) + _table(single)] * bool(single)])


def _section(schema: type, raw: dict | str, where: str) -> list[tuple | str]:
    """Rows of the keys of a section, and of the options of what its name chooses."""
    chooser, hints, lines = chooser_of(schema), hints_of(schema), field_lines(schema)
    raw = raw if isinstance(raw, dict) else {chooser.name: raw} if chooser else {}
    rows: list[tuple | str] = []
    options: list[tuple | str] = []
    for field in dataclasses.fields(schema):
        line, value = lines.get(field.name, ""), _value(raw, field)
        if field is chooser:
            table = field.metadata["choices"]
            line = f"one of {', '.join(table)}" + (f"; {line}" if line else "")
            rows.append((f"{where}.{field.name}", "name", "required" if value in MISSING else str(value), line))
            if options_of(field, value):
                title = f"{where}={value}: {_sentence(table[value])}".removesuffix(": ")
                options = [title, *_options(table[value], raw, where)]
        elif not chooser or field.name != "options":
            rows.append(_row(f"{where}.{field.name}", hints[field.name], value, line))
    return rows + options


def _options(constructor, raw: dict, where: str) -> list[tuple]:
    lines = option_lines(constructor)
    kinds = option_types(constructor).items()
    return [_row(f"{where}.{key}", kind, raw.get(key, default), lines.get(key, "")) for key, (kind, default) in kinds]


def _sentence(what) -> str:
    """The first sentence of a docstring."""
    first = " ".join((what.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"\. (?=[A-Z])|[.:]?$", first)[0]


def names(table: dict) -> str:
    """Names, each with the first sentence of its docstring."""
    side = max(map(len, table))
    return "\n".join(f"  {name:{side}}  {_sentence(what)}" for name, what in table.items())


def _value(raw: dict, field: dataclasses.Field):
    if field.name in raw:
        return raw[field.name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _row(key: str, kind, value, line: str) -> tuple[str, str, str, str]:
    if typing.get_origin(_inner(kind)) is typing.Literal:
        line = " | ".join(map(str, typing.get_args(_inner(kind)))) + (f"; {line}" if line else "")
    line = "; ".join([line.removesuffix("."), *rules_of(kind)])
    return key, _kind(kind), "required" if value in MISSING else _written(value), line


def _inner(kind):
    """X of `X | None`, of `X | Literal["word"]` and of `Annotated[X, Range(...)]`."""
    if typing.get_origin(kind) is typing.Annotated:
        return _inner(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _inner(next(k for k in typing.get_args(kind) if k is not type(None)))
    return kind


def _kind(kind) -> str:
    inner = _inner(kind)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is typing.Literal:
        text = "choice"
    elif origin is tuple and Ellipsis not in args:
        text = f"{len(args)} {_kind(args[0])}s"
    elif origin in (tuple, list):
        text = f"{_kind(args[0])}s"
    else:
        text = "map" if dict in (origin, inner) else KINDS.get(inner, str(inner))
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    others = [other for other in typing.get_args(kind) if several and _inner(other) is not inner]
    return "|".join([text, *(str(word) for other in others for word in typing.get_args(other) or ["none"])])


def _written(value) -> str:
    """A value as the user would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(_written, value)) or "none"
    if isinstance(value, dict):
        return f"{len(value)} keys"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or '""'


def _table(rows: Sequence[tuple | str]) -> str:
    """Aligned columns and titles between; the last column is wrapped, and begins below a row that is too wide."""
    width = min(max(shutil.get_terminal_size((110, 0)).columns, 80), 120)
    cells = [row for row in rows if not isinstance(row, str)]
    sides = [min(max(len(row[i]) for row in cells), most) for i, most in enumerate((34, 14, 18))]
    indent, lines = sum(sides) + 8, []
    for row in rows:
        if isinstance(row, str):
            lines += textwrap.wrap(row, width - 2, initial_indent="  ", subsequent_indent="    ")
            continue
        head = "  " + "".join(f"{cut(cell, 70):{side}}  " for cell, side in zip(row, sides))
        wrapped = textwrap.wrap(" ".join(row[3].split()).removesuffix("."), width - indent)
        if wrapped and len(head) == indent:
            head += wrapped.pop(0)
        lines += [head.rstrip(), *(" " * indent + more for more in wrapped)]
    return "\n".join(lines)


# ---------------------------------------------------------------- lines from the source


def field_lines(schema: type) -> dict[str, str]:
    """{field: its comment}, behind it or on lines of its own below it; those of the classes it inherits from, too."""
    found = {}
    for cls in reversed([cls for cls in schema.__mro__ if dataclasses.is_dataclass(cls)]):
        source = textwrap.dedent(inspect.getsource(cls))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        for statement, following in zip(body, [*body[1:], None]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                end = following.lineno if following else (statement.end_lineno or statement.lineno) + 1
                line = " ".join(comments[i] for i in range(statement.lineno, end) if i in comments)
                found |= {statement.target.id: line} if line else {}
    return found


def option_lines(constructor) -> dict[str, str]:
    """{option: its line} of a constructor's keyword-only arguments."""
    if inspect.isclass(constructor) and dataclasses.is_dataclass(constructor):
        return field_lines(constructor)
    classes = constructor.__mro__ if inspect.isclass(constructor) else [constructor]
    documents = [cls.__doc__ for cls in classes] + [sys.modules[constructor.__module__].__doc__]
    found = {}
    for document in documents:
        found = argument_lines(document or "") | found  # the nearest docstring wins
    return found


def argument_lines(document: str) -> dict[str, str]:
    """The entries under `Args:` of a docstring; `a, b: text` is the line of both."""
    entries = re.search(r"^( *)Args:\n((?:\1 +.*\n?)+)", inspect.cleandoc(document), re.MULTILINE)
    found, current = {}, []
    for line in entries[2].splitlines() if entries else []:
        if begin := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            current = begin[1].split(", ")
            found |= dict.fromkeys(current, begin[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found
