"""Where the values of an answer stand, chosen by what stands around them, and whether their boxes are right."""

from __future__ import annotations

import json

import pytest
from support.inputs import SHARED

from common.tasks.idp import documents, evidence, grounding
from common.tasks.idp.documents import Document, Segment

RECEIPT = """Shop 9.00 Ltd
Date: 01/02/2019
Tea          1    2.00    9.00
Cake         2    9.00   18.00
Tax 9.00
Total (RM): 9.00
Cash 9.00"""


def span(text: str, line: int, column: int, length: int) -> tuple[int, int]:
    start = sum(len(each) + 1 for each in text.splitlines()[:line]) + column
    return start, start + length


def located(value) -> dict[str, tuple]:
    found = evidence.locate(Document(RECEIPT), value)
    return {name: (each.start, each.end) for name, each in found.items()}


def test_the_label_before_a_value_decides():
    found = located({"total": "9.00", "tax": 9.0, "cash": "9.00", "date": "01/02/2019", "paid": True})
    assert found == {
        "total": span(RECEIPT, 5, 12, 4),
        "tax": span(RECEIPT, 4, 4, 4),
        "cash": span(RECEIPT, 6, 5, 4),
        "date": span(RECEIPT, 1, 6, 10),
        "paid": (None, None),
    }


def test_the_values_of_an_item_stand_together():
    items = [{"name": "Tea", "qty": 1, "amount": 9.0}, {"name": "Cake", "qty": 2, "price": 9.0, "amount": 18.0}]
    found = located({"lines": items})
    assert found["lines[0].qty"] == span(RECEIPT, 2, 13, 1)
    assert found["lines[0].amount"] == span(RECEIPT, 2, 26, 4)
    assert found["lines[1].qty"] == span(RECEIPT, 3, 13, 1)
    assert found["lines[1].price"] == span(RECEIPT, 3, 18, 4)
    assert found["lines[1].amount"] == span(RECEIPT, 3, 25, 5)


def test_headings_of_columns_and_names_of_fields():
    text = "Invoice Number   Order Number\n77               77\n"
    found = evidence.locate(Document(text), {"orderNumber": "77", "invoice_number": "77"})
    assert (found["orderNumber"].start, found["invoice_number"].start) == (47, 30)
    assert evidence.words_of("invoiceNumber no_1") == ["invoice", "number", "no"]
    assert evidence.alike("date", "invoicedate") == 0.7
    assert evidence.alike("total", "totaal") == pytest.approx(0.75)
    assert evidence.alike("total", "subtotaal") == pytest.approx(0.56)
    assert evidence.alike("total", "cash") == 0.0


def test_what_is_shown():
    text = "ACME  Ltd\nBerlin"
    words = (Segment(0, 4, 2, (1, 1, 5, 2)), Segment(6, 9, 2, (6, 1.006, 9, 2.5)), Segment(10, 16, 2, (1, 3, 7, 4)))
    shown = evidence.shown(Document(text, words), {"name": "ACME Ltd, Berlin", "town": "Rom", "place": "Berlin"})
    assert shown["name"] == {
        "found": True,
        "start": 0,
        "end": 16,
        "text": text,
        "match": "near",
        "boxes": [{"page": 2, "box": [1, 1, 9, 2.5]}, {"page": 2, "box": [1, 3, 7, 4]}],
    }
    assert shown["town"] == {"found": False}
    assert shown["place"]["boxes"] == [{"page": 2, "box": [1, 3, 7, 4]}]
    assert "boxes" not in evidence.shown(Document(text), {"place": "Berlin"})["place"]


LINES = [
    {"text": "9.00", "box": [80, 20, 99, 30]},
    {"text": "SHOP", "box": [10, 0, 50, 10]},
    {"text": "TOTAL", "box": [10, 20, 40, 30]},
    {"text": "9.00", "box": [80, 41, 99, 50]},
    {"text": "CASH", "box": [10, 40, 40, 50]},
    {"text": "gone", "box": [10, 60, 40, 70], "page": 2},
]
ROW = {"document": "SHOP\nTOTAL 9.00\nCASH 9.00", "lines": LINES, "fields": {"name": "Shop", "total": "9.00"}}


