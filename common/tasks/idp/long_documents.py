"""Documents longer than a model can read: cut in pieces that fit, and the answers to them merged by confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from common.tasks.idp.confidence import confidences, plain

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


def merge(parts: Sequence[Any]) -> Any:
    """The answers to the pieces of one document as one; trees as `confidence.scored` makes.

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
