"""Values as compact JSON in the order of a schema's properties: what a grammar lets a model write, to the character."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from common.generation.json_schema import Schema
from common.generation.schema_places import SchemaPlaces, items_of, property_of

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


def plain(number: int | float) -> str:
    """A number as a plain decimal: 0.0000001, not 1e-07.

    Raises:
        ValueError: it is not finite.
    """
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{number} is not a number in JSON")
    if not isinstance(number, float):
        return json.dumps(number)  # true and false are numbers to Python
    text = format(Decimal(repr(number)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


class _Writer:
    """Writes values as JSON in the order of a schema's properties."""

    def __init__(self, schema: Schema) -> None:
        self.places = SchemaPlaces(schema)

    def text(self, value: Any, schemas: list[Any]) -> str:
        """`value` under schemas that all apply to it."""
        if isinstance(value, dict | list):
            applied = [part for schema in schemas for part in self.places.applied(schema, value)]
            for part in applied:
                for member in [part["const"]] if "const" in part else part.get("enum", []):
                    if json.dumps(member, sort_keys=True) == json.dumps(value, sort_keys=True):
                        return self._plain(member)
            if isinstance(value, list):
                return (
                    "[" + ",".join(self.text(item, items_of(applied, index)) for index, item in enumerate(value)) + "]"
                )
            names = [name for part in applied for name in part.get("properties", {})]
            names += [name for part in applied for name in part.get("required", [])]
            present = [name for name in dict.fromkeys([*names, *value]) if name in value]
            return _object({name: self.text(value[name], property_of(applied, name)) for name in present})
        return self._plain(value)

    def _plain(self, value: Any) -> str:
        if isinstance(value, dict):
            return _object({name: self._plain(part) for name, part in value.items()})
        if isinstance(value, list):
            return "[" + ",".join(map(self._plain, value)) + "]"
        if isinstance(value, str):
            return json.dumps(_UNWRITABLE.sub(" ", value), ensure_ascii=False)
        if isinstance(value, int | float):
            return plain(value)
        return json.dumps(value)


def _object(parts: dict[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in parts.items()) + "}"
