"""Extracted fields against the true ones: which leaves of two JSON values agree, exactly and after normalising.

A leaf is a number, text, true or false at some path. null, "" and empty containers are no leaves: a field that is
left empty and one that is not there are the same. Items of a list (an invoice's lines) are paired so that most of
their leaves agree, so an item that was missed costs its own leaves and not those of all that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import edlib
import numpy as np

from common.tasks.idp import amounts, dates

Path = tuple[str | int, ...]

MISSING = None
LEAST_LIKENESS = 0.5  # of two texts that are taken for the same with a few characters wrong


@dataclass(frozen=True)
class Leaf:
    """One field as it should be and as it was found; MISSING (None) where a side has none.

    Attributes:
        field: its name without the numbers of list items, e.g. "line_items[].qty".
        place: where `found` stands in the answer, with the numbers of list items; None where it is MISSING.
        line: the list item that it is of, after items were paired, e.g. "line_items[0]"; None outside lists.
    """

    field: str
    gold: Any
    found: Any
    place: str | None = None
    line: str | None = None

    @property
    def exact(self) -> bool:
        return self.gold is not MISSING and same(self.gold, self.found)

    @property
    def normalised(self) -> bool:
        return self.gold is not MISSING and self.found is not MISSING and same_normalised(self.gold, self.found)

    @property
    def similarity(self) -> float:
        """1 where both mean the same, else of texts 1 - edits / length, and 0 where that is below 0.5.

        That is the similarity of ANLS, case and white space aside (Biten et al. 2019, "Scene Text Visual Question
        Answering").
        """
        if self.normalised:
            return 1.0
        if not isinstance(self.gold, str) or not isinstance(self.found, str):
            return 0.0
        gold, found = (" ".join(text.casefold().split()) for text in (self.gold, self.found))
        likeness = 1 - edlib.align(gold, found, task="distance")["editDistance"] / max(len(gold), len(found), 1)
        return likeness if likeness >= LEAST_LIKENESS else 0.0


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
        places = (at for at, _ in leaves(found, place))
        return [_leaf(at, leaf, MISSING, at) for at, leaf in leaves(gold, path)] + [
            _leaf(at, MISSING, leaf, there) for (at, leaf), there in zip(leaves(found, path), places, strict=True)
        ]
    gold, found = (MISSING if value == "" else value for value in (gold, found))
    if gold is found is MISSING:
        return []
    return [_leaf(path, gold, found, place)]


def _leaf(path: Path, gold: Any, found: Any, place: Path) -> Leaf:
    items = [end for end, part in enumerate(path, start=1) if isinstance(part, int)]
    line = path_name(path[: items[-1]]) if items else None
    return Leaf(path_name(path, False), gold, found, None if found is MISSING else path_name(place), line)


def _pair_items(gold: list, found: list) -> list[tuple[Any, Any, int]]:
    """Items paired for the most agreeing leaves (an assignment problem), the others with None.

    With each pair comes the place of its second item in `found`, 0 where there is none.
    """
    if gold == found:
        return list(zip(gold, found, range(len(found)), strict=True))
    from scipy.optimize import linear_sum_assignment  # half a second, which commands that never compare lists save

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
    return "".join(gold.split()) == "".join(found.split()) or (date(gold) is not None and date(gold) == date(found))


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


def counts(rows: Sequence[Sequence[Leaf]], agreement: Callable[[Leaf], float]) -> np.ndarray:
    """[rows, 3]: for each document how many leaves agree, were found, and should be found.

    Args:
        agreement: of a leaf, between 0 and 1, such as `Leaf.exact`.
    """
    return np.array(
        [
            [
                sum(map(agreement, row)),
                sum(leaf.found is not MISSING for leaf in row),
                sum(leaf.gold is not MISSING for leaf in row),
            ]
            for row in rows
        ],
        dtype=np.float64,
    ).reshape(-1, 3)


def line_counts(rows: Sequence[Sequence[Leaf]], agreement: Callable[[Leaf], float]) -> dict[str, np.ndarray]:
    """`counts` of the items of each list, by its name, e.g. "line_items[]": an item agrees where all its leaves do."""
    names = dict.fromkeys(list_name(leaf.line) for row in rows for leaf in row if leaf.line)
    found = {name: np.zeros((len(rows), 3)) for name in names}
    for number, row in enumerate(rows):
        lines: dict[str, list[Leaf]] = {}
        for leaf in row:
            if leaf.line:
                lines.setdefault(leaf.line, []).append(leaf)
        for line, members in lines.items():
            sides = [any(getattr(leaf, side) is not MISSING for leaf in members) for side in ("found", "gold")]
            found[list_name(line)][number] += [all(map(agreement, members)), *sides]
    return found


def list_name(line: str) -> str:
    """ "line_items[0]" as "line_items[]"."""
    return re.sub(r"\[\d+\]", "[]", line)
