"""Whether an answer is whole: not ended by the token budget, and without a value that ran on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from common.tasks.idp.field_metrics import leaves, path_name

REPEATS = 3  # times in a row that a text or an item has to stand to count as running on
RUNNING = re.compile(rf"(.{{1,64}}?)\1{{{REPEATS - 1},}}", re.DOTALL)
SHORTEST_RUN = 6  # characters that repeat: "1.1.1.", not "000"


def ran_on(value: Any, document: str) -> list[str]:
    """The fields of an answer that ran on: where the model wrote the same again and again, and the document does not.

    That is text or a number that ends in the same characters `REPEATS` times or more ("1.1.1.1"), and a list whose last
    items are the same and stand less often in the document. White space, case and punctuation of the document aside.

    Args:
        value: the JSON value.
        document: what it was read from.

    Returns:
        Their names, e.g. "total" or "line_items".
    """
    known = _letters(document)
    texts = ((path, str(leaf)) for path, leaf in leaves(value) if not isinstance(leaf, bool))
    repeating = [path_name(path) for path, text in texts if _repeats(text) and _letters(text) not in known]
    return repeating + [path_name(path) for path, items in _lists(value) if _outnumber(items, known)]


def message(budget: int, fields: Sequence[str]) -> str:
    """Why an answer is marked as cut, with the remedy, in a sentence."""
    if fields:
        return f"the answer is cut: {', '.join(fields)} ran on; check what it says there, or train on such documents"
    return f"the answer is cut: it had not ended within {budget} tokens; raise --max_new_tokens"


def _letters(text: str) -> str:
    return "".join(re.findall(r"\w", text.casefold()))


def _repeats(text: str) -> bool:
    """Whether a text ends in a repetition; the last time may be a part of it."""
    for match in RUNNING.finditer(text):
        rest = text[match.end() :]
        if len(match[0]) >= SHORTEST_RUN and match[1].startswith(rest):
            return True
    return False


def _lists(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], list]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [below for key, member in members for below in _lists(member, (*path, key))]
    return [(path, value), *inner] if isinstance(value, list) else inner


def _outnumber(items: list, known: str) -> bool:
    """Whether the last item of a list stands there more often in a row than its rarest text stands in the document."""
    written = [json.dumps(item, sort_keys=True) for item in items]
    times = next((n for n, text in enumerate(reversed(written)) if text != written[-1]), len(written))
    texts = [_letters(str(leaf)) for _, leaf in leaves(items[-1])] if items else []
    return times >= REPEATS and any(known.count(text) < times for text in texts if text)
