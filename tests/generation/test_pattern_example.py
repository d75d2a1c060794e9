"""The one use of CPython's own parser of regular expressions: this fails where a Python has another one."""

from __future__ import annotations

import re

import pytest

from common.generation.pattern_example import example


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^[A-Z]{2}-[0-9]{3,}$", "AA-000"),
        (r"\d{4}(?:-\d\d)?", "0000"),
        ("(yes|no)", "no"),
        ("a.[^b]+?c*", "aaa"),
        (r"[\w]+@x\.com", "a@x.com"),
        ("", ""),
    ],
)
def test_an_example_matches_its_pattern(pattern, text):
    assert example(pattern, 100) == text
    assert re.fullmatch(pattern, text)


def test_a_repetition_is_not_written_out_beyond_the_longest():
    assert len(example("[ab]{1000000}", 100)) == 101
