"""Which of the schemas in a JSON Schema describe a value at some place of a document."""

from __future__ import annotations

import re
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from common.generation.json_schema import Schema, Validator


class SchemaPlaces:
    """The schemas of a JSON Schema as they apply to values, references followed."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.validator = Validator(schema, registry=Registry())
        resource = DRAFT202012.create_resource(schema)
        self.resolver = Registry().with_resource("", resource).resolver_with_root(resource)

    def fits(self, value: Any, schema: Any) -> bool:
        """Whether a value satisfies one of the schemas."""
        return self.validator.evolve(schema=schema).is_valid(value)

    def applied(self, schema: Any, value: Any, seen: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        """The schemas that describe `value`, in the order in which the engine reads them."""
        if not isinstance(schema, dict) or id(schema) in seen:
            return []
        seen = (*seen, id(schema))
        applied: list[dict[str, Any]] = []
        for key in schema:
            if key == "$ref":
                try:
                    applied += self.applied(self.resolver.lookup(schema[key]).contents, value, seen)
                except Unresolvable:  # that is for preflight to say
                    continue
            elif key == "allOf":
                applied += [part for branch in schema[key] for part in self.applied(branch, value, seen)]
            elif key in ("anyOf", "oneOf"):
                fits = (branch for branch in schema[key] if self.fits(value, branch))
                applied += self.applied(next(fits, None), value, seen)
            elif key in ("properties", "items", "prefixItems"):
                applied += [schema] if schema not in applied else []
        return applied if schema in applied else [*applied, schema]


def items_of(applied: list[dict[str, Any]], index: int) -> list[Any]:
    """The schemas of one item of a list."""
    parts = []
    for schema in applied:
        first = schema.get("prefixItems", [])
        parts.append(first[index] if index < len(first) else schema.get("items", True))
    return parts


def property_of(applied: list[dict[str, Any]], name: str) -> list[Any]:
    """The schemas of one property."""
    parts = []
    for schema in applied:
        named = [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        named += [schema["properties"][name]] if name in schema.get("properties", {}) else []
        parts += named or [schema.get("additionalProperties", True)]
    return parts
