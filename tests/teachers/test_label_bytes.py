"""Labels in any script: a teacher's first token may be a part of a character."""

from __future__ import annotations

import json
import math

import pytest

from common.tasks.ranking.task import LabelTask
from common.teachers.chat_endpoint import token_text
from common.teachers.label_probabilities import begins, distribution, token_bytes

TASK = LabelTask("mood", ("良い", "悪い", "Плохо"), "どう?")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ({"token": "Good"}, "Good"),
        ({"token": "Good", "bytes": None}, "Good"),
        ({"token": "bytes:\\xe8\\x89", "bytes": [0xE8, 0x89]}, "bytes:\\xe8\\x89"),
        ({"token": "\ufffd", "bytes": [0xE8, 0x89]}, "bytes:\\xe8\\x89"),
        ({"token": "bytes:\\xe6\\x82"}, "bytes:\\xe6\\x82"),
        ({"token": "\ufffd\ufffd", "bytes": [*"良".encode()]}, "良"),
        ({"token": " П", "bytes": [*" П".encode()]}, " П"),
    ],
)
def test_the_text_of_a_token(token, text):
    assert token_text(token) == text
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text  # it can be kept in a file


def test_parts_of_a_character_count_for_the_label_that_they_begin():
    assert token_bytes("bytes:\\xe8\\x89") == "良".encode()[:2]
    assert token_bytes("bytes:") is None
    assert token_bytes("bytes:hello") is None
    assert begins("良い", "bytes:\\xe8\\x89")
    assert begins("良い", "bytes:\\x20\\xe8")  # behind a space
    assert not begins("悪い", "bytes:\\xe8\\x89")
    assert not begins("悪い", "bytes:\\x20")
    top = [("bytes:\\xe8\\x89", math.log(0.6)), ("bytes:\\xe6\\x82", math.log(0.3)), (" пло", math.log(0.1))]
    probabilities, uncovered = distribution(top, TASK)
    assert probabilities == pytest.approx({"良い": 0.6, "悪い": 0.3, "Плохо": 0.1}, abs=1e-6)
    assert uncovered == 0


def test_a_part_that_begins_two_labels_counts_for_none():
    task = LabelTask("walk", ("良い", "行く"), "?")  # their first bytes are the same
    probabilities, uncovered = distribution([("bytes:\\xe8", math.log(0.4)), ("良", math.log(0.6))], task)
    assert probabilities == pytest.approx({"良い": 1.0, "行く": 0.0})
    assert uncovered == pytest.approx(0.4)
