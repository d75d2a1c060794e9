"""A text that grows by tokens is what decoding all of them gives."""

from __future__ import annotations

import pytest
import torch
from support.models import sentencepiece_tokenizer

from common.generation.answer_streamer import AnswerStreamer
from common.generation.growing_text import UNFINISHED, GrowingText
from common.models.tokenizers import decode

TEXTS = [
    "def f(x):\n    return x  # é, 你好 \U0001f44b\n",
    "  two  spaces\t",
    "<think>no</think> yes",
    "\n\n",
    "a\u0301 e\u0301",
    "if x:\n    if y:\n        return 1\n\n\n  - a\n",
]


@pytest.fixture(params=["bytes", "sentencepiece"])
def any_tokenizer(request, tokenizer):
    """Of texts with and without a space before them."""
    return tokenizer if request.param == "bytes" else sentencepiece_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_by_tokens(any_tokenizer, text):
    tokenizer = any_tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False)
    growing, before, final = GrowingText(tokenizer), "", decode(tokenizer, tokens)
    for count in range(1, len(tokens) + 1):
        shown, whole = growing.feed(tokens[:count]), decode(tokenizer, tokens[:count])
        assert shown.startswith(before) and final.startswith(shown)
        assert shown == whole or whole.endswith(UNFINISHED)
        before = shown
    assert before == final


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_streamed_as_it_is_decoded_in_the_end(any_tokenizer, text):
    parts: list[tuple[str, bool]] = []
    streamer = AnswerStreamer(any_tokenizer, lambda part, end: parts.append((part, end)))
    prompt, tokens = (any_tokenizer.encode(each, add_special_tokens=False) for each in ("a prompt", text))
    unfinished = any_tokenizer.encode("é", add_special_tokens=False)[:-1]
    tokens = [*tokens, *unfinished]
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(part for part, _ in parts) == decode(any_tokenizer, tokens)
    assert [end for _, end in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > len(text) / 9


def test_little_is_decoded_for_each_token(tokenizer, monkeypatch):
    tokens = tokenizer.encode("x = 1\n" * 100, add_special_tokens=False)
    growing, decoded = GrowingText(tokenizer), []
    real = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: decoded.append(len(ids)) or real(ids, **how))
    for count in range(1, len(tokens) + 1):
        growing.feed(tokens[:count])
    assert growing.text == "x = 1\n" * 100 and max(decoded) <= 4
