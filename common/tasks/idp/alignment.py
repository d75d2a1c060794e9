"""Where a value stands in a text: as it is written, then white space and case aside, then by edit distance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import edlib

from common.tasks.idp import dates

MOST_PLACES = 2000  # of one value: "1" stands everywhere
SHORTEST_NEAR = 5  # characters that a value must have to be found with edits; fewer say too little
EDITS = 0.3  # of its characters
NUMERAL = re.compile(r"\d{1,3}(?:[ \u00a0\u202f'’]\d{3})+(?:[.,]\d+)?|\d+(?:[.,'’]\d+)*")
SPACELESS = re.compile(r"\d+(?:[.,'’]\d+)*")  # "Cable 2 150.00" has a 2 and a 150, where it does not have 2,150


@dataclass(frozen=True)
class Match:
    """A place of a value.

    Attributes:
        start, end: its characters, text[start:end].
        how: "exact", "folded" (white space and case aside), "read" (a number or a date that is written in another way)
            or "near".
        edits: characters that differ, of a near one.
    """

    start: int
    end: int
    how: str
    edits: int = 0


class Haystack:
    """A text that values are sought in."""

    def __init__(self, text: str) -> None:
        self.text = text
        folded, self._offsets = [], []
        for index, character in enumerate(text):
            if not character.isspace():
                for letter in character.casefold():
                    folded.append(letter)
                    self._offsets.append(index)
        self._folded = "".join(folded)

    def find(self, value: str) -> list[Match]:
        """Every place of a text, by the first way that finds any; none where it does not stand there."""
        value = value.strip()
        if not value:
            return []
        exact = [Match(start, start + len(value), "exact") for start in _occurrences(self.text, value)]
        needle = fold(value)
        folded = (self._match(start, len(needle), "folded") for start in _occurrences(self._folded, needle))
        return self._whole(exact) or self._whole(list(folded)) or exact or self._otherwise(value, needle)

    def _otherwise(self, value: str, needle: str) -> list[Match]:
        """Places of a value that does not stand there as it is. Of figures no digit may differ: it is another value."""
        if NUMERAL.fullmatch(value):
            return [match for number in readings(value) for match in self.find_number(number)]
        if date := dates.whole(value):
            return self._find_date(date)
        if 2 * sum(character.isalpha() for character in needle) > len(needle):
            return self._near(needle)
        parts = re.findall(r"\w+", value)
        if len("".join(parts)) < SHORTEST_NEAR:
            return []
        matches = re.finditer(r"[^\w\n]{1,3}".join(map(re.escape, parts)), self.text, re.IGNORECASE)
        return self._whole([Match(match.start(), match.end(), "near") for match in matches][:MOST_PLACES])

    def find_number(self, value: float) -> list[Match]:
        """Every place of a number, whichever way its decimals and thousands are written; none of one beyond floats."""
        try:
            sought = abs(float(value))
        except OverflowError:
            return []
        places = {
            match.span()
            for form in (NUMERAL, SPACELESS)
            for match in form.finditer(self.text)
            if any(abs(reading - sought) < 1e-9 * max(1.0, sought) for reading in readings(match[0]))
        }
        return [Match(*place, "read") for place in sorted(places)[:MOST_PLACES]]

    def _find_date(self, wanted: dates.FoundDate) -> list[Match]:
        """Every place of a date, whichever way it is written; where its numbers could change places, either way."""
        alike = [date for date in self._dates if date.meanings & wanted.meanings]
        return [Match(date.start, date.end, "read") for date in alike][:MOST_PLACES]

    @cached_property
    def _dates(self) -> list[dates.FoundDate]:
        return dates.find(self.text)

    def _match(self, start: int, length: int, how: str, edits: int = 0) -> Match:
        return Match(self._offsets[start], self._offsets[start + length - 1] + 1, how, edits)

    def _whole(self, matches: list[Match]) -> list[Match]:
        """Those that do not begin or end within a word or a number."""
        return [match for match in matches if not (self._torn(match.start) or self._torn(match.end))]

    def _torn(self, index: int) -> bool:
        before, after = self.text[max(0, index - 2) : index], self.text[index : index + 2]
        if before[-1:].isalpha() and after[:1].isalpha():
            return True
        if re.search(r"\d$", before) and re.match(r"[.,]?\d", after):
            return True
        return bool(re.search(r"\d[.,]$", before) and re.match(r"\d", after))

    def _near(self, needle: str) -> list[Match]:
        allowed = int(len(needle) * EDITS)
        if len(needle) < SHORTEST_NEAR or not allowed:
            return []
        alphabet = set(needle)
        if len(alphabet) > 255:  # more than the aligner takes; no field has so many
            return []
        other = next(chr(code) for code in range(256) if chr(code) not in alphabet)
        haystack = "".join(character if character in alphabet else other for character in self._folded)
        alignment = edlib.align(needle, haystack, mode="HW", task="distance", k=allowed)
        edits = alignment["editDistance"]
        if edits < 0:
            return []
        ends = [end for _, end in alignment["locations"] if end >= 0][:MOST_PLACES]
        starts = (_start(needle, haystack, end, edits) for end in ends)
        return _apart([self._match(start, end - start + 1, "near", edits)
                       for start, end in zip(starts, ends, strict=True) if end >= start])  # fmt: skip


def _start(needle: str, haystack: str, end: int, edits: int) -> int:
    """Where a place begins that ends with haystack[end]: the aligner's own answer, which it works out for every place.

    There can be as many as the haystack has characters, and then that takes hours.
    """
    reach = haystack[max(0, end + 1 - len(needle) - edits) : end + 1]
    back = edlib.align(needle[::-1], reach[::-1], mode="SHW", task="distance", k=edits)
    return end - back["locations"][-1][1]


def fold(text: str) -> str:
    """A text without white space and case."""
    return "".join(text.split()).casefold()


def readings(numeral: str) -> set[float]:
    """What a numeral may mean: "1.234" is 1234 where the point groups thousands, and 1.234 where it is a decimal's."""
    parts = re.split(r"[ \u00a0\u202f'’.,]", numeral)
    meanings = set()
    indian = "," in numeral and len(parts[-1]) == 3 and all(len(part) == 2 for part in parts[1:-1])  # 12,34,567
    if indian or all(len(part) == 3 for part in parts[1:]):
        meanings.add(float("".join(parts)))
    if len(parts) > 1 and numeral[-len(parts[-1]) - 1] in ".,":
        meanings.add(float(f"{''.join(parts[:-1])}.{parts[-1]}"))
    return meanings


def _occurrences(text: str, part: str) -> Iterator[int]:
    start = text.find(part) if part else -1
    count = 0
    while start >= 0 and count < MOST_PLACES:
        yield start
        count += 1
        start = text.find(part, start + 1)


def _apart(matches: list[Match]) -> list[Match]:
    """Of places that overlap the shortest, which has no characters that cost as much as they spare."""
    kept: list[Match] = []
    for match in sorted(matches, key=lambda match: (match.start, match.end)):
        if kept and match.start < kept[-1].end:
            kept[-1] = min(kept[-1], match, key=lambda candidate: candidate.end - candidate.start)
        else:
            kept.append(match)
    return kept
