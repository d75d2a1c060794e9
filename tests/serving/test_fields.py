"""Sentences of what scripts and server share, in the words of a request."""

from __future__ import annotations

import pytest

from common.serving.fields import with_fields


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("it is long; shorten it, or lower --max_new_tokens", "it is long; shorten it, or lower max_new_tokens"),
        ("no room; lower --max_new_tokens, or raise --max_len", "no room; lower max_new_tokens"),
        ("not supported (a, or b); change it, or pass --best_effort", "not supported (a, or b); change it"),
        ("its base is gone; put it back or pass --base", "its base is gone; put it back"),
        ("fit one with eval.py --fit x, or leave --calibration out", "fit one with eval.py --fit x"),
        ("export it, or run export_model.py --format gguf", "export it, or run export_model.py --format gguf"),
        ("the labels are yes, no or perhaps", "the labels are yes, no or perhaps"),
    ],
)  # fmt: skip
def test_a_flag_is_a_field_or_no_remedy(sentence, shown):
    assert with_fields(sentence) == shown
