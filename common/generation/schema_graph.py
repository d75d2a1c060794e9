"""The schemas in a JSON Schema: those a value may meet, how often they apply to it, and how small it can be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from common.cli import UserError

# Keywords whose schemas apply to the value itself, and those whose apply to a part of it; as one schema, list or map.
SAME_VALUE = ("allOf", "anyOf", "oneOf")
PARTS = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems")
SAME_VALUE_CHECKED = ("not", "if", "then", "else", "dependentSchemas")
PARTS_CHECKED = ("contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
TYPES = ("null", "boolean", "number", "string", "array", "object")
LIMITS = {  # of each type, the keywords that must not cross
    "string": [("minLength", "maxLength")],
    "array": [("minItems", "maxItems")],
    "object": [("minProperties", "maxProperties")],
    "number": [("minimum", "maximum"), ("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum")],
}
UNKNOWN_PATTERN = 24  # characters allowed for a string that has to match one


class Node(NamedTuple):
    """A schema, its JSON pointer and the schemas that its references point at."""

    path: str
    schema: dict[str, Any]
    targets: tuple[dict[str, Any] | bool, ...]


def nodes(root: dict[str, Any], checked: bool = False) -> list[Node]:
    """The schemas that a value may have to satisfy, `root` first, each once and definitions only where referred to.

    Args:
        checked: with those under keywords that no grammar enforces (`not`, `if`, `contains`...), last.

    Raises:
        UserError: a reference leaves the document or points at nothing.
    """
    resource = DRAFT202012.create_resource(root)
    queue = [("#", root, Registry().with_resource("", resource).resolver_with_root(resource))]
    later, reached, seen = [], [], set()
    while queue or later:
        path, node, resolver = (queue or later).pop(0)
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        resolver = resolver.in_subresource(DRAFT202012.create_resource(node))
        targets = []
        for key in ("$ref", "$dynamicRef") if checked else ("$ref",):
            if key in node:
                target, at = _lookup(resolver, node[key], f"{path}/{key}")
                targets.append(target)
                queue.append((node[key], target, at))
        reached.append(Node(path, node, tuple(targets)))
        for key in SAME_VALUE + PARTS:
            queue += [(f"{path}/{index}", part, resolver) for index, part in children(node, key)]
        if checked:
            for key in SAME_VALUE_CHECKED + PARTS_CHECKED:
                later += [(f"{path}/{index}", part, resolver) for index, part in children(node, key)]
    return reached


def children(node: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """(place, schema) of the schemas under a keyword: one, a list of them or a map of names to them."""
    value = node.get(key)
    if isinstance(value, list):
        yield from ((f"{key}/{number}", part) for number, part in enumerate(value))
    elif key in ("properties", "patternProperties", "dependentSchemas"):
        yield from ((f"{key}/{_escape(name)}", part) for name, part in (value or {}).items())
    elif value is not None:
        yield key, value


def pointer(parts: Iterable[str | int]) -> str:
    """A JSON pointer with `#` before it."""
    return "/".join(["#", *(_escape(str(part)) for part in parts)])


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _lookup(resolver, reference: str, path: str):
    """(the schema that a reference points at, the resolver there)"""
    try:
        resolved = resolver.lookup(reference)
    except Unresolvable as error:
        if reference.startswith("#"):
            raise UserError(f"{path}: '{reference}' points at nothing in the schema; correct it") from error
        raise UserError(f"{path}: '{reference}' is another document; put that schema under $defs") from error
    if not isinstance(resolved.contents, dict | bool):
        raise UserError(f"{path}: '{reference}' points at what is not a schema; correct it")
    return resolved.contents, resolved.resolver


def most_expansions(all_nodes: list[Node], limit: int) -> float:
    """The largest number of schemas that apply to one value at once, references followed; infinite above `limit`.

    That is what a validator works through, and it doubles with every step of a chain of references that go two ways.
    """
    known = {id(node.schema): node for node in all_nodes}
    counts: dict[int, float] = {}

    def count(schema: Any, depth: int) -> float:
        if not isinstance(schema, dict):
            return 1
        if depth > 100:  # a longer chain, or one that ends in itself
            return math.inf
        if id(schema) not in counts:
            parts = [part for key in SAME_VALUE + SAME_VALUE_CHECKED for _, part in children(schema, key)]
            total = 1 + sum(count(part, depth + 1) for part in [*parts, *known[id(schema)].targets])
            counts[id(schema)] = total if total <= limit else math.inf
        return counts[id(schema)]

    return max(count(node.schema, 0) for node in all_nodes)


def smallest(all_nodes: list[Node]) -> dict[int, float]:
    """About how many characters the smallest value of each schema has, by the schema's `id`.

    Infinite where nothing satisfies it, as far as that shows from each schema alone; the estimate is rather high.
    """
    sizes = {id(node.schema): math.inf for node in all_nodes}
    for _ in all_nodes:  # a value may hold one of the same schema: start from "none" until nothing changes
        before = dict(sizes)
        for node in reversed(all_nodes):
            sizes[id(node.schema)] = _size(node, sizes)
        if sizes == before:
            break
    return sizes


def _size(node: Node, sizes: dict[int, float]) -> float:
    schema = node.schema

    def size(part: Any) -> float:
        return sizes.get(id(part), math.inf) if isinstance(part, dict) else 1 if part else math.inf

    if "const" in schema:
        own = float(len(json.dumps(schema["const"], ensure_ascii=False)))
    elif "enum" in schema:
        own = min((float(len(json.dumps(value, ensure_ascii=False))) for value in schema["enum"]), default=math.inf)
    else:
        own = min((_size_of(schema, kind, size) for kind in types(schema)), default=math.inf)
    own += sum(size(part) for part in schema.get("allOf", []))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            own += min((size(part) for part in schema[key]), default=math.inf)
    return own + sum(map(size, node.targets))


def _size_of(schema: dict[str, Any], kind: str, size: Callable[[Any], float]) -> float:
    if empty(schema, kind):
        return math.inf
    if kind == "string":
        return 2 + schema.get("minLength", 0) + (UNKNOWN_PATTERN if {"pattern", "format"} & schema.keys() else 0)
    if kind == "number":
        limits = [schema.get(key, 0) for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")]
        return max(len(str(int(limit))) for limit in limits)
    if kind == "array":
        count, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])[: schema.get("minItems", 0)]
        rest = max(0, count - len(prefix))
        return 2 + count + sum(map(size, prefix)) + (rest * size(schema.get("items", True)) if rest else 0)
    if kind == "object":
        return 2 + sum(len(name) + 4 + size(_property(schema, name)) for name in schema.get("required", []))
    return 4


def empty(schema: dict[str, Any], kind: str) -> str | None:
    """Why a schema has no values of a type, as far as its own limits say."""
    for low, high in LIMITS.get(kind, []):
        if low in schema and high in schema:
            crossed = schema[low] >= schema[high] if "exclusive" in low + high else schema[low] > schema[high]
            if crossed:
                return f"{low} {schema[low]} leaves nothing below {high} {schema[high]}"
    if kind == "object":
        for name in schema.get("required", []):
            if _property(schema, name) is False:
                return f"the required property '{name}' is not allowed"
    return None


def contradiction(schema: dict[str, Any]) -> str | None:
    """Why a schema has no values at all, as far as its own limits say."""
    if schema.get("enum") == []:
        return "enum is empty"
    reasons = [empty(schema, kind) for kind in types(schema)]
    return reasons[0] if reasons and all(reasons) else None


def types(schema: dict[str, Any]) -> list[str]:
    """The types that a schema's `type` leaves, integers counted as numbers."""
    named = schema.get("type", TYPES)
    named = [named] if isinstance(named, str) else named
    return list(dict.fromkeys("number" if kind == "integer" else kind for kind in named))


def _property(schema: dict[str, Any], name: str) -> Any:
    """The schema, of those in an object's schema, that a property has to satisfy (one of them, if there are more)."""
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    for pattern, part in schema.get("patternProperties", {}).items():
        if re.search(pattern, name):
            return part
    return schema.get("additionalProperties", True)
