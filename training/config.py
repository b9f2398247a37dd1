"""Configuration: a dataclass is the schema; YAML, then `key=value` overrides with dotted keys.

A section with a field made by `choice(TABLE)` picks one entry of a literal dict by name. Its other declared fields are
its own; every further key must be a keyword-only argument of the chosen constructor and lands, with that constructor's
defaults filled in, in the section's `options`. So a method's signature is its schema, and a default exists once:

    method: {name: simclr, temperature: 0.5}     ->     MethodConfig(name="simclr", options={"temperature": 0.5, ...})
"""

import dataclasses
import difflib
import inspect
import types
import typing
from pathlib import Path

import yaml

from training.errors import UserError


def choice(table: dict):
    """A dataclass field holding a key of `table`, whose values are constructors with keyword-only options."""
    return dataclasses.field(metadata={"choices": table})


def load(schema: type, argv: list[str]):
    """The config of a script's command line: `[file.yaml] [key=value ...]`, checked and converted to `schema`.

    Raises:
        UserError: unknown, missing or duplicate key, unknown name, wrong type, unreadable file. Always one line.
    """
    return build(schema, read(argv))


def read(argv: list[str]) -> dict:
    """The raw nested dict of a command line: the YAML file, if one is named first, with the overrides applied."""
    raw = {}
    if argv and "=" not in argv[0]:
        raw = read_yaml(argv[0])
        raw.setdefault("run_name", Path(argv[0]).stem)
        argv = argv[1:]
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(f"argument '{argument}' is not key=value (the YAML file comes first)")
        section = raw
        *parents, last = key.split(".")
        for parent in parents:
            if isinstance(section.get(parent), str):  # `method: simclr` is short for `method: {name: simclr}`
                section[parent] = {"name": section[parent]}
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"{key}: '{parent}' is a single value, not a section")
        section[last] = value
    return raw


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML's own loader silently lets win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError(f"{key.start_mark.name}:{key.start_mark.line + 1}: key '{key.value}' is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """A YAML file that must be a mapping without duplicate keys; an empty file is an empty mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            raw = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def run_folder(config) -> Path:
    """<runs>/<run_name>; a name that is empty or leads out of `runs` is an error, for run folders can be removed."""
    name = Path(config.run_name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise UserError(f"run_name={config.run_name!r} must name a folder below runs={config.runs}")
    return Path(config.runs) / name


def at_least_one(config, *keys: str) -> None:
    """Refuse counts below 1."""
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)} must be at least 1")


def build(schema: type, raw: dict, where: str = ""):
    """An instance of dataclass `schema` from a raw dict; `where` is the dotted prefix that errors name."""
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    chooser = next((f for f in fields.values() if "choices" in f.metadata), None)
    if chooser and isinstance(raw, str):
        raw = {chooser.name: raw}
    if not isinstance(raw, dict):
        raise UserError(f"{where.rstrip('.') or 'the config'} must be a section of keys, not {raw!r}")
    options = {}
    if chooser:
        name = raw.get(chooser.name)
        if name is None:
            raise UserError(f"missing key '{where}{chooser.name}'; one of: {', '.join(chooser.metadata['choices'])}")
        options = option_types(pick(chooser.metadata["choices"], name, f"{where}{chooser.name}"))
    known = [n for n in fields if not (chooser and n == "options")] + list(options)
    for key in raw:
        if key not in known:
            raise UserError(f"unknown key '{where}{key}'{suggest(key, known)}")
    values = {}
    for name, field in fields.items():
        if chooser and name == "options":
            values[name] = {
                key: coerce(raw[key], kind, where + key) if key in raw else required(default, where + key)
                for key, (kind, default) in options.items()
            }
        elif (section := _section(hints[name])) and (raw.get(name) is not None or field.default is not None):
            values[name] = build(section, raw.get(name, {}), f"{where}{name}.")
        elif name in raw:
            values[name] = coerce(raw[name], hints[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key '{where}{name}'")
    return schema(**values)


def _section(kind) -> type | None:
    """The dataclass of a field declared as `Section` or `Section | None`."""
    return next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None)


def pick(table: dict, name: str, where: str):
    """`table[name]`, or an error that lists the valid names."""
    if name not in table:
        raise UserError(f"{where}={name!r} is unknown{suggest(str(name), table)}; one of: {', '.join(table)}")
    return table[name]


def option_types(constructor) -> dict[str, tuple]:
    """{name: (type, default)} of a constructor's keyword-only arguments."""
    hints = typing.get_type_hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: (hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def required(default, where: str):
    if default is inspect.Parameter.empty:
        raise UserError(f"missing key '{where}'")
    return default


def suggest(key: str, known) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"


def coerce(value, kind, where: str):
    """`value`, from YAML or from the command line, as type `kind`; `where` names the key in errors."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"{where}={value!r} is not a valid {_words(kind)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        match = [a for a in args if str(a) == str(value)]
        if not match:
            raise UserError(f"{where}={value!r} is unknown; one of: {', '.join(map(str, args))}")
        return match[0]
    if origin in (tuple, list):
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
        elif isinstance(value, int | float):  # from YAML; one number is a tuple of one, as on the command line
            value = [value]
        if not isinstance(value, list | tuple):
            raise wrong
        fixed = origin is tuple and Ellipsis not in args
        if fixed and len(value) != len(args):
            raise wrong
        return origin(coerce(v, args[i] if fixed else args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if kind is dict or origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {k: coerce(v, args[1], f"{where}.{k}") for k, v in value.items()} if args else value
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if isinstance(value, bool | dict | list) or value is None:
        raise wrong
    try:
        number = value if kind is str else float(value)
    except ValueError:
        raise wrong from None
    if kind is int:
        if number != number or number in (float("inf"), -float("inf")) or number != int(number):
            raise wrong
        return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
    return kind(number)


def _words(kind) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return "list of numbers" if Ellipsis in args else f"list of {len(args)} values, like 0.2,1.0"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kind, str(kind))


def as_dict(config) -> dict:
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


def flatten(nested: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
