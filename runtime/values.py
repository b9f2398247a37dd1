"""One value of the configuration: from a text to the type that its key declares."""

import contextlib
import math
import os
import types
import typing

from runtime.errors import UserError, shown

if typing.TYPE_CHECKING:  # whoever reads such a value, or gives a default, has plain text and numbers
    PathText = str
    Seed = int
else:
    PathText = typing.NewType("PathText", str)  # type of a key that names a file or folder: a leading ~ is expanded
    Seed = typing.NewType("Seed", int)  # type of a key that seeds random numbers, numpy's too: 32 bits
NULL = ("none", "null", "~", "")  # texts, in any case, that mean None where None is allowed
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def coerce(value, kind, where: str):
    """`value`, a text of the command line or of YAML or what `as_dict` gave, as type `kind`; errors name `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"{where}={shown(value)} is not a valid {_words(kind)}")
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in NULL)):
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return coerce(value, kinds[0], where)
        for kind in kinds:  # the first that fits, of `int | Literal["auto"]`
            with contextlib.suppress(UserError):
                return coerce(value, kind, where)
        raise wrong
    if origin is typing.Literal:
        match = [a for a in args if str(a) == str(value)]
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
    number = _number(value, kind, wrong)
    if kind is Seed and not 0 <= number < 2**32:
        raise UserError(f"{wrong}: it must be at least 0 and below 2**32")
    return number


def _number(value: str | float, kind: type, wrong: UserError) -> int | float:
    """An int of 64 bits or a finite float, from `1e3` and `0x10` as well; else an error, `wrong` or more."""
    try:
        if isinstance(value, str) and value.lower().startswith(("0x", "0o", "0b")):
            value = int(value, 0)
        number = float(value)
        if not math.isfinite(number):
            raise UserError(f"{wrong}: it must be finite")
        if kind is float:
            return number
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
    if "\0" in path or len(os.fsencode(path)) > 4000 or any(len(os.fsencode(p)) > 255 for p in path.split("/")):
        raise UserError(f"{where}={shown(path)} cannot be a path: a name has at most 255 bytes, and no NUL")
    return path


def _words(kind) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
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
        Seed: "whole number",
    }
    return names.get(kind, str(kind))
