"""Mistakes that an answer could make in a document's fields: the rejected side of preference rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from common.generation import json_schema, json_writer
from common.tasks.idp.field_metrics import leaves, type_of

DATE = re.compile(r"^(\d+)[-/.](\d+)[-/.](\d+)$")
Mistake = Callable[[dict, random.Random], "dict | str | None"]


def rejected(fields: dict, schema: json_schema.Schema, rng: random.Random) -> str:
    """An answer with one realistic mistake, never equal to the right one."""
    right = json_writer.dumps(fields, schema)
    for mistake in rng.sample(MISTAKES, len(MISTAKES)):
        wrong = mistake(json.loads(right), rng)
        if wrong is not None:
            text = wrong if isinstance(wrong, str) else json_writer.dumps(wrong, schema)
            if text != right:
                return text
    return right[:-1]


def other_date_format(fields: dict, rng: random.Random) -> dict | None:
    """2025-09-12 as 12/09/2025, or another date with its parts turned round."""
    return _change_one(fields, rng, lambda leaf: DATE.sub(r"\3/\2/\1", leaf) if isinstance(leaf, str) else leaf)


def swapped_fields(fields: dict, rng: random.Random) -> dict | None:
    """The values of two fields of one type exchanged."""
    by_type: dict[str, list[str]] = {}
    for key, value in fields.items():
        by_type.setdefault(type_of(value), []).append(key)
    pairs = [(a, b) for keys in by_type.values() for a in keys for b in keys if a < b and fields[a] != fields[b]]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return fields | {a: fields[b], b: fields[a]}


def missing_key(fields: dict, rng: random.Random) -> dict | None:
    """One field left out."""
    gone = rng.choice(list(fields)) if fields else None
    return {key: value for key, value in fields.items() if key != gone} if fields else None


def invented_value(fields: dict, rng: random.Random) -> dict | None:
    """A value that the document does not have: another digit, a word less, another truth."""
    return _change_one(fields, rng, lambda leaf: _other_value(leaf, rng))


def broken_json(fields: dict, rng: random.Random) -> str:
    """JSON that is cut off, has a quote or a comma too few, or stands in chatter."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    index = rng.choice([match.start() for match in re.finditer('[",]', text)] or [0])
    return rng.choice((text[: len(text) * 3 // 4], text[:index] + text[index + 1 :], f"Here is the JSON: {text}"))


MISTAKES: tuple[Mistake, ...] = (other_date_format, swapped_fields, missing_key, invented_value, broken_json)


def _other_value(leaf: Any, rng: random.Random) -> Any:
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float):
        return leaf + rng.randint(1, 99)
    digits = [match.start() for match in re.finditer("[0-9]", leaf)]
    if digits:
        index = rng.choice(digits)
        return leaf[:index] + str((int(leaf[index]) + rng.randint(1, 9)) % 10) + leaf[index + 1 :]
    words = leaf.split(" ")
    return " ".join(words[:-1]) if len(words) > 1 else leaf + "s"


def _change_one(fields: dict, rng: random.Random, change: Callable[[Any], Any]) -> dict | None:
    """`fields` with one of the leaves that `change` changes, changed; None where there is none."""
    changes = [(path, leaf, change(leaf)) for path, leaf in leaves(fields)]
    changes = [(path, after) for path, leaf, after in changes if after != leaf]
    if not changes:
        return None
    path, after = rng.choice(changes)
    holder = fields
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = after
    return fields
