"""The way from an unfinished JSON document to the end of one, under a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from llguidance import LLMatcher

from common.generation.pattern_example import example

MAX_CLOSING = 4096  # bytes after which a search is given up
QUOTE, BACKSLASH = b'"\\'


def _bits(text: Iterable[int]) -> int:
    """A set of bytes as a number, one bit for each, as the masks of a matcher are."""
    return sum(1 << byte for byte in text)


# What ends a document soonest, outside strings: the end of a container comes before what would add to it.
STRUCTURE = [_bits(group) for group in (b"}", b"]", b",", b"0123456789", b"n", b"t", b"f", b'"', b"[", b"{", b"-.eE")]
PLAIN, ANY = _bits(set(range(0x20, 0x7F)) - {BACKSLASH}), (1 << 256) - 1


@dataclass
class Scanner:
    """Where a JSON text stands.

    Attributes:
        in_string: inside a string.
        length: characters so far of the string or number that is open, else 0.
        exponent: inside the exponent of a number.
        commas: of each open container, outermost first.
        key: what there is so far of the name of a property, where one is being written.
    """

    in_string: bool = False
    length: int = 0
    exponent: bool = False
    commas: list[int] = field(default_factory=list)
    key: bytes | None = None
    _escaped: bool = False
    _names: list[frozenset[bytes] | None] = field(default_factory=list)  # in each open container; None for a list
    _key_next: bool = False

    def copy(self) -> Scanner:
        """The same place in the same text, to go on from apart."""
        return Scanner(
            self.in_string,
            self.length,
            self.exponent,
            self.commas.copy(),
            self.key,
            self._escaped,
            self._names.copy(),
            self._key_next,
        )

    @property
    def repetition(self) -> bytes | None:
        """What would give a name for the second time, if it came next; the grammar does not see to that."""
        if self.key is not None and self.key in self._names[-1]:
            return b'"'
        return b'""' if self._key_next and b"" in self._names[-1] else None

    def feed(self, text: bytes) -> None:
        """Go on by more of the text."""
        for byte in text:
            if self.in_string:
                self._feed_string(byte)
            else:
                self._feed_structure(chr(byte))

    def _feed_string(self, byte: int) -> None:
        if byte == QUOTE and not self._escaped:
            if self.key is not None:
                self._names[-1] |= {self.key}
            self.in_string, self.length, self.key = False, 0, None
            return
        self._escaped = byte == BACKSLASH and not self._escaped
        self.length += byte & 0xC0 != 0x80  # a character in UTF-8 has one byte that is not of this kind
        if self.key is not None:
            self.key += bytes([byte])

    def _feed_structure(self, character: str) -> None:
        in_number = character in "0123456789+-.eE" and (self.length > 0 or character in "-0123456789")
        self.length = self.length + 1 if in_number else 0
        self.exponent = in_number and (self.exponent or character in "eE")
        if character == '"':
            self.in_string = True
            self.key = b"" if self._key_next else None
            self._key_next = False
        elif character in "{[":
            self.commas.append(0)
            self._names.append(frozenset() if character == "{" else None)
            self._key_next = character == "{"
        elif character in "}]":
            self.commas.pop()
            self._names.pop()
            self._key_next = False
        elif character == ",":
            self.commas[-1] += 1
            self._key_next = self._names[-1] is not None


@dataclass(frozen=True)
class Hints:
    """What helps to find the end of a string.

    Attributes:
        required: names of required properties as they stand in JSON: where a name is begun, one of these is taken,
            which passes over optional properties.
        matches: strings that match the schema's patterns, as they stand in JSON, each with its closing quote.
    """

    required: tuple[bytes, ...] = ()
    matches: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, required: Iterable[str], patterns: Iterable[str]) -> Hints:
        """For the names and patterns in a schema."""

        def unquoted(text: str) -> bytes:
            return json.dumps(text, ensure_ascii=False)[1:-1].encode()

        matches = (unquoted(example(pattern, MAX_CLOSING)) + b'"' for pattern in dict.fromkeys(patterns))
        return cls(tuple(unquoted(name) for name in dict.fromkeys(required)), tuple(matches))


def find_closing(matcher: LLMatcher, scanner: Scanner, hints: Hints) -> bytes | None:
    """Bytes that complete the document, chosen greedily to be few; None where the search does not end.

    Args:
        matcher: over `json_schema.byte_tokenizer`; left as it is.
        scanner: of the same text; left as it is.
    """
    for vary in (True, False):  # what a pattern asks for is found by new characters, or by the same one again
        closing = _search(matcher.deep_copy(), scanner.copy(), hints, vary)
        if closing is not None:
            return closing
    return None


def _search(matcher: LLMatcher, scanner: Scanner, hints: Hints, vary: bool) -> bytes | None:
    closing = bytearray()
    used = 0  # the bytes of the string or number that is open, where they are to vary
    while not matcher.is_accepting():
        step = matcher.compute_ff_bytes() or _next_bytes(matcher, scanner, hints, used)
        if not step or len(closing) > MAX_CLOSING or not matcher.consume_tokens(list(step)):
            return None
        scanner.feed(step)
        closing += step
        used = used | 1 << step[-1] if vary and scanner.length else 0
    return bytes(closing)


def _next_bytes(matcher: LLMatcher, scanner: Scanner, hints: Hints, used: int) -> bytes:
    """What the grammar lets through next and leads to an end; nothing where there is no such."""
    allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ANY
    if not scanner.in_string:
        return _lowest(next((allowed & group for group in STRUCTURE if allowed & group), 0), used)
    if scanner.repetition:
        allowed &= ~(1 << QUOTE)
    if allowed >> QUOTE & 1:
        return b'"'
    if scanner.key is not None:
        for name in hints.required:
            if name.startswith(scanner.key) and len(name) > len(scanner.key) and allowed >> name[len(scanner.key)] & 1:
                return name[len(scanner.key) : len(scanner.key) + 1]
    for match in hints.matches:
        for start in range(len(match) - 1):  # the string may have been begun already
            if allowed >> match[start] & 1 and matcher.validate_tokens(list(match[start:])) == len(match) - start:
                return match[start:]
    return _lowest(allowed & PLAIN or allowed, used)


def _lowest(allowed: int, used: int) -> bytes:
    """The first byte of a set, preferably of those that have not been used."""
    choice = allowed & ~used or allowed
    return bytes([(choice & -choice).bit_length() - 1]) if choice else b""
