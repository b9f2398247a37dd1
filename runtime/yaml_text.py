"""YAML files as nested texts: every single value stays as it was written, and the schema says what it means.

`category: 01` is "01" and `weight_decay: 1e-6` is a number, for only the declared type decides. A key
without a value is None.
"""

import os
from pathlib import Path

import yaml

from runtime.errors import UserError, cut, shown
from runtime.files import open_regular

MAX_BYTES = 2**18  # of a file
MAX_NODES, MAX_DEPTH = 10_000, 20  # keys and values, with all aliases expanded; sections in sections
MAX_TEXT = 2**20  # characters of all of them, with all aliases expanded
TAG = "tag:yaml.org,2002:"


def read_yaml(path: str | Path) -> dict:
    """A YAML file that must be a mapping without duplicate keys; an empty file is an empty mapping.

    Raises:
        UserError: the file cannot be read or parsed, a key stands twice or is no text, aliases multiply without bounds.
    """
    try:
        node = yaml.compose(_text(path), _Loader)
        values = None if node is None else _Reader(path).values(node)
    except OSError as error:
        raise UserError(f"cannot read config file {cut(str(path))}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{cut(str(path))}{line} is not valid YAML: {cut(str(error.problem))}") from None
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not allow; bytes that are not UTF-8
        raise UserError(f"{cut(str(path))} is not valid YAML: {cut(str(error))}") from None
    except RecursionError:
        raise UserError(f"{cut(str(path))} is not valid YAML: it is nested more than {MAX_DEPTH} deep") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single value"
        raise UserError(f"{cut(str(path))} must be a mapping of keys to values, not a {kind}")
    return values


def _text(path: str | Path) -> str:
    with open_regular(path) as file:
        found = file.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        raise UserError(f"cannot read config file {cut(str(path))}: it has more than {MAX_BYTES} bytes")
    return found.decode("utf-8")


class _Loader(yaml.BaseLoader):
    """Stops as soon as a file is too large or too deep, for reading all of it may take minutes."""

    nodes = depth = 0

    def compose_node(self, parent, index):
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        for number, most, what in ((self.nodes, MAX_NODES, "values"), (self.depth - 1, MAX_DEPTH, "levels")):
            if number > most:
                raise yaml.MarkedYAMLError(
                    problem=f"it has more than {most} {what}", problem_mark=self.peek_event().start_mark
                )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Texts, lists and dicts from the nodes of one file, which are counted, since nine aliases of nine aliases of ...
    take few lines and hold more values than fit into memory."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.nodes, self.length = path, 0, 0

    def values(self, node: yaml.Node, depth: int = 0):
        self.nodes, self.length = self.nodes + 1, self.length + len(node.value)
        if self.nodes > MAX_NODES or self.length > MAX_TEXT:
            raise self.error(node, f"more than {MAX_NODES} values or {MAX_TEXT} characters: too many aliases (*name)?")
        if depth > MAX_DEPTH:
            raise self.error(node, f"nested more than {MAX_DEPTH} deep")
        if node.tag.removeprefix(TAG) not in ("str", "seq", "map"):
            raise self.error(node, f"tag {cut(node.tag.replace(TAG, '!!'))} is not supported: write plain values")
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.value or node.style else None
        if isinstance(node, yaml.SequenceNode):
            return [self.values(item, depth + 1) for item in node.value]
        own, merged = {}, {}
        for key_node, value_node in node.value:
            key, value = self.values(key_node, depth + 1), self.values(value_node, depth + 1)
            if not isinstance(key, str) or not key:
                raise self.error(key_node, f"a key must be a word, not {shown(key)}")
            if key in own:
                raise self.error(key_node, f"key {shown(key)} is given twice")
            if key == "<<":  # YAML's merge key: the sections that it names stand under this one's own keys
                for section in reversed(value) if isinstance(value, list) else [value]:
                    if not isinstance(section, dict):
                        raise self.error(value_node, "<< needs a section, or a list of sections")
                    merged |= section
            else:
                own[key] = value
        return merged | own

    def error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{cut(str(self.path))}:{node.start_mark.line + 1}: {what}")
