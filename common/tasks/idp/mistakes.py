"""Mistakes that an answer could make in a document's fields: the rejected side of preference rows.

All of them satisfy the schema. What does not, broken JSON above all, is never written by a model that is held to it,
and would teach nothing.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from common.generation import json_schema, json_writer
from common.tasks.idp import amounts, dates
from common.tasks.idp.field_metrics import Path, leaves, same, type_of

TRIES = 4  # of each kind, before another one is taken


@dataclass(frozen=True)
class RightAnswer:
    """A right answer.

    Attributes:
        fields: as the model is to write them.
        document: that they are from.
    """

    fields: Any
    document: str


Mistake = Callable[[RightAnswer, random.Random], Any]


def rejected(
    answer: RightAnswer,
    schema: json_schema.Schema,
    rng: random.Random,
    meaning: Callable[[Any], Any] = lambda fields: fields,
) -> str | None:
    """An answer with one realistic mistake, as JSON; None where every change of it breaks the schema or is none.

    Args:
        schema: of the fields as the model is to write them.
        meaning: what fields mean. Another way to write the same is no mistake.
    """
    right = meaning(answer.fields)
    for mistake in rng.sample(MISTAKES, len(MISTAKES)):
        for _ in range(TRIES):
            wrong = mistake(answer, rng)
            if wrong is not None and meaning(wrong) != right and not json_schema.errors(wrong, schema):
                return json_writer.dumps(wrong, schema)
    return None


def from_elsewhere(answer: RightAnswer, rng: random.Random) -> Any:
    """A date, a number or a line that stands at another place of the document."""

    def other(leaf: Any) -> Any:
        alternatives = [value for value in _candidates(leaf, answer.document) if not same(value, leaf)]
        return rng.choice(alternatives) if alternatives else leaf

    return _change_one(answer.fields, rng, other)


def wrong_value(answer: RightAnswer, rng: random.Random) -> Any:
    """A value that the document does not have: another digit, a word less, another truth."""
    return _change_one(answer.fields, rng, lambda leaf: _other_value(leaf, rng))


def swapped_fields(answer: RightAnswer, rng: random.Random) -> Any:
    """The values of two fields of one type exchanged."""
    if not isinstance(answer.fields, dict):
        return None
    return _swap(answer.fields, [(key,) for key in answer.fields], rng)


def swapped_lines(answer: RightAnswer, rng: random.Random) -> Any:
    """One column of two lines of a list exchanged."""
    columns: dict[tuple, list[Path]] = {}
    for path, _ in leaves(answer.fields):
        if any(isinstance(part, int) for part in path):
            columns.setdefault(tuple(None if isinstance(part, int) else part for part in path), []).append(path)
    several = [paths for paths in columns.values() if len(paths) > 1]
    return _swap(answer.fields, rng.choice(several), rng) if several else None


def missing_part(answer: RightAnswer, rng: random.Random) -> Any:
    """A field or a line left out."""
    paths = list(dict.fromkeys(path[:end] for path, _ in leaves(answer.fields) for end in range(1, len(path) + 1)))
    if not paths:
        return None
    wrong, path = copy.deepcopy(answer.fields), rng.choice(paths)
    del _holder(wrong, path)[path[-1]]
    return wrong


MISTAKES: tuple[Mistake, ...] = (from_elsewhere, wrong_value, swapped_fields, swapped_lines, missing_part)


def _candidates(leaf: Any, document: str) -> Iterable[Any]:
    """Values in a document that could be taken for a leaf: those of its kind."""
    if isinstance(leaf, bool) or leaf is None:
        return []
    numbers = amounts.find(document)
    if isinstance(leaf, int | float):
        whole = isinstance(leaf, int)
        return [int(number.readings[0]) if whole else float(number.readings[0]) for number in numbers]
    if date := dates.whole(leaf):
        iso = leaf == date.readings[0].isoformat()  # as a grammar holds it, not as the document has it
        others = dates.find(document)
        return [other.readings[0].isoformat() if iso else document[other.start : other.end] for other in others]
    if amounts.whole(leaf):
        return [document[slice(*number.bare)] for number in numbers]
    return [line.strip() for line in document.splitlines() if line.strip()]


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


def _change_one(fields: Any, rng: random.Random, change: Callable[[Any], Any]) -> Any:
    """`fields` with one of the leaves changed; None where there is none, or it has no other value."""
    places = list(leaves(fields))
    if not places:
        return None
    path, leaf = rng.choice(places)
    if same(after := change(leaf), leaf):
        return None
    if not path:
        return after
    wrong = copy.deepcopy(fields)
    _holder(wrong, path)[path[-1]] = after
    return wrong


def _swap(fields: Any, paths: list[Path], rng: random.Random) -> Any:
    """`fields` with the values at two of the paths exchanged, of one type and unlike; None where there are none."""

    def at(path: Path) -> Any:
        return _holder(fields, path)[path[-1]]

    pairs = [(a, b) for index, a in enumerate(paths) for b in paths[index + 1 :]
             if type_of(at(a)) == type_of(at(b)) and at(a) != at(b)]  # fmt: skip
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    wrong = copy.deepcopy(fields)
    _holder(wrong, a)[a[-1]], _holder(wrong, b)[b[-1]] = at(b), at(a)
    return wrong


def _holder(value: Any, path: Path) -> Any:
    """The object or list that has the end of a path."""
    for part in path[:-1]:
        value = value[part]
    return value
