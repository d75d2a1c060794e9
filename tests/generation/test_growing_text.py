"""A text that grows by tokens is what decoding all of them gives."""

from __future__ import annotations

import pytest

from common.generation.growing_text import UNFINISHED, GrowingText
from common.models.tokenizers import decode

TEXTS = [
    "def f(x):\n    return x  # é, 你好 \U0001f44b\n",
    "  two  spaces\t",
    "<think>no</think> yes",
    "\n\n",
    "a\u0301 e\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_by_tokens(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    growing, before = GrowingText(tokenizer), ""
    for count in range(1, len(tokens) + 1):
        shown, whole = growing.feed(tokens[:count]), decode(tokenizer, tokens[:count])
        assert shown.startswith(before)
        assert shown == whole or (whole.endswith(UNFINISHED) and whole.startswith(shown))
        before = shown
    assert before == decode(tokenizer, tokens)


def test_little_is_decoded_for_each_token(tokenizer, monkeypatch):
    tokens = tokenizer.encode("x = 1\n" * 100, add_special_tokens=False)
    growing, decoded = GrowingText(tokenizer), []
    real = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: decoded.append(len(ids)) or real(ids, **how))
    for count in range(1, len(tokens) + 1):
        growing.feed(tokens[:count])
    assert growing.text == "x = 1\n" * 100 and max(decoded) <= 4
