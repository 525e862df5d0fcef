"""Makes tools of Python functions: name, description, and the JSON Schema of the arguments.

The schema follows from the type hints (`msgspec` makes it), the descriptions from the docstring (Google, NumPy or
Sphinx style), and the rest from the arguments of `libaios.tool.define`. Only workers import this module: the service
gets the `Tool`s that they make.
"""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import docstring_parser
import msgspec
from msgspec import Struct

from aiosd.tools.messages import Tool
from libaios.tool import Definition, definition_of


class Function:
    """A tool and its Python function."""

    def __init__(self, function: Callable[..., Any], definition: Definition) -> None:
        self.call = function
        self.arguments = _arguments(function)
        doc = docstring_parser.parse(inspect.getdoc(function) or "")
        parts = (doc.short_description, doc.long_description)
        self.tool = Tool(
            definition.name or function.__name__,
            "\n\n".join(part.strip() for part in parts if part),
            _schema(self.arguments, {param.arg_name: param.description or "" for param in doc.params}),
            definition.instances,
            definition.time_s,
            definition.memory_bytes,
            definition.output_bytes,
            definition.reads,
            definition.writes,
            definition.concerns,
        )

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call the function with arguments of the types of its hints. Raises msgspec.ValidationError."""
        typed = msgspec.convert(arguments, self.arguments)
        given = {name: getattr(typed, name) for name in self.arguments.__struct_fields__ if name in arguments}
        return self.call(**given)


def functions_of(namespace: dict[str, Any]) -> dict[str, Function]:
    """The tools among the names of a module, by the name of the tool. Raises TypeError with the function's name for
    one whose hints give no schema, ValueError for two of one name."""
    found: dict[str, Function] = {}
    for value in list(namespace.values()):
        definition = definition_of(value)
        if definition is None:
            continue
        made = Function(value, definition)
        if made.tool.name in found and found[made.tool.name].call is not value:
            raise ValueError(f"two tools are named {made.tool.name}")
        found[made.tool.name] = made
    return found


def _arguments(function: Callable[..., Any]) -> type[Struct]:
    """A struct with a field for each parameter."""
    name = getattr(function, "__name__", "tool")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as err:
        raise TypeError(f"{name}: its type hints cannot be read: {err}") from err
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}: a tool's parameters have names; {parameter} has none")
        field = [parameter.name, hints.get(parameter.name, Any)]
        if parameter.default is not parameter.empty:
            field.append(_default(parameter.default))
        fields.append(tuple(field))
    return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)


def _default(value: Any) -> Any:
    """Plain values are shown in the schema; others are copied for each call."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return msgspec.field(default_factory=functools.partial(copy.deepcopy, value))


def _schema(arguments: type[Struct], descriptions: dict[str, str]) -> dict[str, Any]:
    try:
        schema = msgspec.json.schema(arguments)
    except (TypeError, RuntimeError) as err:
        raise TypeError(f"{arguments.__name__}: its arguments have no JSON Schema: {err}") from err
    definitions = schema.pop("$defs", {})
    root = definitions.pop(schema.get("$ref", "").removeprefix("#/$defs/"), schema)
    root = {key: value for key, value in root.items() if key != "title"}
    for name, prop in root.get("properties", {}).items():
        if descriptions.get(name):
            prop.setdefault("description", descriptions[name])
    return {**root, "$defs": definitions} if definitions else root
