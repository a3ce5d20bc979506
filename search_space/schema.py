"""JSON Schema (draft 2020-12) of a configuration, from the dataclasses that read it: types, bounds, defaults, texts.

It says of one value what `settings.build` says; what holds between values (steps or epochs, say) only building tells.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mixnas.search_space.settings import Between, Duration, to_plain

Schema = dict[str, Any]

_SCALARS: Mapping[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}
_DURATION: Schema = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^([0-9]+(\.[0-9]+)?[dhms]?)+$"},
    ]
}


def schema_of(cls: type) -> Schema:
    """The schema of a dataclass that `settings.build` reads. A class with `schema()` says its own."""
    hints, texts = get_type_hints(cls, include_extras=True), attribute_texts(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        found = _of(hints[field.name])
        if field.default is not dataclasses.MISSING:
            found = {**found, "default": to_plain(field.default)}
        elif field.default_factory is not dataclasses.MISSING:
            found = {**found, "default": to_plain(field.default_factory())}
        else:
            required.append(field.name)
        properties[field.name] = {**({"description": texts[field.name]} if field.name in texts else {}), **found}
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def attribute_texts(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each attribute, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        _, _, listed = text.partition("Attributes:\n")
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, flags=re.M):
            found[match[1]] = " ".join(match[2].split())
    return found


def _of(hint: Any) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return dict(_SCALARS[hint])
    if origin is Annotated:
        return dict(_DURATION) if Duration in args else _bounded(args)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(arg) for arg in args]}
    if origin is tuple:
        return {"type": "array", "items": _of(args[0])}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _of(args[1])}
    if hasattr(hint, "schema"):
        own: Schema = hint.schema()
        return own
    read_by_fields = isinstance(hint, type) and dataclasses.is_dataclass(hint) and not hasattr(hint, "from_plain")
    return schema_of(hint) if read_by_fields else {}


def _bounded(args: tuple[Any, ...]) -> Schema:
    found = _of(args[0])
    for mark in args[1:]:
        if isinstance(mark, Between):
            bounds = {"minimum": mark.low, "maximum": mark.high}
            found |= {name: bound for name, bound in bounds.items() if bound is not None}
    return found
