"""Documents longer than a model can read: cut in pieces that fit, and the answers to them merged by confidence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from common.generation.json_schema import Schema
from common.tasks.idp.alignment import Haystack
from common.tasks.idp.confidence import Scored, plain
from common.tasks.idp.evidence import stands

OVERLAP = 200  # characters that two pieces of a long document share, so that a line item is whole in one of them

DEFINITIONS = ("$defs", "definitions")
DEFINITION = re.compile(r"#/(\$defs|definitions)/([\w.-]+)")
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # a name that stands in a reference as it is
_ANCHOR = re.compile(r'"\$(?:id|anchor|dynamicAnchor)"')  # another name that a reference may have
DEMANDS = ("required", "dependentRequired", "minProperties", "minItems")  # keywords that make an answer say something


def optional(schema: Schema) -> Schema:
    """The schema of an answer to a piece: what does not stand there may be left out. Items of lists are whole.

    A definition that a list's items share with a field is there twice then, the second time under NAME_part; those that
    nothing refers to any more are left out.
    """
    if not isinstance(schema, dict):
        return schema
    parts: dict[str, Any] = {}

    def part(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kept = {key: value for key, value in node.items() if key not in DEMANDS}
        if isinstance(kept.get("properties"), dict):
            kept["properties"] = {name: part(member) for name, member in kept["properties"].items()}
        for key in ("allOf", "anyOf"):
            if isinstance(kept.get(key), list):
                kept[key] = [part(branch) for branch in kept[key]]
        if found := DEFINITION.fullmatch(str(kept.get("$ref"))):
            kept["$ref"] = reference(*found.groups())
        return kept

    def reference(where: str, name: str) -> str:
        own = f"{name}_part"
        if name not in schema.get(where, {}) or own in schema.get("$defs", {}):
            return f"#/{where}/{name}"
        if own not in parts:
            parts[own] = None  # so that one that refers to itself comes to an end
            parts[own] = part(schema[where][name])
        return f"#/$defs/{own}"

    whole = part(schema)
    return _with_needed_definitions(whole | {"$defs": schema.get("$defs", {}) | parts}) if parts else whole


def _with_needed_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without definitions that nothing refers to."""
    definitions = {
        (where, name): json.dumps(definition)
        for where in DEFINITIONS
        for name, definition in schema.get(where, {}).items()
    }
    rest = {key: value for key, value in schema.items() if key not in DEFINITIONS}
    needed = {key for key, text in definitions.items() if not _PLAIN.fullmatch(key[1]) or _ANCHOR.search(text)}
    texts = [json.dumps(rest), *(definitions[key] for key in needed)]
    while texts:
        found = definitions.keys() & {*DEFINITION.findall(texts.pop())} - needed
        needed |= found
        texts += [definitions[key] for key in found]
    for where in DEFINITIONS:
        kept = {name: definition for name, definition in schema.get(where, {}).items() if (where, name) in needed}
        rest |= {where: kept} if kept else {}
    return rest


def pieces(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The document in as few halvings as make every piece fit."""
    return [text] if fits(text) else [piece for half in halves(text) for piece in pieces(half, fits)]


def halves(text: str) -> tuple[str, str]:
    """A document cut near its middle: after a block (there is a blank line), else after a line, else after a word.

    Some lines before the cut are in both halves.

    Both are shorter than the document, which must have two characters.
    """
    middle = len(text) // 2
    reach = len(text) // 4
    ends = ((text.rfind(end, middle - reach, middle), len(end)) for end in ("\n\n", "\n", " "))
    cut = next((start + length for start, length in ends if start >= 0), middle)
    start = text.find("\n", max(1, cut - min(OVERLAP, reach)) - 1, cut) + 1
    return text[:cut], text[start or cut :]


def merge(parts: Sequence[Any]) -> Any:
    """The answers to the pieces of one document as one; trees as `confidence.scored` makes.

    Of a leaf the one that the model was surest of is taken; one that does not stand in its piece only where no other
    does, and an empty one only where there is no other. Lists are joined, without the items that a list starts with and
    the one before it ended with (pieces overlap).
    """
    parts = [part for part in parts if not _empty(part)] or list(parts[:1])
    if all(isinstance(part, dict) for part in parts):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: merge([part[key] for part in parts if key in part]) for key in keys}
    if all(isinstance(part, list) for part in parts):
        joined: list = []
        for part in parts:
            shared = range(min(len(joined), len(part)), 0, -1)
            repeated = next((n for n in shared if plain(joined[-n:]) == plain(part[:n])), 0)
            joined += part[repeated:]
        return joined
    return max(parts, key=_likelihood)


def _likelihood(part: Any) -> tuple[bool, float]:
    leaves = list(_leaves(part))
    return all(leaf.in_text for leaf in leaves), min((leaf.confidence for leaf in leaves), default=0.0)


def _leaves(part: Any) -> Iterator[Scored]:
    if isinstance(part, Scored):
        yield part
    else:
        for member in part.values() if isinstance(part, dict) else part:
            yield from _leaves(member)


def placed(part: Any, haystack: Haystack) -> Any:
    """An answer whose leaves say whether they stand in the text of its piece."""
    if isinstance(part, dict):
        return {key: placed(member, haystack) for key, member in part.items()}
    if isinstance(part, list):
        return [placed(item, haystack) for item in part]
    return replace(part, in_text=part.value in (None, "") or stands(haystack, part.value))


def fill(known: Any, other: Any) -> Any:
    """An answer with what another one has beyond it."""
    if isinstance(known, dict) and isinstance(other, dict):
        both = {key: fill(member, other[key]) if key in other else member for key, member in known.items()}
        return both | {key: member for key, member in other.items() if key not in known}
    return other if known == [] else known


def _empty(part: Any) -> bool:
    return plain(part) in (None, "", [], {})
