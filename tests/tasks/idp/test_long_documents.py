"""Documents cut in pieces, and the answers to the pieces merged."""

from __future__ import annotations

import json

from common.tasks.idp import confidence, long_documents


def test_halves_are_shorter_and_share_lines():
    text = "\n".join(f"line {number:03}" for number in range(100))
    left, right = long_documents.halves(text)
    assert left.endswith("\n")
    assert text.startswith(left)
    assert text.endswith(right)
    shared = len(left) + len(right) - len(text)
    assert 150 < shared <= long_documents.OVERLAP
    for text in ("ab", "a\n", "\n\n", "word " * 50, "x" * 1000, "a\n" + "x" * 100):
        left, right = long_documents.halves(text)
        assert 0 < len(left) < len(text)
        assert 0 < len(right) < len(text)
        assert text.startswith(left)
        assert text.endswith(right)
        assert len(left) + len(right) >= len(text)


def tree(value, sure: float):
    return confidence.parse_scored(json.dumps(value), lambda start, end: sure)


def test_pieces_are_merged_by_confidence():
    items = [{"item": name, "qty": 1} for name in "ABCD"]
    first = {"vendor": "Acme", "total": 1.0, "note": "", "lines": items[:3], "to": {"name": "X", "city": "P"}}
    second = {"vendor": "Bar", "total": 12.5, "note": "paid", "lines": items[1:], "to": {"name": "", "city": "Q"}}
    third = {"vendor": "Zoo", "total": None, "note": "", "lines": []}
    merged = long_documents.merge([tree(first, 0.6), tree(second, 0.9), tree(third, 0.1)])
    assert confidence.plain(merged) == {
        "vendor": "Bar",
        "total": 12.5,
        "note": "paid",
        "lines": items,
        "to": {"name": "X", "city": "Q"},
    }
    assert confidence.confidences(merged)["to.name"] == 0.6
    assert confidence.confidences(merged)["lines[3].qty"] == 0.9
    assert confidence.plain(long_documents.merge([tree({"a": None}, 0.5), tree({"a": ""}, 0.7)])) == {"a": None}
