"""Extracted fields against the true ones: which leaves of two JSON values agree, exactly and after normalising.

A leaf is a number, text, true or false at some path. null, "" and empty containers are no leaves: a field that is
left empty and one that is not there are the same. Items of a list (an invoice's lines) are paired so that most of
their leaves agree, so an item that was missed costs its own leaves and not those of all that follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from common.tasks.idp import amounts, dates

Path = tuple[str | int, ...]

MISSING = None


@dataclass(frozen=True)
class Leaf:
    """One field as it should be and as it was found; MISSING (None) where a side has none.

    Attributes:
        field: its name without the numbers of list items, e.g. "line_items[].qty".
        place: where `found` stands in the answer, with the numbers of list items; None where it is MISSING.
    """

    field: str
    gold: Any
    found: Any
    place: str | None = None

    @property
    def exact(self) -> bool:
        return self.gold is not MISSING and same(self.gold, self.found)

    @property
    def normalised(self) -> bool:
        return self.gold is not MISSING and self.found is not MISSING and same_normalised(self.gold, self.found)


def path_name(path: Path, numbers: bool = True) -> str:
    """("lines", 0, "qty") as "lines[0].qty", or without numbers "lines[].qty"; the root is "$"."""
    text = "".join(f"[{part if numbers else ''}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "$"


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of every leaf, in order."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from leaves(member, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif value is not None and value != "":
        yield path, value


def compare(gold: Any, found: Any, path: Path = (), place: Path = ()) -> list[Leaf]:
    """Every leaf of both values, paired where both have one at the same place.

    Args:
        path: of the field.
        place: of `found` in its answer; differs from `path` in the numbers of list items.
    """
    if isinstance(gold, dict) and isinstance(found, dict):
        keys = [*gold, *(key for key in found if key not in gold)]
        return [leaf for key in keys for leaf in compare(gold.get(key), found.get(key), (*path, key), (*place, key))]
    if isinstance(gold, list) and isinstance(found, list):
        pairs = _pair_items(gold, found)
        return [
            leaf
            for index, (one, other, number) in enumerate(pairs)
            for leaf in compare(one, other, (*path, index), (*place, number))
        ]
    if isinstance(gold, dict | list) or isinstance(found, dict | list):
        only_gold = [Leaf(path_name(index, False), leaf, MISSING) for index, leaf in leaves(gold, path)]
        return only_gold + [
            Leaf(path_name(index, False), MISSING, leaf, path_name(index)) for index, leaf in leaves(found, place)
        ]
    gold, found = (MISSING if value == "" else value for value in (gold, found))
    if gold is found is MISSING:
        return []
    return [Leaf(path_name(path, False), gold, found, None if found is MISSING else path_name(place))]


def _pair_items(gold: list, found: list) -> list[tuple[Any, Any, int]]:
    """Items paired for the most agreeing leaves (an assignment problem), the others with None.

    With each pair comes the place of its second item in `found`, 0 where there is none.
    """
    if gold == found:
        return list(zip(gold, found, range(len(found)), strict=True))
    agreeing = np.array([[sum(leaf.normalised for leaf in compare(g, f)) for f in found] for g in gold], ndmin=2)
    nearness = -1e-6 * np.abs(np.subtract.outer(np.arange(len(gold)), np.arange(len(found))))
    rows, columns = linear_sum_assignment((agreeing.reshape(len(gold), len(found)) + nearness), maximize=True)
    pairs = [(gold[g], found[f], int(f)) for g, f in zip(rows, columns, strict=True)]
    pairs += [(item, None, 0) for index, item in enumerate(gold) if index not in rows]
    return pairs + [(None, item, index) for index, item in enumerate(found) if index not in columns]


def same(gold: Any, found: Any) -> bool:
    """Equality of JSON leaves: 44.5 is 44.50, but 1 is neither true nor "1"."""
    return type_of(gold) == type_of(found) and gold == found


def type_of(leaf: Any) -> str:
    """The JSON type of a leaf: "boolean", "number", "string" or "null"."""
    if isinstance(leaf, bool):
        return "boolean"
    return {int: "number", float: "number", str: "string"}.get(type(leaf), "null")


def same_normalised(gold: Any, found: Any) -> bool:
    """Equality of what two leaves mean: white space does not count, nor how a date or an amount is written."""
    if same(gold, found):
        return True
    if isinstance(gold, bool) or isinstance(found, bool):
        return False
    if isinstance(gold, int | float) or (isinstance(gold, str) and re.search(r"\d[.,]\d\d\b", gold)):
        amounts = amount(gold), amount(found)
        if None not in amounts:
            return abs(amounts[0] - amounts[1]) < 1e-9 * max(1.0, abs(amounts[0]))
    gold, found = str(gold), str(found)
    return " ".join(gold.split()) == " ".join(found.split()) or (date(gold) is not None and date(gold) == date(found))


def amount(leaf: Any) -> float | None:
    """A number, or text such as "1.234,50 EUR", "(12.00)", "$ 8.20" or "RM31.00", as a number; None for any other text.

    Where nothing else tells, three digits after a comma are thousands, and after a point decimals.
    """
    if not isinstance(leaf, str):
        return float(leaf)
    found = amounts.whole(leaf)
    return None if found is None else float(found.readings[-1 if found.grouping == "," else 0])


def date(text: str) -> tuple | None:
    """A date, however it is written: (year, month, day), or None when `text` is none.

    Where day and month cannot be told apart (09/01/2019), they stand in the order of the text, marked as such.
    """
    found = dates.whole(text)
    if found is None:
        return None
    day = found.readings[0]
    if len(found.readings) > 1:
        return ("day or month", day.year, day.day, day.month)
    return day.year, day.month, day.day


def counts(rows: Sequence[Sequence[Leaf]], normalised: bool) -> np.ndarray:
    """[rows, 3]: for each document how many leaves agree, were found, and should be found."""
    return np.array(
        [
            [
                sum(leaf.normalised if normalised else leaf.exact for leaf in row),
                sum(leaf.found is not MISSING for leaf in row),
                sum(leaf.gold is not MISSING for leaf in row),
            ]
            for row in rows
        ],
        dtype=np.float64,
    ).reshape(-1, 3)
