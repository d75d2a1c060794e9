"""Fields against fields: what counts as equal, how lists are paired, and the metrics that are made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.evaluation.bootstrap import mean_interval, ratio_interval
from common.tasks.idp import metrics as idp_metrics
from common.tasks.idp.extractor import Extraction
from common.tasks.idp.field_metrics import Leaf, amount, compare, counts, date, leaves, path_name, same, same_normalised

EXACT = idp_metrics.EXACT
INVOICE = {
    "number": "INV-7",
    "total": 44.5,
    "paid": False,
    "note": None,
    "lines": [{"item": "Cable", "qty": 2}, {"item": "Lamp", "qty": 1}],
}


def test_leaves_are_what_has_a_value():
    found = {path_name(path): value for path, value in leaves(INVOICE | {"empty": "", "none": []})}
    assert found == {
        "number": "INV-7",
        "total": 44.5,
        "paid": False,
        "lines[0].item": "Cable",
        "lines[0].qty": 2,
        "lines[1].item": "Lamp",
        "lines[1].qty": 1,
    }
    assert path_name(("a", 3, "b"), numbers=False) == "a[].b"
    assert path_name(()) == "$"


def test_an_item_that_was_missed_costs_its_own_leaves_only():
    found = INVOICE | {"lines": [{"item": "Lamp", "qty": 1}]}
    agreeing, of_found, of_gold = counts([compare(INVOICE, found)], EXACT)[0]
    assert (agreeing, of_found, of_gold) == (5, 5, 7)
    lines = [leaf for leaf in compare(INVOICE, found) if leaf.field.startswith("lines") and not leaf.exact]
    assert [(leaf.field, leaf.gold, leaf.predicted) for leaf in lines] == [
        ("lines[].item", "Cable", None),
        ("lines[].qty", 2, None),
    ]


def test_an_item_too_many_counts_as_found_only():
    found = INVOICE | {"lines": [{"item": "Mouse", "qty": 9}, *INVOICE["lines"]]}
    assert counts([compare(INVOICE, found)], EXACT)[0].tolist() == [7, 9, 7]


def test_another_shape_is_wrong_in_every_leaf():
    assert counts([compare(INVOICE, None)], EXACT)[0].tolist() == [0, 0, 7]
    assert counts([compare({"a": [1, 2]}, {"a": {"b": 1}})], EXACT)[0].tolist() == [0, 1, 2]
    assert counts([compare({"a": 1}, [1])], EXACT)[0].tolist() == [0, 1, 1]
    assert compare({"a": ""}, {"a": None, "b": []}) == []


@pytest.mark.parametrize(("a", "b"), [(44.5, 44.50), (2, 2.0), ("x", "x"), (True, True)])
def test_same(a, b):
    assert same(a, b)


@pytest.mark.parametrize(("a", "b"), [(1, True), (1, "1"), (0, False), ("a", "A"), (44.5, 44.51), ("x", None)])
def test_not_same(a, b):
    assert not same(a, b)


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("Acme  Co.\n", "Acme Co."),
        ("NO. 53, JALAN BESAR ", "NO.53,JALAN  BESAR"),
        ("2018-04-02", "02 APR 2018"),
        ("09/01/2019", "9.1.2019"),
        ("Sep 12, 2025", "2025-09-12"),
        (1234.5, "1.234,50 EUR"),
        (-3.5, "-3.50"),
        ("$8.20", "8.20"),
        ("31.00", "RM31.00"),
        ("€ 12.50", "12,50 EUR"),
        pytest.param(10**309, f"1{309 * '0'}", id="beyond floats"),
    ],
)
def test_same_normalised(gold, found):
    assert not same(gold, found)
    assert same_normalised(gold, found)


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("0012", "12"),
        ("INV-7", "INV-07"),
        ("09/01/2019", "2019-09-01"),
        (1, True),
        ("Acme", "acme"),
        (8.2, "abc"),
        ("12.50 EUR", "12.50 USD"),
        ("€12.50", "$12.50"),
        pytest.param(10**309, 10**309 + 1, id="beyond floats"),
        pytest.param(10**309, 1.5, id="of which one is beyond floats"),
    ],
)
def test_not_same_normalised(gold, found):
    assert not same_normalised(gold, found)


def test_amounts_and_dates():
    texts = ["1,234", "1.234", "1.234.567", "1'234.50", "12", "", "12 apples"]
    assert [amount(text) for text in texts] == [1234, 1.234, 1234567, 1234.5, 12, None, None]
    assert [amount(number) for number in (10**308, 10**309, -(10**309))] == [1e308, None, None]
    texts = ["31.02.2020", "12th September 2025", "13/01/19", "tomorrow"]
    assert [date(text) for text in texts] == [None, (2025, 9, 12), (2019, 1, 13), None]


def answer(value, error=None) -> Extraction:
    return Extraction(value, error, "text", tokens=5)


def test_metrics_equal_their_definition():
    rows = [
        ({"a": "x", "b": 1.5}, answer({"a": "x", "b": 1.5})),
        ({"a": "y", "b": 2.0}, answer({"a": "y", "b": "2.00", "c": "z"}, "c is not asked for")),
        ({"a": "z"}, replace(answer(None, "not JSON"), cut="the answer is cut")),
    ]
    judged = [idp_metrics.judge(fields, extraction) for fields, extraction in rows]
    result = idp_metrics.evaluate(judged, ["g1", "g2", "g2"], seed=1)
    metrics = {key: figures for key, figures in result.items() if isinstance(figures, dict) and "low" in figures}
    values = {key: figures["value"] for key, figures in metrics.items()}
    assert values == {
        "valid_json_rate": pytest.approx(2 / 3, abs=1e-6),
        "schema_valid_rate": pytest.approx(1 / 3, abs=1e-6),
        "exact_match": pytest.approx(1 / 3, abs=1e-6),
        "exact_match_normalised": pytest.approx(1 / 3, abs=1e-6),
        "cut_rate": pytest.approx(1 / 3, abs=1e-6),
        "field_precision": pytest.approx(3 / 5, abs=1e-6),
        "field_recall": pytest.approx(3 / 5, abs=1e-6),
        "field_f1": pytest.approx(6 / 10, abs=1e-6),
        "field_f1_normalised": pytest.approx(8 / 10, abs=1e-6),
        "field_f1_anls": pytest.approx(8 / 10, abs=1e-6),
    }
    assert all(result[key]["low"] <= value <= result[key]["high"] for key, value in values.items())
    assert (result["n"], result["groups"]) == (3, 2)
    assert {name: figures["support"] for name, figures in result["per_field"].items()} == {"a": 3, "b": 2, "c": 0}
    assert result["per_field"]["a"]["recall"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    kinds = {(error["field"], error["kind"]): error["count"] for error in
             idp_metrics.commonest_errors([{"id": "r1"}, {}, {}], judged)}  # fmt: skip
    assert kinds == {("b", "written in another way"): 1, ("c", "not asked for"): 1, ("(answer)", "not JSON"): 1}


@pytest.mark.parametrize(
    ("gold", "found", "similarity"),
    [("Acme Co.", "ACME  co.", 1), ("Acme Inc", "Acme Ink", 7 / 8), ("Acme", "Dell", 0), ("12.00", "RM 12.00", 1),
     (12, 13, 0), ("x", None, 0), (None, "x", 0), ("ab", "ax", 0.5)],
)  # fmt: skip
def test_similarity_of_leaves(gold, found, similarity):
    assert Leaf("a", gold, found).similarity == pytest.approx(similarity)


def test_lines_agree_where_all_of_their_leaves_do():
    found = INVOICE | {
        "lines": [{"item": "Lamp", "qty": "1.0"}, {"item": "Mouse", "qty": 9}, {"item": "Cable", "qty": 2}]
    }
    judged = [idp_metrics.judge(INVOICE, answer(found)), idp_metrics.judge({"a": "x"}, answer({"a": "x"}))]
    (lines,) = idp_metrics.evaluate(judged, ["g1", "g2"])["lines"].items()
    assert lines[0] == "lines[]"
    assert lines[1]["support"] == 2
    assert lines[1]["f1"]["value"] == pytest.approx(2 * 1 / (3 + 2))  # "1.0" is text
    assert lines[1]["f1_normalised"]["value"] == pytest.approx(2 * 2 / (3 + 2))
    assert idp_metrics.evaluate(judged[1:], ["g2"])["lines"] == {}


def test_a_field_of_another_is_told_from_a_wrong_value():
    judged = [idp_metrics.judge({"a": "x", "b": "y", "c": "w"}, answer({"a": "y", "b": "q"}))]
    errors = {error["field"]: error for error in idp_metrics.commonest_errors([{"id": 7}], judged)}
    assert {field: error["kind"] for field, error in errors.items()} == {
        "a": "another field's value",
        "b": "wrong value",
        "c": "missing",
    }
    assert errors["a"]["examples"] == [{"id": "7", "gold": "x", "found": "y"}]


def test_differences_are_paired():
    fields = [{"a": str(i)} for i in range(40)]
    right = [idp_metrics.judge(each, answer(each)) for each in fields]
    groups = [str(i) for i in range(40)]
    wrong = [idp_metrics.judge(each, answer({"a": "no"}, "wrong")) for each in fields[:10]] + right[10:]
    same_rows = idp_metrics.differences(right, right, groups)
    assert all(each == {"value": 0, "low": 0, "high": 0} for each in same_rows.values())
    difference = idp_metrics.differences(right, wrong, groups)
    assert {key: each["value"] for key, each in difference.items()} == {
        "field_f1": 0.25,
        "exact_match": 0.25,
        "schema_valid_rate": 0.25,
    }
    assert all(each["low"] > 0 for each in difference.values())


def test_ratio_interval_is_a_mean_where_every_row_counts_once():
    values = [0, 1, 1, 0, 1, 1, 1]
    groups = list("aabbccc")
    assert ratio_interval([[value, 1] for value in values], groups, 3) == mean_interval(values, groups, 3)
    assert ratio_interval([[0, 0]]) == {"value": 0, "low": 0, "high": 0}
    both = ratio_interval([[value, 1, value, 1] for value in values], groups)
    assert both == {"value": 0, "low": 0, "high": 0}
