"""What a model has written, for processes that need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer without special tokens and without the thinking before it.
        tokens: the token ids of all that was written, without the one that ended it.
        logprobs: log-probability of each token in nats, the model's own (before masks, temperature and top_p).
        finished: it ended by itself or by `stop`, not because the token budget was used up.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: bool


def final_answer(text: str) -> str:
    """What a model answers behind its thinking, which ends at the last `</think>`; "" while it still thinks.

    The first `<think>` may stand in the prompt, and a draft of the answer in the thinking.
    """
    _, ended, answer = text.rpartition("</think>")
    if answer.lstrip().startswith("<think>"):
        return ""
    return answer.lstrip() if ended else answer
