"""Bounds of what a schema may ask for, beyond which it is refused before anything works on it.

They are wide of what documents need, and keep a hostile schema from taking for ever, or all memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.cli import UserError

MAX_ALL_PROPERTIES = 3000  # in the whole schema
MAX_BRANCHES = 500  # of one anyOf, oneOf or allOf
MAX_ALL_BRANCHES = 3000
MAX_PATTERN = 1000  # characters of a regular expression
MAX_PATTERNS = 300
MAX_ENUM = 10_000  # values
MAX_COUNT = 1_000_000  # of characters, items or properties that a limit names


def check_limits(schema: Any) -> None:
    """Raises UserError that names the first bound that a schema exceeds."""
    properties = branches = patterns = 0
    for node in objects(schema):
        for key in ("properties", "patternProperties", "$defs", "dependentSchemas"):
            properties += _size(node.get(key), dict)
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            count = _size(node.get(key), list)
            branches += count
            if count > MAX_BRANCHES:
                raise UserError(f"the schema has {count:,} branches under {key}; {MAX_BRANCHES} are the most")
        if _size(node.get("enum"), list) > MAX_ENUM:
            raise UserError(f"the schema has {len(node['enum']):,} values under enum; {MAX_ENUM:,} are the most")
        for pattern in _patterns(node):
            patterns += 1
            if len(pattern) > MAX_PATTERN:
                raise UserError(
                    f"the schema has a pattern of {len(pattern):,} characters; {MAX_PATTERN:,} are the most"
                )
        _check_counts(node)
    for count, most, name in (
        (properties, MAX_ALL_PROPERTIES, "properties"),
        (branches, MAX_ALL_BRANCHES, "branches"),
        (patterns, MAX_PATTERNS, "patterns"),
    ):
        if count > most:
            raise UserError(f"the schema has {count:,} {name}; {most:,} are the most")


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects within a JSON value, itself included."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _size(value: Any, kind: type) -> int:
    return len(value) if isinstance(value, kind) else 0


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    if isinstance(node.get("pattern"), str):
        yield node["pattern"]
    if isinstance(node.get("patternProperties"), dict):
        yield from node["patternProperties"]


def _check_counts(node: dict[str, Any]) -> None:
    """Limits that no document reaches, which the grammar engine would work out all the same."""
    for key in ("minLength", "minItems", "minProperties", "minContains"):
        value = node.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > MAX_COUNT:
            raise UserError(f"the schema has {key} {str(value)[:12]}; {MAX_COUNT:,} are the most")
