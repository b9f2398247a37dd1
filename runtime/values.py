"""One value of the configuration: from a text to the type that its key declares, and inside the range of that type.

`lr: PositiveFloat` or `rotation: Annotated[float, Range(least=0, most=180)]` declares a range, in dataclasses and in
the keyword-only arguments of a constructor. A key of type `int` or `float` takes every finite number.
"""

import math
import os
import types
import typing
from dataclasses import dataclass
from typing import Annotated

from runtime.errors import UserError, cut, shown


class OutOfRange(UserError):
    """A value of the right type that its range does not have."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key allows."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # excluded, as is `below`
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        """What a number must be: `above 0 and at most 1`."""
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {end:.12g}" for word, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class Rising:
    """The rule of two bounds between which something is drawn, or with `strict` of the ends of a scale."""

    strict: bool = False

    def __contains__(self, pair: tuple[float, float]) -> bool:
        return pair[0] < pair[1] if self.strict else pair[0] <= pair[1]

    def __str__(self) -> str:
        return "in rising order"


if typing.TYPE_CHECKING:  # whoever reads such a value, or gives a default, has plain text
    PathText = str
else:
    PathText = typing.NewType("PathText", str)  # type of a key that names a file or folder: a leading ~ is expanded
Seed = Annotated[int, Range(least=0, below=2**32)]  # of random numbers, numpy's too: 32 bits
PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
UnitInterval = Annotated[float, Range(least=0, most=1)]  # probabilities, momenta
OpenUnitInterval = Annotated[float, Range(above=0, below=1)]
BelowOne = Annotated[float, Range(least=0, below=1)]  # a share that is left out
PositiveShare = Annotated[float, Range(above=0, most=1)]  # a share that is kept, a factor that makes smaller
RisingShares = Annotated[tuple[PositiveShare, PositiveShare], Rising()]
RisingFactors = Annotated[tuple[PositiveFloat, PositiveFloat], Rising()]
# Counts of what takes memory or time: larger ones are slips, and a run would end in a traceback, or never
Few = Annotated[int, Range(least=1, most=100)]  # layers, views, patches
FewOrZero = Annotated[int, Range(least=0, most=100)]
Pixels = Annotated[int, Range(least=1, most=2**16)]  # side of an image
PixelsOrZero = Annotated[int, Range(least=0, most=2**16)]
Width = Annotated[int, Range(least=1, most=2**20)]  # channels, features, rows of a bank
WidthOrZero = Annotated[int, Range(least=0, most=2**20)]  # where 0 has a meaning of its own
LARGEST = 1e38  # about what single precision has, in which networks compute
NULL = ("none", "null", "~", "")  # texts, in any case, that mean None where None is allowed
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def coerce(value, kind, where: str):
    """`value`, a text of the command line or of YAML or what `as_dict` gave, as type `kind`; errors name `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"{where}={shown(value)} is not a valid {_words(kind)}")
    if origin is Annotated:
        found = coerce(value, args[0], where)
        for rule in args[1:]:
            if found not in rule:
                raise OutOfRange(f"{where}={_given(value)} must be {rule}")
        return found
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in NULL)):
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return coerce(value, kinds[0], where)
        for kind in kinds:  # the first that fits, of `int | Literal["auto"]`
            try:
                return coerce(value, kind, where)
            except OutOfRange:
                raise
            except UserError:
                continue
        raise wrong
    if origin is typing.Literal:
        match = [a for a in args if not isinstance(value, dict | list | tuple) and str(a) == str(value)]
        if not match:
            raise UserError(f"{where}={shown(value)} is unknown; one of: {', '.join(map(str, args))}")
        return match[0]
    if origin in (tuple, list):
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
        elif isinstance(value, int | float):  # one number is a tuple of one, as on the command line
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
    if isinstance(value, dict | list | tuple) or value is None:
        raise wrong
    if kind is bool:
        if (word := str(value).lower()) not in BOOLS:
            raise wrong
        return BOOLS[word]
    if isinstance(value, bool):
        raise wrong
    if kind is PathText:
        return path_text(os.path.expanduser(str(value)), where)
    if kind is str:
        return _plain(str(value), wrong)
    return _number(value, kind, wrong)


def _given(value) -> str:
    """A number or a pair as the user wrote it."""
    return cut(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def rules_of(kind) -> list[str]:
    """What the numbers of a type must be, in words, those in its tuples and unions too."""
    args = typing.get_args(kind)
    own = [str(rule) for rule in args[1:]] if typing.get_origin(kind) is Annotated else []
    inner = args[:1] if own else () if typing.get_origin(kind) is typing.Literal else args
    return list(dict.fromkeys([rule for arg in inner for rule in rules_of(arg)] + own))


def _number(value: str | float, kind: type, wrong: UserError) -> int | float:
    """An int of 64 bits or a finite float, from `1e3` and `0x10` as well; else an error, `wrong` or more."""
    try:
        if isinstance(value, str) and value.lower().startswith(("0x", "0o", "0b")):
            value = int(value, 0)
        number = float(value)
        if kind is float:
            if not abs(number) < LARGEST:
                raise UserError(f"{wrong}: it must be finite{' in 32 bits' * math.isfinite(number)}")
            return number
        if not math.isfinite(number):
            raise UserError(f"{wrong}: it must be finite")
        if isinstance(value, str):
            value = int(value) if value.lstrip("+-").isdecimal() else number
        if value != int(value):
            raise wrong
        if not -(2**63) <= value < 2**63:
            raise UserError(f"{wrong}: 64 bits are not enough for it")
        return int(value)
    except ValueError:
        raise wrong from None
    except OverflowError:
        raise UserError(f"{wrong}: it is too large") from None


def _plain(text: str, wrong: UserError) -> str:
    """`text`, if YAML, JSON and file systems can have it: no NUL, no bytes of the command line that are not UTF-8."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{wrong}: it is not UTF-8, or has a NUL")
    return text


def path_text(path: str, where: str) -> str:
    """`path`, of any bytes, if the file system can have it."""
    wrong = UserError(f"{where}={shown(path)} cannot be a path: a name has at most 255 bytes, and no NUL")
    try:
        names = [os.fsencode(name) for name in path.split("/")]
    except UnicodeEncodeError:  # of half a character, which a YAML file can have
        raise wrong from None
    if "\0" in path or len(b"/".join(names)) > 4000 or max(map(len, names)) > 255:
        raise wrong
    return path


def _words(kind) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(args[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [_words(a) for a in args if a is not type(None)]
        return " or ".join(kinds + ["none"] * (type(None) in args))
    if origin is typing.Literal:
        return "/".join(map(str, args))
    if origin is tuple:
        return "list of numbers" if Ellipsis in args else f"list of {len(args)} values, like 0.2,1.0"
    if origin is list:
        return "list"
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        PathText: "path",
    }
    return names.get(kind, str(kind))
