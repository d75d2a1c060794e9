"""What a model has written, for processes that need no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer without special tokens and without the thinking before it.
        tokens: the token ids of all that was written, without the one that ended it.
        logprobs: log-probability of each token in nats, the model's own (before masks, temperature and top_p).
        finished: it ended by itself or by `stop`, not because the token budget was used up.
        cut: it would have gone on: the budget was used up, or a grammar closed it before it was, or where it ran on.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: bool
    cut: bool = False


# In quotes it is a part of some code.
THINKING_ENDS = re.compile(r"(?<![\"'`])</think(?:ing)?>(?![\"'`])", re.IGNORECASE)
THINKING_BEGINS = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)


def final_answer(text: str) -> str:
    """What a model answers behind its thinking, which ends at the last `</think>`; "" while it still thinks.

    The first `<think>` may stand in the prompt, and a draft of the answer in the thinking.
    """
    *thoughts, answer = THINKING_ENDS.split(text)
    if THINKING_BEGINS.match(answer):
        return ""
    return answer.lstrip() if thoughts else answer


class AnswerStream:
    """A growing text less the thinking before it, piece by piece. Thinking has to begin with its tag to be seen."""

    def __init__(self) -> None:
        self.text = self.shown = ""

    def feed(self, piece: str, *, end: bool = False) -> str:
        """What more of the answer there is with this piece of the text, "" where that cannot be told yet."""
        self.text += piece
        beginning = self.text.lstrip().lower()
        if not end and ("<think>".startswith(beginning) or "<thinking>".startswith(beginning)):
            return ""
        answer = final_answer(self.text)
        more = answer.removeprefix(self.shown)
        self.shown = answer
        return more
