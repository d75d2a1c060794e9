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
from unicodedata import category

import edlib
import numpy as np

from common.tasks.idp import amounts, dates

Path = tuple[str | int, ...]

MISSING = None
LEAST_LIKENESS = 0.5  # of two texts that are taken for the same with a few characters wrong


@dataclass(frozen=True)
class Leaf:
    """One field as it should be and as it was predicted; MISSING (None) where a side has none.

    Attributes:
        field: its name without the numbers of list items, e.g. "line_items[].qty".
        answer_path: where `predicted` stands in the answer, with the numbers of list items; None where it is MISSING.
        line: the list item that it is of, after items were paired, e.g. "line_items[0]"; None outside lists.
    """

    field: str
    gold: Any
    predicted: Any
    answer_path: str | None = None
    line: str | None = None

    @property
    def exact(self) -> bool:
        return self.gold is not MISSING and same(self.gold, self.predicted)

    @property
    def normalised(self) -> bool:
        return self.gold is not MISSING and self.predicted is not MISSING and same_normalised(self.gold, self.predicted)

    @property
    def similarity(self) -> float:
        """1 where both mean the same, else of texts 1 - edits / length, and 0 where that is below 0.5.

        That is the similarity of ANLS, case and white space aside (Biten et al. 2019, "Scene Text Visual Question
        Answering").
        """
        if self.normalised:
            return 1.0
        if not isinstance(self.gold, str) or not isinstance(self.predicted, str):
            return 0.0
        gold, predicted = (" ".join(text.casefold().split()) for text in (self.gold, self.predicted))
        likeness = 1 - edlib.align(gold, predicted, task="distance")["editDistance"] / max(len(gold), len(predicted), 1)
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


def compare(gold: Any, predicted: Any, path: Path = (), answer_path: Path = ()) -> list[Leaf]:
    """Every leaf of both values, paired where both have one at the same place.

    Args:
        path: of the field.
        answer_path: of `predicted` in its answer; differs from `path` in the numbers of list items.
    """
    if isinstance(gold, dict) and isinstance(predicted, dict):
        keys = [*gold, *(key for key in predicted if key not in gold)]
        return [
            leaf
            for key in keys
            for leaf in compare(gold.get(key), predicted.get(key), (*path, key), (*answer_path, key))
        ]
    if isinstance(gold, list) and isinstance(predicted, list):
        pairs = _pair_items(gold, predicted)
        return [
            leaf
            for index, (one, other, number) in enumerate(pairs)
            for leaf in compare(one, other, (*path, index), (*answer_path, number))
        ]
    if isinstance(gold, dict | list) or isinstance(predicted, dict | list):
        answer_paths = (at for at, _ in leaves(predicted, answer_path))
        return [_leaf(at, leaf, MISSING, at) for at, leaf in leaves(gold, path)] + [
            _leaf(at, MISSING, leaf, there)
            for (at, leaf), there in zip(leaves(predicted, path), answer_paths, strict=True)
        ]
    gold, predicted = (MISSING if value == "" else value for value in (gold, predicted))
    if gold is predicted is MISSING:
        return []
    return [_leaf(path, gold, predicted, answer_path)]


def _leaf(path: Path, gold: Any, predicted: Any, answer_path: Path) -> Leaf:
    items = [end for end, part in enumerate(path, start=1) if isinstance(part, int)]
    line = path_name(path[: items[-1]]) if items else None
    return Leaf(path_name(path, False), gold, predicted, None if predicted is MISSING else path_name(answer_path), line)


def _pair_items(gold: list, predicted: list) -> list[tuple[Any, Any, int]]:
    """Items paired for the most agreeing leaves (an assignment problem), the others with None.

    With each pair comes the place of its second item in `predicted`, 0 where there is none.
    """
    if gold == predicted:
        return list(zip(gold, predicted, range(len(predicted)), strict=True))
    from scipy.optimize import linear_sum_assignment  # half a second, which commands that never compare lists save

    agreeing = np.array([[sum(leaf.normalised for leaf in compare(g, p)) for p in predicted] for g in gold], ndmin=2)
    nearness = -1e-6 * np.abs(np.subtract.outer(np.arange(len(gold)), np.arange(len(predicted))))
    rows, columns = linear_sum_assignment((agreeing.reshape(len(gold), len(predicted)) + nearness), maximize=True)
    pairs = [(gold[g], predicted[p], int(p)) for g, p in zip(rows, columns, strict=True)]
    pairs += [(item, None, 0) for index, item in enumerate(gold) if index not in rows]
    return pairs + [(None, item, index) for index, item in enumerate(predicted) if index not in columns]


