"""Words with boxes, of a PDF or a scan, as text that keeps their layout: what stands on one line is one line, and what
stands in one column begins at the same character. Runs of spaces are a token or two, so this costs little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from common.tasks.idp.documents import Box, Document, Segment, clean

SAME_LINE = 0.5  # of the lower of two words' heights, that their middles may differ
BLOCK = 0.9  # of a line's height, the white space above it that begins a block
WIDE = 1.6  # widths of a character that are more than a space


@dataclass(frozen=True)
class Word:
    """A word, or some that stand together, and its box on a page; y grows downwards."""

    text: str
    box: Box

    @property
    def middle(self) -> float:
        return (self.box[1] + self.box[3]) / 2

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]


def compose(pages: Sequence[Sequence[Word]]) -> Document:
    """The words of each page as one text; a blank line stands between blocks, and between pages."""
    parts: list[str] = []
    segments: list[Segment] = []
    length = 0
    for number, page in enumerate(pages, start=1):
        words = [Word(text, word.box) for word in page if (text := clean(word.text).strip())]
        width = median((word.box[2] - word.box[0]) / len(word.text) for word in words) if words else 1.0
        left = min((word.box[0] for word in words), default=0.0)
        bottom = None
        for line in lines_of(words):
            top = min(word.box[1] for word in line)
            height = median(word.height for word in line)
            if parts:
                parts.append("\n\n" if bottom is None or top - bottom > BLOCK * height else "\n")
                length += len(parts[-1])
            text, starts = _line(line, left, width or 1.0)
            segments += [
                Segment(length + start, length + start + len(word.text), number, word.box)
                for word, start in zip(line, starts, strict=True)
            ]
            parts.append(text)
            length += len(text)
            bottom = max(word.box[3] for word in line)
    return Document("".join(parts), tuple(segments))


def lines_of(words: Sequence[Word]) -> list[list[Word]]:
    """Words as lines from the top, each from left to right."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda word: word.middle):
        if lines:
            reach = SAME_LINE * min(word.height, lines[-1][0].height)
            if word.middle - median(member.middle for member in lines[-1]) < reach:
                lines[-1].append(word)
                continue
        lines.append([word])
    return [sorted(line, key=lambda word: word.box[0]) for line in lines]


def _line(words: Sequence[Word], left: float, width: float) -> tuple[str, list[int]]:
    """(text, where each word begins in it); `width` is that of a character, `left` the first column."""
    text, starts, end = "", [], left
    for word in words:
        column = round((word.box[0] - left) / width)
        gap = word.box[0] - end
        spaces = max(1, column - len(text)) if gap > WIDE * width or not starts else 1
        text += " " * (spaces if starts else column)
        starts.append(len(text))
        text += word.text
        end = word.box[2]
    return text, starts
