"""`--json-schema FILE`: read, and looked at as far as it can be without the engine. May import: nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # objects of schemas
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "not", "if", "then", "else")


def read_schema(path: str) -> tuple[dict[str, Any], str | None]:
    """The schema in a file, and what is wrong with it: it would be every row's error, once all is loaded."""
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(schema, dict):
            return {}, f"{path!r} holds no JSON Schema, which is an object"
        wrong = _wrong_in(schema, "")
    except OSError as error:
        if path.lstrip().startswith("{"):
            return {}, "takes the name of a file with the schema in it, not the schema"
        return {}, f"cannot read {path!r}: {error.strerror}"
    except ValueError as error:
        return {}, f"{path!r} is not JSON: {error}"
    except RecursionError:
        return {}, f"{path!r} is nested too deep"
    return schema, None if wrong is None else f"{path!r} is no JSON Schema: {wrong}"


def _wrong_in(schema: Any, where: str) -> str | None:
    """The first mistake, with where it is; None: none that is seen here."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"{where or 'it'} is {_shown(schema)}, not a schema"
    at = f"{where}." if where else ""
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            return f"{at}type is {_shown(kind)}, none of {', '.join(_TYPES)}"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{at}required is {_shown(required)}, not a list of names"
    inner: list[tuple[str, Any]] = []
    for name in _NAMED:
        if not isinstance(found := schema.get(name, {}), dict):
            return f"{at}{name} is {_shown(found)}, not an object"
        inner += [(f"{at}{name}.{key}", one) for key, one in found.items()]
    for name in _LISTED:
        if not isinstance(found := schema.get(name, []), list):
            return f"{at}{name} is {_shown(found)}, not a list"
        inner += [(f"{at}{name}[{number}]", one) for number, one in enumerate(found)]
    for name in (name for name in _ONE if name in schema):
        found = schema[name]
        many = name == "items" and isinstance(found, list)  # as `prefixItems` until the draft of 2020
        inner += (
            [(f"{at}{name}[{n}]", one) for n, one in enumerate(found)] if many else [(f"{at}{name}", found)]
        )
    return next((wrong for place, one in inner if (wrong := _wrong_in(one, place))), None)


def _shown(value: Any) -> str:
    says = repr(value)
    return says if len(says) <= 60 else says[:60] + "…"
