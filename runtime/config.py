"""Configuration: a dataclass is the schema; YAML, then `key=value` overrides with dotted keys.

A section with a field made by `choice(TABLE)` picks one entry of a literal dict by name. Its other declared fields are
its own; every further key must be a keyword-only argument of the chosen constructor and lands, with that constructor's
defaults filled in, in the section's `options`. So a method's signature is its schema, and a default exists once:

    method: {name: simclr, temperature: 0.5}     ->     MethodConfig(name="simclr", options={"temperature": 0.5, ...})

`method=moco_v2` is short for `method.name=moco_v2`, in YAML too. The order of overrides does not matter. Where one
changes a name, all other keys of the section stay as the YAML has them, shared options too (moco_v2 gets simclr's
`temperature: 0.5`), and only options that moco_v2 does not have are dropped, which one line on stderr says.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime import help
from runtime.errors import UserError, cut, shown
from runtime.schema import choice as choice  # scripts say config.choice
from runtime.schema import chooser_of, hints_of, option_types, options_of, section_of
from runtime.values import NULL, coerce, path_text
from runtime.yaml_text import read_yaml

RENAMED = {"pictures": "images"}  # keys of earlier versions, of which the error says what they are now


def load(schema: type, argv: list[str], *lower: dict):
    """The config of a script's command line: `[file.yaml] [key=value ...] [--help]`, checked and converted to `schema`.

    `lower` are raw layers under those of the command line. With --help the keys are printed, and the program ends.

    Raises:
        UserError: unknown, missing or duplicate key, unknown name, wrong type, unreadable file. Always one line.
    """
    asked, argv = help.asked(argv), [word for word in argv if not help.asked([word])]
    file, typed = read(argv)
    named = argv and "=" not in argv[0] and "run_name" in (field.name for field in dataclasses.fields(schema))
    raw = merge(schema, *lower, {"run_name": Path(argv[0]).stem} if named else {}, file, typed)
    if asked:
        help.show(help.keys(schema, raw))
    return build(schema, raw)


def read(argv: list[str]) -> list[dict]:
    """The two layers of a command line as raw nested dicts of texts: the YAML file, if one is named first; overrides.

    A single value and keys below the same name, `method=simclr method.bank=0`, become {"": "simclr", "bank": "0"}.
    """
    file, typed, seen = {}, {}, {}
    argv = [word for word in argv if not help.asked([word])]
    if argv and "=" not in argv[0]:
        file, argv = read_yaml(argv[0]), argv[1:]
    for argument in argv:
        key, equals, value = argument.partition("=")
        *parents, last = key.split(".")
        if not equals or "" in (*parents, last):
            raise UserError(f"argument {shown(argument)} is not key=value (the YAML file comes first)")
        if key in seen:
            raise UserError(f"{cut(key)} is given twice: {cut(seen[key])} and {cut(argument)}; remove one")
        seen[key], section = argument, typed
        for parent in parents:
            if not isinstance(section.setdefault(parent, {}), dict):
                section[parent] = {"": section[parent]}
            section = section[parent]
        if isinstance(section.get(last), dict):
            section, last = section[last], ""
        section[last] = value
    return [file, typed]


def overlay(*pieces: list[str]) -> list[str]:
    """Several pieces of a command line as one, in which a key of a later piece replaces the same key of an earlier."""
    words, own = [], set()
    for piece in reversed(pieces):
        keys = [word.partition("=")[0].removesuffix(".name") if "=" in word else None for word in piece]
        words = [word for word, key in zip(piece, keys) if key is None or key not in own] + words
        own.update(keys)
    return words


def chosen(layers: list[dict], section: str):
    """The name that a section has in raw layers, or None: what a script must know before it can choose a schema."""
    for layer in reversed(layers):
        name = layer.get(section)
        name = name.get("", name.get("name")) if isinstance(name, dict) else name
        if name is not None:
            return name
    return None


def run_folder(config) -> Path:
    """<runs>/<run_name>; UserError for a name that `require_below` refuses."""
    name, where = require_below(config.run_name, "run_name", config.runs), "runs/run_name"
    return Path(path_text(coerce(f"{config.runs}/{name}", str, where), where))  # text: TensorBoard's names are UTF-8


def require_below(name: str, key: str, top: str) -> Path:
    """`name` as a path below `top`; one that is empty or leads out of it is an error, for run folders can be removed.

    Links there are followed, for they are no part of a name: somebody with access to `top` has made them.
    """
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{key}={shown(name)} must name a folder below {cut(top)}")
    return path


def merge(schema: type, *layers: dict) -> dict:
    """One raw dict of several, a later one's keys over those of the earlier ones, whatever their order inside.

    Options of an earlier layer that the name of a later one does not have are left out and named in a line on stderr.
    """
    dropped = []
    raw = functools.reduce(lambda lower, upper: _lay(schema, lower, upper, "", dropped), layers, {})
    if dropped and os.environ.get("RANK", "0") == "0":  # the process group does not exist yet
        print(f"note: dropped options that a new choice does not have: {', '.join(dropped)}", file=sys.stderr)
    return raw


def _lay(schema: type, lower: dict, upper: dict, where: str, dropped: list[str]) -> dict:
    """`upper`'s keys over `lower`'s, in sections too; adds `key=value (section=name)` to `dropped`."""
    lower, chooser = dict(lower), chooser_of(schema)
    if chooser and (new := options_of(chooser, upper.get(chooser.name))) is not None:
        old = options_of(chooser, lower.get(chooser.name)) or {}
        known, choice = {*new, *upper, *(f.name for f in dataclasses.fields(schema))}, upper[chooser.name]
        for key in [key for key in lower if key in old and key not in known]:
            value = cut(str(lower.pop(key)), 40)
            dropped.append(f"{where}{key}={value} ({where[:-1] or chooser.name}={choice})")
    merged = lower | upper
    for name, kind in hints_of(schema).items():
        if (section := section_of(kind)) and name in upper:
            below, above = (_spelled_out(kind, raw.get(name), f"{where}{name}") for raw in (lower, upper))
            if isinstance(above, dict) and isinstance(below, dict):
                above = _lay(section, below, above, f"{where}{name}.", dropped)
            merged[name] = above
        elif name in upper:
            merged[name] = _united(lower.get(name), upper[name])
    return merged


def _united(lower, upper):
    """`upper`'s keys over `lower`'s at every depth, for fields declared as dicts, whose keys are free."""
    if not (isinstance(lower, dict) and isinstance(upper, dict)):
        return upper
    return lower | {key: _united(lower.get(key), value) for key, value in upper.items()}


def _spelled_out(kind, raw, where: str) -> dict | None:
    """The raw keys of a field declared as `Section` or `Section | None`; None for the latter left out."""
    rest = {key: value for key, value in raw.items() if key} if isinstance(raw, dict) else {}
    short = raw.get("") if isinstance(raw, dict) else raw
    if isinstance(raw, dict) and short is None:
        return rest
    if isinstance(kind, types.UnionType) and (short is None or (isinstance(short, str) and short.lower() in NULL)):
        if rest:
            key, value = next(iter(rest.items()))
            raise UserError(f"{where}={short} leaves out the section that {where}.{key}={cut(str(value))} is for")
        return None
    section = section_of(kind)
    chooser = section and chooser_of(section)
    if short is None:
        return rest
    if not chooser or not isinstance(short, str):
        raise UserError(f"{where} must be a section of keys, not {shown(short)}")
    if chooser.name in rest:
        name = f"{where}.{chooser.name}"
        raise UserError(
            f"{name} is given twice: {where}={cut(short)} and {name}={cut(str(rest[chooser.name]))}; remove one"
        )
    return {chooser.name: short} | rest


def build(schema: type, raw: dict, where: str = ""):
    """An instance of dataclass `schema` from a raw dict; `where` is the dotted prefix that errors name."""
    hints = hints_of(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    chooser = chooser_of(schema)
    raw = _spelled_out(schema, raw, where.rstrip(".") or "the config") or {}
    options = {}
    if chooser:
        name = raw.get(chooser.name)
        if name is None:
            raise UserError(f"missing key '{where}{chooser.name}'; one of: {listed(chooser.metadata['choices'])}")
        options = option_types(pick(chooser.metadata["choices"], name, f"{where}{chooser.name}"))
    known = [n for n in fields if not (chooser and n == "options")] + list(options)
    for key in raw:
        if key not in known:
            of = f" ({where[:-1] or chooser.name}={raw[chooser.name]})" if chooser else ""
            raise UserError(f"unknown key '{cut(where + str(key))}'{of}{suggest(cut(str(key)), known)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if chooser and name == "options":
            values[name] = {
                key: coerce(raw[key], kind, where + key) if key in raw else required(default, where + key)
                for key, (kind, default) in options.items()
            }
        elif (section := section_of(hints[name])) and (name in raw or field.default is not None):
            its = _spelled_out(hints[name], raw.get(name, {}), where + name)
            values[name] = None if its is None else build(section, its, f"{where}{name}.")
        elif name in raw:
            values[name] = coerce(raw[name], hints[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key '{where}{name}'")
    return schema(**values)


def pick(table: dict, name: str, where: str):
    """`table[name]`, or an error that lists the valid names."""
    if not isinstance(name, str) or name not in table:
        near = suggest(cut(str(name)), table).partition(";")[0]  # the known names follow anyway
        raise UserError(f"{where}={shown(name)} is unknown{near}; one of: {listed(table)}")
    return table[name]


def required(default, where: str):
    if default is inspect.Parameter.empty:
        raise UserError(f"missing key '{where}'")
    return default


def suggest(key: str, known) -> str:
    """What to write in place of an unknown key, as the end of an error."""
    if RENAMED.get(key) in known:
        return f": it is now '{RENAMED[key]}'"
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else f"; known: {listed(known)}"


def listed(names: Iterable[str], room: int = 130) -> str:
    """Names as the end of an error: those that fit into so many characters, and how many there are beside them."""
    names = list(names)
    fit = sum(len(", ".join(names[:count])) <= room for count in range(1, len(names) + 1))
    rest = f", and {len(names) - fit} more (--help lists them)" if fit < len(names) else ""
    return ", ".join(names[:fit]) + rest


def as_dict(config) -> Any:
    """The resolved config as nested plain values; `build` reads it back. Options stand flat in their section."""
    if dataclasses.is_dataclass(config):
        values = {f.name: as_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        if any("choices" in f.metadata for f in dataclasses.fields(config)):
            values.update(values.pop("options"))
        return values
    if isinstance(config, tuple | list):
        return [as_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    return config


def changed(config, prefix: str = "") -> dict:
    """{dotted key: value} of what differs from the schema's defaults, which a key without default always does.

    An optional section that is there counts as True if all of it has defaults. Of plain nested values, which have no
    schema, everything.
    """
    if isinstance(config, dict):
        return flatten(config, prefix)
    flat = {}
    for field in dataclasses.fields(config):
        value, key, default = getattr(config, field.name), prefix + field.name, field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value):
            flat |= changed(value, f"{key}.") or ({key: True} if default is None else {})
        elif (chooser := chooser_of(type(config))) and field.name == "options":
            known = options_of(chooser, getattr(config, chooser.name)) or {}
            flat |= {prefix + name: given for name, given in value.items() if given != known[name][1]}
        elif value != default:
            flat[key] = as_dict(value)
    return flat


def completed(schema: type, stored: dict) -> dict:
    """A stored resolved config with the defaults of keys that are newer than it, so that the two can be compared; as it
    is where `schema` cannot read it any more."""
    try:
        return as_dict(build(schema, stored))
    except UserError:
        return stored


def flatten(nested: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