def test_lines_find_their_place_in_a_text_of_another_order():
    document = documents.of_row(ROW)
    assert [(document.text[each.start : each.end], each.box[1]) for each in document.segments] == [
        ("SHOP", 0), ("TOTAL", 20), ("9.00", 20), ("CASH", 40), ("9.00", 41)
    ]  # fmt: skip
    same = Document(
        "2 2\n2", (Segment(0, 1, 1, (0, 1, 1, 2)), Segment(2, 3, 1, (2, 0, 3, 2)), Segment(4, 5, 2, (0,) * 4))
    )
    assert documents.of_row(documents.to_row(same)) == same


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("x", "'lines' must be a list of objects with 'text' and 'box'"),
        ([{"box": [0, 0, 1, 1]}], "line 1 of 'lines' has no 'text'"),
        ([LINES[0], {"text": "a", "box": [0, 0, 1]}], "the 'box' of line 2 of 'lines' must be four numbers"),
        ([{"text": "a", "box": [0, 0, 1, True]}], "the 'box' of line 1"),
        ([{"text": "a", "box": [0, 0, float("nan"), 1]}], "the 'box' of line 1"),
        ([{"text": "a", "box": [0, 0, float("inf"), 1]}], "the 'box' of line 1"),
        ([{"text": "a", "box": [0, 0, 10**400, 1]}], "the 'box' of line 1"),
        ([{"text": "a", "box": [0, 0, 1, 1], "page": 0}], "the 'page' of line 1 of 'lines' must be a whole"),
    ],
)  # fmt: skip
def test_lines_that_are_none(lines, fault):
    assert documents.lines_fault({"document": "a", "lines": lines}).startswith(fault)
    assert documents.lines_fault(ROW) is documents.lines_fault({"document": "a"}) is None


def f1(row: dict, value) -> dict[str, float]:
    return {name: each["value"] for name, each in grounding.measure([row], [value], ["a"]).items()}


def test_grounding_counts_boxes():
    assert f1(ROW, ROW["fields"]) == {"all": 1, "name": 1, "total": 1}
    assert f1(ROW, {"name": "CASH", "total": "9.00"}) == {"all": 0.5, "name": 0, "total": 1}
    assert f1(ROW, {"total": "9.00"}) == {"all": pytest.approx(2 / 3), "name": 0, "total": 1}
    assert f1(ROW, None) == {"all": 0, "name": 0, "total": 0}
    assert f1(ROW | {"lines": None}, ROW["fields"]) == {"all": 0}
    shop, total, cash = (1, (10, 0, 50, 10)), (1, (80, 20, 99, 30)), (1, (80, 41, 99, 50))
    document = documents.of_row(ROW)
    assert grounding.true_boxes(document, "SHOP", "name") == [(shop,)]
    assert grounding.true_boxes(document, "9.00", "total") == [(total,)]
    assert grounding.true_boxes(document, "9.00", "amount") == [(total,), (cash,)]
    assert grounding.true_boxes(document, "7.00", "total") == []
    assert grounding.true_boxes(document, 9, "total") == [(total,)]
    assert grounding.true_boxes(document, True, "total") == []


def test_boxes_overlap():
    assert grounding.overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert grounding.overlap((0, 0, 2, 2), (0, 0, 2, 1)) == 0.5
    assert grounding.overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    box = (0, 0, 2, 2)
    assert grounding.overlapping([(1, box)], [(1, box), (1, box)]) == 1
    assert grounding.overlapping([(1, box)], [(2, box)]) == 0


@pytest.mark.skipif(not (SHARED / "data" / "sroie").is_dir(), reason="no receipts here")
@pytest.mark.processes
def test_the_true_values_of_real_receipts_are_found_where_they_stand():
    with (SHARED / "data" / "sroie" / "receipts.jsonl").open() as handle:
        rows = [json.loads(line) for line in handle]
    found = grounding.measure(rows, [row["fields"] for row in rows], [row["id"] for row in rows])
    assert found["all"]["low"] > 0.97
    assert all(each["value"] > 0.97 for each in found.values())
