"""How sure a model is of each field: the probability of the field's own characters, all of them together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.tasks.idp.field_metrics import path_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.generation.result import Generation

DIGITS = 4  # of a confidence that is shown


@dataclass(frozen=True)
class Scored:
    """A leaf of an answer.

    Attributes:
        confidence: between 0 and 1.
        in_text: whether it stands in the text that was read.
    """

    value: Any
    confidence: float
    in_text: bool = True


def scored(answer: Generation, tokenizer: PreTrainedTokenizerBase, calibrate: Callable[[float], float]) -> Any:
    """The JSON of an answer as dicts, lists and `Scored` leaves.

    The confidence of a leaf is the product of the probabilities of its tokens, the model's own, calibrated. Quotes are
    no part of it: the grammar leaves no choice there, which only evens out what differs.

    Args:
        calibrate: what to make of the product.
    """
    ends = []  # for each token, the character that it ends before
    for count in range(1, len(answer.tokens) + 1):
        known = tokenizer.decode(answer.tokens[:count], skip_special_tokens=True)
        ends.append(len(known.rstrip("\ufffd")))  # half of a character
    before = max(ends, default=0) - len(answer.text)  # characters of thinking, which is no part of the text
    ends = [end - before for end in ends]
    starts = [-before, *ends]

    def confidence(start: int, end: int) -> float:
        if answer.text[start] == '"' and end - start > 2:
            start, end = start + 1, end - 1
        spans = zip(starts, ends, answer.logprobs, strict=False)
        own = [logprob for first, last, logprob in spans if first < end and last > start]
        return calibrate(math.exp(math.fsum(own)))

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
