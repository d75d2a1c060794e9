"""Values as compact JSON in the order of a schema's properties: what a grammar lets a model write, to the character."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from common.generation.json_schema import Schema, Validator

# Control characters without a short escape, and halves of surrogate pairs.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def dumps(value: Any, schema: Schema) -> str:
    """Compact JSON with keys in the schema's order (those it does not name come last): what the grammar lets through.

    Training targets are written with this, so that a trained model and the grammar agree on every character. Numbers
    are plain decimals; control characters without a short escape become spaces.

    Raises:
        ValueError: a number is not finite.
    """
    return _Writer(schema).text(value, [schema])


class _Writer:
    """Writes values as JSON in the order of a schema's properties."""

    def __init__(self, schema: Schema) -> None:
        self.validator = Validator(schema, registry=Registry())
        resource = DRAFT202012.create_resource(schema)
        self.resolver = Registry().with_resource("", resource).resolver_with_root(resource)

    def text(self, value: Any, schemas: list[Any]) -> str:
        """`value` under schemas that all apply to it."""
        if isinstance(value, dict | list):
            applied = [part for schema in schemas for part in self._applied(schema, value, ())]
            for part in applied:
                for member in [part["const"]] if "const" in part else part.get("enum", []):
                    if json.dumps(member, sort_keys=True) == json.dumps(value, sort_keys=True):
                        return self._plain(member)
            if isinstance(value, list):
                return "[" + ",".join(self.text(item, _item(applied, index)) for index, item in enumerate(value)) + "]"
            names = [name for part in applied for name in part.get("properties", {})]
            names += [name for part in applied for name in part.get("required", [])]
            present = [name for name in dict.fromkeys([*names, *value]) if name in value]
            return _object({name: self.text(value[name], _property(applied, name)) for name in present})
        return self._plain(value)

    def _applied(self, schema: Any, value: Any, seen: tuple[int, ...]) -> list[dict[str, Any]]:
        """The schemas that describe `value`, in the order in which the engine reads them."""
        if not isinstance(schema, dict) or id(schema) in seen:
            return []
        seen = (*seen, id(schema))
        applied: list[dict[str, Any]] = []
        for key in schema:
            if key == "$ref":
                try:
                    applied += self._applied(self.resolver.lookup(schema[key]).contents, value, seen)
                except Unresolvable:  # that is for preflight to say
                    continue
            elif key == "allOf":
                applied += [part for branch in schema[key] for part in self._applied(branch, value, seen)]
            elif key in ("anyOf", "oneOf"):
                fits = (branch for branch in schema[key] if self.validator.evolve(schema=branch).is_valid(value))
                applied += self._applied(next(fits, None), value, seen)
            elif key in ("properties", "items", "prefixItems"):
                applied += [schema] if schema not in applied else []
        return applied if schema in applied else [*applied, schema]

    def _plain(self, value: Any) -> str:
        if isinstance(value, dict):
            return _object({name: self._plain(part) for name, part in value.items()})
        if isinstance(value, list):
            return "[" + ",".join(map(self._plain, value)) + "]"
        if isinstance(value, str):
            return json.dumps(_UNWRITABLE.sub(" ", value), ensure_ascii=False)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a number in JSON")
            text = format(Decimal(repr(value)), "f")  # 1e-07 is 0.0000001
            return text.rstrip("0").rstrip(".") if "." in text else text
        return json.dumps(value)


def _object(parts: dict[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in parts.items()) + "}"


def _item(applied: list[dict[str, Any]], index: int) -> list[Any]:
    """The schemas of one item of a list."""
    parts = []
    for schema in applied:
        first = schema.get("prefixItems", [])
        parts.append(first[index] if index < len(first) else schema.get("items", True))
    return parts


def _property(applied: list[dict[str, Any]], name: str) -> list[Any]:
    """The schemas of one property."""
    parts = []
    for schema in applied:
        named = [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        named += [schema["properties"][name]] if name in schema.get("properties", {}) else []
        parts += named or [schema.get("additionalProperties", True)]
    return parts
