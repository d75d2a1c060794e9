"""Documents as text, with the boxes of their words or lines where they are known."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.data import splits

BLANK, WORD = re.compile(r"\s*"), re.compile(r"\S*\s*")
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 from the page's upper left corner


@dataclass(frozen=True)
class Segment:
    """A word or a line of a document's text and where it stands.

    Attributes:
        start, end: its characters, text[start:end].
        page: from 1.
        box: in points of a PDF, in pixels of an image, or in the unit of the row that it came with.
    """

    start: int
    end: int
    page: int
    box: Box


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        text: clean (see `clean`); spans are of its characters.
        segments: its words or lines with their boxes, in the order of the text; none where there are no boxes.
    """

    text: str
    segments: tuple[Segment, ...] = ()


def to_row(document: Document) -> dict[str, Any]:
    """A document as what `of_row` reads."""
    lines = [{"text": document.text[segment.start : segment.end], "box": list(segment.box)}
             | ({"page": segment.page} if segment.page > 1 else {}) for segment in document.segments]  # fmt: skip
    return {"document": document.text} | ({"lines": lines} if lines else {})


def of_row(row: dict) -> Document:
    """The document of a row {"document"[, "lines": [{"text", "box"[, "page"]}]]}, as `row_fault` passes it."""
    text = clean(row["document"])
    return Document(text, place_lines(text, row.get("lines") or ()))


def row_fault(row: dict) -> str | None:
    """Why a row with a "document" cannot be read; None where it can."""
    if not clean(row["document"]).strip():
        return "'document' has no text, only control characters"
    return lines_fault(row)


def lines_fault(row: dict) -> str | None:
    """Why the "lines" of a row are no lines with boxes; None where they are, or there are none."""
    lines = row.get("lines")
    if lines is None:
        return None
    if not isinstance(lines, list):
        return "'lines' must be a list of objects with 'text' and 'box'"
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("text"), str):
            return f"line {number} of 'lines' has no 'text'"
        box, page = line.get("box"), line.get("page", 1)
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(edge) for edge in box):
            return f"the 'box' of line {number} of 'lines' must be four numbers, x0, y0, x1 and y1"
        if not isinstance(page, int) or isinstance(page, bool) or page < 1:
            return f"the 'page' of line {number} of 'lines' must be a whole number from 1"
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float, and JSON, can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def place_lines(text: str, lines: Sequence[dict]) -> tuple[Segment, ...]:
    """Each line with a box, where its text stands in the document's; a line that does not stand there is left out.

    They are the text in order, or the text joins lines that stand side by side, in another order than `lines` has. It
    is then read from the top: the longest line that stands at a place takes it, and of several of the same text the
    uppermost that is left.
    """
    return _in_order(text, lines) or _from_the_top(text, lines)


def _in_order(text: str, lines: Sequence[dict]) -> tuple[Segment, ...]:
    """The lines one after the other with nothing but white space between them; none where they do not stand so."""
    segments, at = [], 0
    for line in lines:
        words = clean(line["text"]).strip()
        at = BLANK.match(text, at).end()
        if not text.startswith(words, at):
            return ()
        if words:
            segments.append(_segment(line, at, words))
        at += len(words)
    return () if text[at:].strip() else tuple(segments)


def _segment(line: dict, start: int, words: str) -> Segment:
    return Segment(start, start + len(words), line.get("page", 1), tuple(line["box"]))


def _from_the_top(text: str, lines: Sequence[dict]) -> tuple[Segment, ...]:
    left: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda line: (line.get("page", 1), line["box"][1], line["box"][0])):
        if words := clean(line["text"]).strip():
            left.setdefault(words, []).append(line)
    by_start: dict[str, list[str]] = {}
    for words in sorted(left, key=len, reverse=True):
        by_start.setdefault(words[0], []).append(words)
    segments, at = [], 0
    while at < len(text):
        fitting = (words for words in by_start.get(text[at], ()) if left[words] and text.startswith(words, at))
        words = next((words for words in fitting if not text[at + len(words) : at + len(words) + 1].strip()), None)
        if words is None:
            at = WORD.match(text, at).end()
            continue
        segments.append(_segment(left[words].pop(0), at, words))
        at = BLANK.match(text, at + len(words)).end()
    return tuple(segments)


def clean(text: str) -> str:
    """Text without control characters and half characters, with plain line ends and no blank space at line ends."""
    text = re.sub(r"\r\n?|[\f\v\x85\u2028\u2029]", "\n", text)
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff]", "", text)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def group_of(text: str) -> str:
    """The group hash of a document: the same for texts that differ in case, punctuation and white space alone."""
    return splits.group_hash(" ".join(re.findall(r"\w+", text.casefold())))
