"""Documents longer than a model can read: cut in pieces that fit, and the answers to them merged by confidence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.tasks.idp.field_metrics import path_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.generation.result import Generation

OVERLAP = 200  # characters that two pieces of a long document share, so that a line item is whole in one of them


def pieces(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The document in as few halvings as make every piece fit."""
    return [text] if fits(text) else [piece for half in halves(text) for piece in pieces(half, fits)]


def halves(text: str) -> tuple[str, str]:
    """A document cut near its middle, after a line if there is one, some lines before the cut being in both halves.

    Both are shorter than the document, which must have two characters.
    """
    middle = len(text) // 2
    reach = len(text) // 4
    cut = text.rfind("\n", middle - reach, middle) + 1
    if not cut:  # one long line
        cut = text.rfind(" ", middle - reach, middle) + 1 or middle
    start = text.find("\n", max(1, cut - min(OVERLAP, reach)) - 1, cut) + 1
    return text[:cut], text[start or cut :]


@dataclass(frozen=True)
class Scored:
    """A leaf of an answer, and the mean probability of its tokens."""

    value: Any
    confidence: float


def merge(parts: Sequence[Any]) -> Any:
    """The answers to the pieces of one document as one; trees of dicts, lists and `Scored` leaves, as `scored` makes.

    Of a leaf the one that the model was surest of is taken, an empty one only where there is no other. Lists are
    joined, without the items that a list starts with and the one before it ended with (pieces overlap).
    """
    parts = [part for part in parts if not _empty(part)] or list(parts[:1])
    if all(isinstance(part, dict) for part in parts):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: merge([part[key] for part in parts if key in part]) for key in keys}
    if all(isinstance(part, list) for part in parts):
        joined: list = []
        for part in parts:
            shared = range(min(len(joined), len(part)), 0, -1)
            repeated = next((n for n in shared if plain(joined[-n:]) == plain(part[:n])), 0)
            joined += part[repeated:]
        return joined
    return max(parts, key=lambda part: min(confidences(part).values(), default=0.0))


def _empty(part: Any) -> bool:
    return plain(part) in (None, "", [], {})


def plain(part: Any) -> Any:
    """A tree with the values of its `Scored` leaves."""
    if isinstance(part, dict):
        return {key: plain(member) for key, member in part.items()}
    return [plain(item) for item in part] if isinstance(part, list) else part.value


def confidences(part: Any, path: tuple[str | int, ...] = ()) -> dict[str, float]:
    """The confidence of every leaf of a tree by its path, e.g. "line_items[0].qty"."""
    if isinstance(part, Scored):
        return {path_name(path): part.confidence}
    members = part.items() if isinstance(part, dict) else enumerate(part)
    return {name: value for key, member in members for name, value in confidences(member, (*path, key)).items()}


# Confidence.


def scored(answer: Generation, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The JSON of an answer as dicts, lists and `Scored` leaves."""
    ends = []  # for each token, the character that it ends before
    for count in range(1, len(answer.tokens) + 1):
        known = tokenizer.decode(answer.tokens[:count], skip_special_tokens=True)
        ends.append(len(known.rstrip("\ufffd")))  # half of a character
    starts = [0, *ends]

    def confidence(start: int, end: int) -> float:
        spans = zip(starts, ends, answer.logprobs, strict=False)
        own = [math.exp(logprob) for first, last, logprob in spans if first < end and last > start]
        return sum(own) / len(own) if own else 0.0

    return parse_scored(answer.text, confidence)


def parse_scored(text: str, confidence: Callable[[int, int], float]) -> Any:
    """JSON text as dicts, lists and `Scored` leaves; `confidence(start, end)` is asked of a leaf's characters."""
    decode = json.JSONDecoder().raw_decode

    def skip(index: int, extra: str = "") -> int:
        while text[index] in " \t\n\r" + extra:
            index += 1
        return index

    def read(index: int) -> tuple[Any, int]:
        if text[index] == "{":
            members: dict[str, Any] = {}
            index = skip(index + 1)
            while text[index] != "}":
                key, index = decode(text, index)
                members[key], index = read(skip(index, ":"))
                index = skip(index, ",")
            return members, index + 1
        if text[index] == "[":
            items: list = []
            index = skip(index + 1)
            while text[index] != "]":
                item, index = read(index)
                items.append(item)
                index = skip(index, ",")
            return items, index + 1
        value, end = decode(text, index)
        return Scored(value, confidence(index, end)), end

    return read(skip(0))[0]
