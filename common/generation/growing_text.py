"""The text of an answer while it is written, without decoding all of it for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.models.tokenizers import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a character looks like whose last bytes are still to come


class GrowingText:
    """The tokens of an answer as text, token by token.

    A token's text can depend on the ones before it (spaces, characters of several tokens): it is what decoding the last
    few tokens gives beyond what it gives without it. A character that is not complete yet is not part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self._start = self._read = 0  # of the last tokens that became text, and behind them

    def feed(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, which begin with those of the call before."""
        known = decode(self.tokenizer, tokens[self._start : self._read])
        longer = decode(self.tokenizer, tokens[self._start :])
        if not longer.endswith(UNFINISHED):
            self.text += longer[len(known) :]
            self._start, self._read = self._read, len(tokens)
        return self.text
