"""What a dataclass declares as the schema of a configuration: sections, choices, and the options of a choice."""

import dataclasses
import inspect
import typing


def choice(table: dict):
    """A dataclass field holding a key of `table`, whose values are constructors with keyword-only options."""
    return dataclasses.field(metadata={"choices": table})


def chooser_of(schema: type) -> dataclasses.Field | None:
    """The field by which a section picks a constructor, if it does."""
    return next((field for field in dataclasses.fields(schema) if "choices" in field.metadata), None)


def section_of(kind) -> type | None:
    """The dataclass of a field declared as `Section` or `Section | None`."""
    kinds = (k for k in (kind, *typing.get_args(kind)) if isinstance(k, type))
    return next((k for k in kinds if dataclasses.is_dataclass(k)), None)


def hints_of(schema) -> dict[str, typing.Any]:
    """{name: type} of a dataclass's fields or a function's arguments, with what `Annotated` adds to them."""
    return typing.get_type_hints(schema, include_extras=True)


def option_types(constructor) -> dict[str, tuple]:
    """{name: (type, default)} of a constructor's keyword-only arguments."""
    hints = hints_of(constructor.__init__ if inspect.isclass(constructor) else constructor)
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: (hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def options_of(field: dataclasses.Field, name) -> dict[str, tuple] | None:
    """`option_types` of the constructor that a name of a `choice` stands for; None for a name that it does not know."""
    table = field.metadata["choices"]
    return option_types(table[name]) if isinstance(name, str) and name in table else None
