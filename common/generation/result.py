"""What a model has written, for processes that need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        tokens: its token ids, without the one that ended it.
        logprobs: log-probability of each token in nats, the model's own (before masks, temperature and top_p).
        finished: it ended by itself or by `stop`, not because the token budget was used up.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: bool
