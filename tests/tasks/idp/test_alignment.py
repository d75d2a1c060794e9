"""Where a value stands in a text."""

from __future__ import annotations

import pytest

from common.tasks.idp.alignment import Haystack, readings

TEXT = "ACME Trading  Sdn\nBhd\nNo. 3, Jalan Satu, 81100 Johor\nInvoice 2018-77\nTotal RM 1.234,50 GST 9.00 19.00"


@pytest.mark.parametrize(
    ("value", "found", "how"),
    [
        ("Invoice 2018-77", ["Invoice 2018-77"], "exact"),
        ("acme TRADING sdn bhd", ["ACME Trading  Sdn\nBhd"], "folded"),
        ("ACME Tradlng Sdn Bhd.", ["ACME Trading  Sdn\nBhd"], "near"),
        ("No 3, Jalan Satu 81100 JOHOR", ["No. 3, Jalan Satu, 81100 Johor"], "near"),
        ("9.00", ["9.00"], "exact"),  # not the end of 19.00
        ("ohor", ["ohor"], "exact"),  # in a word where it stands nowhere else
        ("7.00", [], None),  # another digit is another amount
        ("2018-78", [], None),
        ("2018/77", ["2018-77"], "near"),
        ("1234.50", ["1.234,50"], "read"),
        ("Bolivia", [], None),
        (" ", [], None),
    ],
)
def test_texts(value, found, how):
    matches = Haystack(TEXT).find(value)
    assert [TEXT[match.start : match.end] for match in matches] == found
    assert {match.how for match in matches} == ({how} if how else set())


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1234.5, ["1.234,50"]),
        (9, ["9.00"]),
        (19.0, ["19.00"]),
        (3, ["3"]),
        (-9, ["9.00"]),
        (4, []),
        (1.2345, []),
        pytest.param(10**309, [], id="beyond floats"),
    ],
)
def test_numbers(value, found):
    assert [TEXT[match.start : match.end] for match in Haystack(TEXT).find_number(value)] == found


def test_numbers_beside_each_other_and_indian_ones():
    text = "Cable 2 150.00 | 2 500 | 12,34,567.00 | 12,34,567"
    found = {
        value: [text[m.start : m.end] for m in Haystack(text).find_number(value)] for value in (150, 2500, 1234567)
    }
    assert found == {150: ["150.00"], 2500: ["2 500"], 1234567: ["12,34,567.00", "12,34,567"]}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("2018-04-02", ["02 APR 2018"]),
        ("2 April 2018", ["02 APR 2018"]),
        ("2018-09-05", ["05/09/2018"]),  # day and month could change places
        ("2018-05-09", ["05/09/2018"]),
        ("2018-05-10", []),
        ("2018-04-03", []),
    ],
)
def test_dates(value, found):
    text = "Date 02 APR 2018\nDue 05/09/2018"
    matches = Haystack(text).find(value)
    assert [text[match.start : match.end] for match in matches] == found
    assert {match.how for match in matches} <= {"read"}


def test_edits_are_the_fewest_that_there_are():
    match, *others = Haystack("xx Trading Ltd yy Tradin Ltd").find("Trading Lcd")
    assert (match.start, match.end, match.edits, others) == (3, 14, 1, [])


def test_a_folded_character_may_be_two():
    text = "Bahnhofstraße 5"
    match = Haystack(text).find("BAHNHOFSTRASSE 5")[0]
    assert text[match.start : match.end] == text


def test_texts_of_many_letters_and_places():
    text = "".join(map(chr, range(0x4E00, 0x5000))) + " total 5 " * 5000
    assert len(Haystack(text).find("5")) == 2000
    assert Haystack(text).find("totel 5 total")[0].how == "near"
    assert Haystack(text).find("".join(map(chr, range(0x6000, 0x6200)))) == []


def test_readings():
    assert readings("1.234") == {1234.0, 1.234}
    assert readings("1 234,50") == {1234.5}
    assert readings("1'234.50") == {1234.5}
    assert readings("12") == {12.0}


def test_a_text_that_nearly_stands_everywhere_is_found_in_time():
    """Half a million places, which the aligner would work out one by one for hours."""
    matches = Haystack("ab" * 250_000).find("ab" * 300 + "cc")
    assert (matches[0].how, matches[0].edits) == ("near", 2)
