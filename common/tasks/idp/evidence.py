"""Where the values of an answer stand in its document.

A value is aligned with the text (see `alignment`). Where it stands there more than once, what stands around decides:
the name of its field before it, or above it in a table, and the other values of the same list item. What cannot be
decided so is the first place that no other value has taken.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import edlib

from common.tasks.idp.alignment import Haystack, Match
from common.tasks.idp.documents import Box, Document
from common.tasks.idp.field_metrics import Path, leaves, path_name

LABEL_REACH = 60  # characters before a value, on its line, that may name its field
LINES_ABOVE = 12  # in which a table's heading may stand
LABEL, ITEM, TAKEN = 2.0, 3.0, 1.0  # weights: a whole label, the same line as the item's other values, a place taken
LIKENESS = 0.7  # that a word, or a part of it, must have with one of a field's name to be its label
NEARLY, WITHIN = 0.9, 0.7  # what a like word counts, and a part of a word that is like it


@dataclass(frozen=True)
class Evidence:
    """Where a value stands.

    Attributes:
        start, end: its characters in the document's text; None where it was not found.
        text: what stands there.
        how: see `alignment.Match`.
        boxes: (page, box) of each line of it, where the document has boxes.
    """

    start: int | None = None
    end: int | None = None
    text: str = ""
    how: str = ""
    boxes: tuple[tuple[int, Box], ...] = ()

    @property
    def located(self) -> bool:
        return self.start is not None

    def to_json(self) -> dict[str, Any]:
        """{"found", "start", "end", "text", "match"[, "boxes": [{"page", "box"}]]}, or {"found": false}."""
        if not self.located:
            return {"found": False}
        facts = {"found": True, "start": self.start, "end": self.end, "text": self.text, "match": self.how}
        boxes = [{"page": page, "box": [round(edge, 2) for edge in box]} for page, box in self.boxes]
        return facts | ({"boxes": boxes} if boxes else {})


def locate(document: Document, value: Any) -> dict[str, Evidence]:
    """Where every leaf of a JSON value stands in a document, by its path, e.g. "line_items[0].qty".

    Args:
        value: best with the values as the document writes them.
    """
    haystack = Haystack(document.text)
    candidates = {path: _candidates(haystack, leaf) for path, leaf in leaves(value)}
    chosen = _Chooser(document.text).choose(candidates)
    return {path_name(path): _evidence(document, chosen[path]) if path in chosen else Evidence() for path in candidates}


def shown(document: Document, value: Any) -> dict[str, Any]:
    """What `locate` finds, ready for JSON."""
    return {name: evidence.to_json() for name, evidence in locate(document, value).items()}


def stands(haystack: Haystack, leaf: Any) -> bool:
    """Whether a leaf stands anywhere in a text; true and false, which are no text, do."""
    return isinstance(leaf, bool) or bool(_candidates(haystack, leaf))


def _candidates(haystack: Haystack, leaf: Any) -> list[Match]:
    if isinstance(leaf, bool):
        return []
    return haystack.find(leaf) if isinstance(leaf, str) else haystack.find_number(leaf)


def _evidence(document: Document, match: Match) -> Evidence:
    boxes = boxes_of(document, match.start, match.end)
    return Evidence(match.start, match.end, document.text[match.start : match.end], match.how, boxes)


def boxes_of(document: Document, start: int, end: int) -> tuple[tuple[int, Box], ...]:
    """(page, box) of what has a character of text[start:end]; segments on one line of the text are one box."""
    segments = document.segments
    first = bisect_right(segments, start, key=lambda segment: segment.end)
    last = bisect_left(segments, end, key=lambda segment: segment.start)
    boxes: list[tuple[int, Box]] = []
    line_end = -1
    for segment in segments[first:last]:
        if segment.start < line_end and boxes[-1][0] == segment.page:
            corners = zip((min, min, max, max), boxes[-1][1], segment.box, strict=True)
            boxes[-1] = segment.page, tuple(outer(one, other) for outer, one, other in corners)
        else:
            boxes.append((segment.page, segment.box))
            line_end = document.text.find("\n", segment.start) % (len(document.text) + 1)
    return tuple(boxes)


class _Chooser:
    """Takes the likeliest place of each value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]  # of the lines
        self.labels: dict[tuple[str, int], float] = {}

    def line_of(self, index: int) -> int:
        return bisect_right(self.starts, index) - 1

    def choose(self, candidates: dict[Path, list[Match]]) -> dict[Path, Match]:
        """The place of each value that has any; those with the fewest first, so that others can stand beside them."""
        chosen: dict[Path, Match] = {}
        for path in sorted(candidates, key=lambda path: len(candidates[path])):  # stable: in order among equals
            if places := candidates[path]:
                beside = self._beside(path, chosen)
                taken = {match.start for match in chosen.values()}
                likelihoods = [self._likelihood(match, path, beside, taken) for match in places]
                chosen[path] = places[likelihoods.index(max(likelihoods))]
        return chosen

    def _beside(self, path: Path, chosen: dict[Path, Match]) -> list[int]:
        """The lines of the values of the same list item that are chosen."""
        item = _item(path)
        return [self.line_of(match.start) for other, match in chosen.items() if item and _item(other) == item]

    def _likelihood(self, match: Match, path: Path, beside: list[int], taken: set[int]) -> float:
        line = self.line_of(match.start)
        near = max((1 / (1 + abs(line - other)) for other in beside), default=0.0)
        return LABEL * self._label(path, match) + ITEM * near - TAKEN * (match.start in taken)

    def _label(self, path: Path, match: Match) -> float:
        """How well the words before a place, or above it, name the field: 0 to 1."""
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        key = name, match.start
        if key not in self.labels:
            wanted = words_of(name)
            line = self.line_of(match.start)
            before = words_of(self.text[max(self.starts[line], match.start - LABEL_REACH) : match.start])
            weights = [(word, 1 / (1 + 0.1 * distance)) for distance, word in enumerate(reversed(before))]
            weights += [(word, 0.5) for word in self._above(line, match)]
            best = [
                max((alike(wanted_word, word) * weight for word, weight in weights), default=0.0)
                for wanted_word in wanted
            ]
            self.labels[key] = sum(best) / len(best) if best else 0.0
        return self.labels[key]

    def _above(self, line: int, match: Match) -> list[str]:
        """Words in the same columns of the lines above."""
        column = match.start - self.starts[line]
        words = []
        for above in range(max(0, line - LINES_ABOVE), line):
            start, end = self.starts[above], self.starts[above + 1] - 1
            first = min(end, start + column)
            last = min(end, first + match.end - match.start)
            while first > start and not self.text[first - 1].isspace():
                first -= 1
            while last < end and not self.text[last].isspace():
                last += 1
            words += words_of(self.text[first:last])
        return words


def _item(path: Path) -> Path:
    """The path of the list item that a leaf belongs to; () for a leaf of none."""
    last = max((index for index, part in enumerate(path) if isinstance(part, int)), default=-1)
    return path[: last + 1]


def words_of(name: str) -> list[str]:
    """The words of a text or of a field's name, "invoiceNumber" and "invoice_number" alike."""
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())


def alike(wanted: str, word: str) -> float:
    """How like a field's word another is, 0 to 1: "total" and "totaal" more than "total" and "subtotaal"."""
    if wanted == word:
        return 1.0
    if min(len(wanted), len(word)) < 3:
        return 0.0
    short, long = sorted((wanted, word), key=len)
    if len(set(short)) > 200 or len(set(short + long)) > 255:
        return 0.0
    within = 1 - edlib.align(short, long, mode="HW")["editDistance"] / len(short)
    if within < LIKENESS:
        return 0.0
    return max(WITHIN * within, NEARLY * (1 - edlib.align(short, long)["editDistance"] / len(long)))
