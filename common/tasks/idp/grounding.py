"""Are the places that are given for values the right ones? Boxes against boxes, as F1.

The true boxes of a field are those of the lines that write its true value: the run of words of the document that agrees
best with the value's words, letters and digits only, and the lines which that run touches. It is found by counting
words, not by the alignment that it judges. Runs that agree equally well are alternatives, of which the one that is
nearest to the answer counts; but an amount that stands in rows that name its field (TOTAL 9.00, then CASH 9.00) has its
alternatives among these rows alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.evaluation.bootstrap import ratio_interval
from common.tasks.idp.alignment import readings
from common.tasks.idp.documents import Box, Document, of_row
from common.tasks.idp.evidence import WITHIN, Evidence, alike, boxes_of, locate, words_of
from common.tasks.idp.field_metrics import leaves, path_name

PlacedBox = tuple[int, Box]  # page, box
WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
LEAST_AGREEMENT = 0.5  # F1 of words, below which a value does not stand in the document
LEAST_OVERLAP = 0.5  # intersection over union of two boxes that are the same


@dataclass(frozen=True)
class Grounded:
    """One field's boxes: how many are right, were given, and should be given."""

    field: str
    right: int
    given: int
    true: int


def measure(
    rows: Sequence[dict], values: Sequence[Any], groups: Sequence[str], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Grounding F1 of answers to documents, over the boxes of "all" fields and of each, with its interval.

    F1 = 2 right / (given + true), where a box is right that overlaps a true one of its field by half (intersection over
    union).

    Args:
        rows: {"document", "fields", "lines"}; a row without "lines" has no boxes and does not count.
        values: the answers, with the values as they are written where that is known.
        groups: of the rows, for the cluster bootstrap.
    """
    judged = []
    for row, value in zip(rows, values, strict=True):
        document = of_row(row)
        judged.append(judge(document, row["fields"], locate(document, value)) if document.segments else [])
    fields = dict.fromkeys(grounded.field for row in judged for grounded in row)
    return {
        name: ratio_interval(
            np.array([_f1_parts([grounded for grounded in row if name in ("all", grounded.field)]) for row in judged]),
            groups,
            seed,
        )
        for name in ("all", *fields)
    }


def _f1_parts(judged: Sequence[Grounded]) -> tuple[int, int]:
    return 2 * sum(grounded.right for grounded in judged), sum(grounded.given + grounded.true for grounded in judged)


def judge(document: Document, gold: Any, evidence: dict[str, Evidence]) -> list[Grounded]:
    """The boxes of every field of a true answer or of a given one; fields are of the same path."""
    golds = {path_name(path): true_boxes(document, leaf, path_name(path, False)) for path, leaf in leaves(gold)}
    return [
        _grounded(re.sub(r"\[\d+\]", "[]", name), golds.get(name, []), evidence[name].boxes if name in evidence else ())
        for name in dict.fromkeys([*golds, *evidence])
    ]


def _grounded(field: str, alternatives: Sequence[tuple[PlacedBox, ...]], given: Sequence[PlacedBox]) -> Grounded:
    judged = [Grounded(field, overlapping(true, given), len(given), len(true)) for true in alternatives or [()]]
    return max(
        judged, key=lambda grounded: (2 * grounded.right / max(1, grounded.given + grounded.true), -grounded.true)
    )


def overlapping(true: Sequence[PlacedBox], given: Sequence[PlacedBox]) -> int:
    """How many given boxes are true ones, each true one counted once."""
    left, right = list(true), 0
    for page, box in given:
        same = next((other for other in left if other[0] == page and overlap(other[1], box) >= LEAST_OVERLAP), None)
        if same is not None:
            left.remove(same)
            right += 1
    return right


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / area if area > 0 else float(one == other)


def true_boxes(document: Document, value: Any, field: str) -> list[tuple[PlacedBox, ...]]:
    """The alternatives of a true value's boxes (see above); none where it does not stand in the document."""
    text = document.text
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        runs = [match.span() for match in WORD.finditer(text) if _means(match.group(), value)]
    else:
        runs = _best_runs(text, str(value))
    if isinstance(value, int | float) or re.fullmatch(r"\D{0,3}[\d.,]+", value):
        runs = [run for run in runs if _row_names(text, run[0], field)] or runs
    alternatives = (boxes_of(document, *run) for run in runs)
    return list(dict.fromkeys(boxes for boxes in alternatives if boxes))


def _means(word: str, value: float) -> bool:
    return word[0].isdigit() and any(
        abs(reading - abs(value)) < 1e-9 * max(1, abs(value)) for reading in readings(word)
    )


def _best_runs(text: str, value: str) -> list[tuple[int, int]]:
    """The runs of words that agree best with a value's, as F1 of the words that both have."""
    wanted = Counter(word.casefold() for word in WORD.findall(value))
    words = [(match.group().casefold(), *match.span()) for match in WORD.finditer(text)]
    size = sum(wanted.values())
    best, runs = LEAST_AGREEMENT, []
    for first, (word, start, _) in enumerate(words):
        if word not in wanted:
            continue
        left, hits = wanted.copy(), 0
        for count, (following, _, end) in enumerate(words[first : first + 2 * size], start=1):
            if left[following] <= 0:
                continue
            left[following] -= 1
            hits += 1
            agreement = 2 * hits / (size + count)
            if agreement > best:
                best, runs = agreement, []
            if agreement == best:
                runs.append((start, end))
    return runs


def _row_names(text: str, start: int, field: str) -> bool:
    """Does the line before a place have a word of the field's name?"""
    before = words_of(text[text.rfind("\n", 0, start) + 1 : start])
    return any(alike(wanted, word) >= WITHIN for wanted in words_of(field) for word in before)
