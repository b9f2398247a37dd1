"""Config files as nobody should write them: the shipped ones, each with one thing changed, by a number."""

import dataclasses
import json
import math
import random
import typing
from pathlib import Path
from types import ModuleType

import yaml

import eval as evaluate
import sweep
import train_anomaly
import train_classifier
import train_ssl
from evaluation.tasks import module_of
from runtime.schema import chooser_of, hints_of, options_of, section_of
from runtime.values import Range
from tests.images import TOP

FILES = sorted((TOP / "configs").rglob("*.yaml"))
BOMB = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))  # 9 ** 11 values


def pieces(text: str) -> list[str]:
    return [piece.strip() for piece in text.replace("\n", "|").split("|") if piece.strip()]


NUMBERS = pieces("""
    -1 | 0 | -0.0 | 1 | 2 | 0.5 | 1.5 | -1e-9 | 1e-300 | 1e300 | 1e400 | -1e400 | nan | .inf | -.inf | 2147483648
    4294967296 | 9223372036854775807 | 18446744073709551616 | 1e18 | 1e-320 | 0x10 | 010 | +5 | +-5 | ٣ | ½ | 1e | 1 2
    '0.9,0.1' | '-1,-2' | '1,2,3,4,5,6' | '0,0' | '1,0' | 1_0
""")
NUMBERS += ["9" * 400, "-" + "9" * 5000, "0x" + "f" * 400]
STRUCTURES = pieces("""
    true | no | null | ~ | '' | [] | {} | [[]] | [a] | [1] | [0.5, -1] | {a: 1} | [1, {a: 2}] | [null] | {1: 2}
    {null: 1} | {[a]: 1} | {{a: b}: 1} | {true: 1} | {'': 1} | {name: [a]} | {name: {name: a}} | - - a | [a, [b
    {a: 1, a: 2} | &a [*a] | &a {b: *a} | *nothing | {<<: 1} | {<<: [1]}
""")
STRUCTURES += ["[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 3000, "[" * 25 + "]" * 25, f"[&a0 [x], {BOMB}]"]
STRUCTURES += [f"[&t {'q' * 50_000}, [{', '.join(['*t'] * 5000)}]]", f"[{', '.join('1' * 30_000)}]"]
STRUCTURES += [f"{{{', '.join(f'k{i}: {i}' for i in range(30_000))}}}"]
TAGS = ["!!set {a, b}", "!!python/object/apply:os.system [touch hacked]", "!!binary aGk=", "!!timestamp 2024-01-01"]
TAGS += [
    "!own x",
    "!!float 1",
    "!!null a",
    "! x",
    "!<tag:x,y> z",
    "2020-01-01",
    "12:30:45",
    "!!omap [a: 1]",
    "!!map [a]",
]
TEXTS = ['"a\\0b"', '"\\e[31mred"', '"a\\nb"', '"\\u202e"', "😀", '"\\ud800"', "../../etc", "/", "$HOME", "'%s%n{0}'"]
TEXTS += ["q" * 20_000, '"\\x85\\u2028"', "a" * 256, "'a/' ", "a/" * 3000, "Infinity", "None", "'[1'", "'(0.1'", "x: y"]
TEXTS += ["'{'", "`x`", "@x", "- x"]
VALUES = NUMBERS + STRUCTURES + TAGS + TEXTS
KEYS = [
    "1",
    "null",
    "[a]",
    "true",
    "''",
    "~",
    "{a: b}",
    "😀",
    '"a\\0b"',
    '"\\e[31m"',
    "q" * 20_000,
    "a.b",
    "nmae",
    "<<",
]
KEYS += ["options", '"name "', '"\\n"', "? x", "!!binary aGk=", "__class__", "self", "return"]
PIECES = [b"\0", b"\t", b"\xff", b"{", b"]", b":", b"\xef\xbb\xbf", b"&a ", b"\r"]


class Raw(str):
    """A piece of YAML that is written as it is."""


def written(value) -> str:
    """Nested texts as one line of YAML."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return "null" if value is None else json.dumps(value)


def script_of(raw: dict) -> ModuleType:
    """The script whose config this is."""
    of = {
        "detectors": sweep,
        "task": evaluate,
        "detector": train_anomaly,
        "method": train_ssl,
        "head": train_classifier,
    }
    return next(script for key, script in of.items() if key in raw)


def schema_of(raw: dict) -> type:
    script = script_of(raw)
    return module_of("knn").Config if script is evaluate else script.Config


def keys_of(schema: type, raw: dict) -> list[tuple[str, ...]]:
    """Every key that the file may have: of sections, and of the options of what they choose."""
    found: list[tuple[str, ...]] = []
    for name, kind in typing.get_type_hints(schema).items():
        found.append((name,))
        if (section := section_of(kind)) is None:
            continue
        chooser, given = chooser_of(section), raw.get(name) or {}
        found += [(name, field.name) for field in dataclasses.fields(section)]
        chosen = given if isinstance(given, str) else given.get(chooser.name) if chooser else None
        found += [(name, key) for key in (chooser and options_of(chooser, chosen)) or {}]
    return found


def put(raw: dict, key: tuple[str, ...], value) -> None:
    """Set a dotted key; a section that is a single name becomes its keys."""
    *sections, last = key
    for section in sections:
        below = raw.get(section)
        raw[section] = below if isinstance(below, dict) else {} if below is None else {"name": below}
        raw = raw[section]
    raw[last] = value


def leaves(raw: dict, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        key
        for name, value in raw.items()
        for key in ([above + (name,)] + (leaves(value, above + (name,)) if isinstance(value, dict) else []))
    ]


def mutated(raw: dict, schema: type, draw: random.Random, values: list[str] = VALUES) -> tuple[str, bytes]:
    """What was changed, and the file."""
    kind = draw.choices(["value", "delete", "twice", "rename", "swap", "bytes", "cut"], [12, 1, 1, 2, 1, 2, 1])[0]
    raw = json.loads(json.dumps(raw))
    key = draw.choice(keys_of(schema, raw) if kind == "value" else leaves(raw))
    about = f"{kind} {'.'.join(key)}"
    *sections, last = key
    section = raw
    for name in sections if kind != "value" else ():
        section = section[name]
    if kind == "value":
        value = draw.choice(values)
        put(raw, key, Raw(value))
        about += f"={value[:60]}"
    elif kind == "delete":
        del section[last]
    elif kind == "twice":
        section[Raw(json.dumps(last) + " ")] = section[last]
    elif kind == "rename":
        name = draw.choice(KEYS)
        section[Raw(name)] = section.pop(last)
        about += f" to {name[:60]}"
    elif kind == "swap":
        other = draw.choice([k for k in leaves(raw) if len(k) == len(key)])
        there = raw
        for name in other[:-1]:
            there = there[name]
        section[last], there[other[-1]] = there[other[-1]], section[last]
    text = "\n".join(f"{written(key)}: {written(value)}" for key, value in raw.items()).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        text = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            text[at : at + draw.randint(0, 2)] = draw.choice(PIECES)
        text = bytes(text)
    elif kind == "cut":
        text = text[: draw.randrange(len(text))]
    return about, text


def mutation(number: int, files: list[Path] = FILES) -> tuple[str, bytes]:
    """Number i of the mutations, which go over the files in turn."""
    path = files[number % len(files)]
    raw = yaml.load(path.read_text(), yaml.BaseLoader)
    about, text = mutated(raw, schema_of(raw), random.Random(number))
    return f"{number}: {path.name}: {about}", text


def kind_of(schema: type, raw: dict, key: tuple[str, ...]):
    """The type that a key of `keys_of` declares."""
    kind = hints_of(schema)[key[0]]
    if len(key) == 1:
        return kind
    section = section_of(kind)
    hints, chooser = hints_of(section), chooser_of(section)
    return hints[key[1]] if key[1] in hints else options_of(chooser, raw[key[0]][chooser.name])[key[1]][0]


def ends(schema: type, raw: dict, key: tuple[str, ...]) -> list[str]:
    """The outermost numbers that a key allows, of a range without an end a very large one."""
    found = []
    for rule, kind in ranges_in(kind_of(schema, raw, key)):
        low, high = (rule.least, rule.above), (rule.most, rule.below)
        for closed, open_, away in ((*low, math.inf), (*high, -math.inf)):
            if math.isfinite(closed):
                found.append(closed)
            elif math.isfinite(open_):
                found.append(open_ + math.copysign(1, away) if kind is int else math.nextafter(open_, away))
            else:
                found.append(2**63 - 1 if kind is int else 1e300)
    return [repr(number) for number in found]


def ranges_in(kind):
    """(range, int or float) of each number in a type."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        yield from ((rule, args[0]) for rule in args[1:] if isinstance(rule, Range))
    for arg in args if typing.get_origin(kind) is not typing.Literal else ():
        yield from ranges_in(arg)