def same(gold: Any, predicted: Any) -> bool:
    """Equality of JSON leaves: 44.5 is 44.50, but 1 is neither true nor "1"."""
    return type_of(gold) == type_of(predicted) and gold == predicted


def type_of(leaf: Any) -> str:
    """The JSON type of a leaf: "boolean", "number", "string" or "null"."""
    if isinstance(leaf, bool):
        return "boolean"
    return {int: "number", float: "number", str: "string"}.get(type(leaf), "null")


def same_normalised(gold: Any, predicted: Any) -> bool:
    """Equality of what two leaves mean: white space does not count, nor how a date or an amount is written."""
    if same(gold, predicted):
        return True
    if isinstance(gold, bool) or isinstance(predicted, bool):
        return False
    if isinstance(gold, int | float) or (isinstance(gold, str) and re.search(r"\d[.,]\d\d\b", gold)):
        amounts = amount(gold), amount(predicted)
        if None not in amounts:
            if _currencies_differ(str(gold), str(predicted)):
                return False
            return abs(amounts[0] - amounts[1]) < 1e-9 * max(1.0, abs(amounts[0]))
    gold, predicted = str(gold), str(predicted)
    return "".join(gold.split()) == "".join(predicted.split()) or (
        date(gold) is not None and date(gold) == date(predicted)
    )


def _currencies_differ(*texts: str) -> bool:
    """Whether two amounts name two currencies in the same way: by codes, or by signs; € may well be EUR."""
    for kind in (lambda text: {*re.findall(r"[A-Z]{3}", text)}, lambda text: {c for c in text if category(c) == "Sc"}):
        one, other = map(kind, texts)
        if one and other and one != other:
            return True
    return False


def amount(leaf: Any) -> float | None:
    """A number, or text such as "1.234,50 EUR", "(12.00)", "$ 8.20" or "RM31.00", as a number; None for any other text.

    Where nothing else tells, three digits after a comma are thousands, and after a point decimals. A whole number that
    is too large for a float (309 digits or more) is none.
    """
    if not isinstance(leaf, str):
        try:
            return float(leaf)
        except OverflowError:
            return None
    parsed = amounts.whole(leaf)
    return None if parsed is None else float(parsed.readings[-1 if parsed.grouping == "," else 0])


def date(text: str) -> tuple | None:
    """A date, however it is written: (year, month, day), or None when `text` is none.

    Where day and month cannot be told apart (09/01/2019), they stand in the order of the text, marked as such.
    """
    parsed = dates.whole(text)
    if parsed is None:
        return None
    day = parsed.readings[0]
    if len(parsed.readings) > 1:
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
                sum(leaf.predicted is not MISSING for leaf in row),
                sum(leaf.gold is not MISSING for leaf in row),
            ]
            for row in rows
        ],
        dtype=np.float64,
    ).reshape(-1, 3)


def line_counts(rows: Sequence[Sequence[Leaf]], agreement: Callable[[Leaf], float]) -> dict[str, np.ndarray]:
    """`counts` of the items of each list, by its name, e.g. "line_items[]": an item agrees where all its leaves do."""
    names = dict.fromkeys(list_name(leaf.line) for row in rows for leaf in row if leaf.line)
    by_list = {name: np.zeros((len(rows), 3)) for name in names}
    for number, row in enumerate(rows):
        lines: dict[str, list[Leaf]] = {}
        for leaf in row:
            if leaf.line:
                lines.setdefault(leaf.line, []).append(leaf)
        for line, members in lines.items():
            sides = [any(getattr(leaf, side) is not MISSING for leaf in members) for side in ("predicted", "gold")]
            by_list[list_name(line)][number] += [all(map(agreement, members)), *sides]
    return by_list


def list_name(line: str) -> str:
    """ "line_items[0]" as "line_items[]"."""
    return re.sub(r"\[\d+\]", "[]", line)
