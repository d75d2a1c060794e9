"""An answer that is handed on while it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers.generation.streamers import BaseStreamer

from common.generation.growing_text import GrowingText
from common.models.tokenizers import decode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class AnswerStreamer(BaseStreamer):
    """Hands on the text of one answer: its parts, joined, are what decoding all of its tokens gives.

    transformers' TextStreamer decodes each line alone, of which a decoder for texts that begin with a space takes one.

    Args:
        show: called with each part as it comes, and at the end with the rest, which may be "", and True.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str, bool], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self._text = GrowingText(tokenizer)
        self._tokens: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Tokens of the answer; the first that come are the prompt's, and are passed over."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.tolist()
        before = len(self._text.text)
        if more := self._text.feed(self._tokens)[before:]:
            self.show(more, False)

    def end(self) -> None:
        self.show(decode(self.tokenizer, self._tokens or [])[len(self._text.text) :], True)
