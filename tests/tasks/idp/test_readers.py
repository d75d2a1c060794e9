"""Dates, times and numbers as documents write them, and what these mean."""

from __future__ import annotations

import json

import pytest
from support.inputs import SHARED

from common.generation import json_schema
from common.tasks.idp import amounts, dates, languages
from common.tasks.idp.copies import copies
from common.tasks.idp.readers import Conventions, ReadingSettings, read

NOWHERE = Conventions("")


def date_of(text: str, document: str = "", order: str | None = None) -> str | None:
    return read("date", text, Conventions(document, ReadingSettings(order))).value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("31/12/2017", "2017-12-31"),
        ("03/20/2023", "2023-03-20"),
        ("2018-04-02", "2018-04-02"),
        ("8.9.22", "2022-09-08"),
        ("13/01/98", "1998-01-13"),
        ("20180402", "2018-04-02"),
        ("19 april 2014", "2014-04-19"),
        ("7. Mai 2014", "2014-05-07"),
        ("le 3 février 2021", "2021-02-03"),
        ("3 fevr. 2021", "2021-02-03"),
        ("29 maart 2014", "2014-03-29"),
        ("3 de fevereiro de 2021", "2021-02-03"),
        ("12 agosto 2020", "2020-08-12"),
        ("den 3 februari 2021", "2021-02-03"),
        ("3. helmikuuta 2021", "2021-02-03"),
        ("15 października 2019", "2019-10-15"),
        ("3. ledna 2020", "2020-01-03"),
        ("2021. február 3.", "2021-02-03"),
        ("2021 m. vasario 3 d.", "2021-02-03"),
        ("3 января 2020", "2020-01-03"),
        ("3 Şubat 2021", "2021-02-03"),
        ("3 Φεβρουαρίου 2021", "2021-02-03"),
        ("3 d'abril de 2021", "2021-04-03"),
        ("3 फ़रवरी 2021", "2021-02-03"),
        ("٣ فبراير ٢٠٢١", "2021-02-03"),
        ("2018年4月2日", "2018-04-02"),
        ("２０１８年４月２日", "2018-04-02"),
        ("2018년 4월 2일", "2018-04-02"),
        ("Sep 12, 2025", "2025-09-12"),
        ("March 3rd, 2021", "2021-03-03"),
        ("02APR18", "2018-04-02"),
        ("3 October '21", "2021-10-03"),
        ("Datum: 28-9-2022, Utrecht", "2022-09-28"),
        ("19 april 2014Factuurdatum:", "2014-04-19"),
        ("12 Jan 31, 2022", "2022-01-31"),  # a number before it, and a year of four digits
        ("1 januari 2020 t/m 1 januari 2020", "2020-01-01"),
        ("3 de febrero de 21", "2021-02-03"),
        ("12 Mar 2018,15:30", "2018-03-12"),
        ("12 Mar 18,15:30", "2018-03-12"),
        ("05 Jan 2024,45.00,Coffee", "2024-01-05"),  # as a bank's CSV has it
        ("05-Jan-24,45.00", "2024-01-05"),
        ("05-Jan-24,450.00", "2024-01-05"),
        ("05-Jan-24,45", "2024-01-05"),
        ("05 Jan 24,45.00,Coffee", "2024-01-05"),
        ("JAN 05,24", "2024-01-05"),  # as tills have it
        ("JAN 05,24,45.00", "2024-01-05"),
        ("12 DE MARZO DE 19", "2019-03-12"),
        ("3 D'ABRIL DEL 21", "2021-04-03"),
        ("2019-W05-3", "2019-01-30"),
        ("2020W537", "2021-01-03"),
        ("25032018", "2018-03-25"),
    ],
)
def test_dates(text, value):
    assert date_of(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "31.02.2020", "February 2020", "99/99/9999", "3112-01-20", "1.1.1.1", "192.168.10.12", "12.345.67",
     "22/9/2022 - 30/9/2022", "5 stuks 20", "12 Uhr 2014", "3 กุมภาพันธ์ 2564", "717,97", "774-00-01-454",
     "Jan 12 14:30", "05 Jan 12.45.30", "05 Jan,2012.50,12.00", "2019-W54-1", "2019-W05"],
)  # fmt: skip
def test_no_dates(text):
    assert date_of(text) is None


@pytest.mark.parametrize(
    "text",
    ["05 Jan 12.99", "05 Jan 12,50", "05 Jan '12.99", "05 Jan 2012.50", "05 Jan 2012,50", "05 Jan 12,345.67",
     "Jan 12,50", "05 January ATM 20"],
)  # fmt: skip
def test_an_amount_behind_a_day_and_month_is_no_year(text):
    assert date_of(text) is None
    assert text.split()[-1].strip("'") in [*copies("number", Conventions(text))]


def test_a_month_of_two_languages_needs_one():
    assert date_of("3 listopada 2020") is None
    polish = "Faktura wystawiona dnia, sprzedawca, nabywca, wartość netto, kwota do zapłaty"
    assert date_of("3 listopada 2020", polish) == "2020-11-03"


@pytest.mark.parametrize(
    ("document", "order", "value"),
    [
        ("paid 28/11/2022", None, "2022-04-03"),
        ("paid 11/28/2022", None, "2022-03-04"),
        ("paid 11/28/2022", "day", "2022-04-03"),
        ("paid 28/11/2022", "month", "2022-03-04"),
        ("Facture numéro un, montant total à payer avant la date limite de paiement", None, "2022-04-03"),
        ("TOTAL RM 12.00 CASH RM 20.00 CHANGE RM 8.00", None, "2022-04-03"),
    ],
)
def test_what_decides_between_day_and_month(document, order, value):
    reading = read("date", "03/04/2022", Conventions(document, ReadingSettings(order)))
    assert (reading.value, reading.note) == (value, None)


@pytest.mark.parametrize(
    ("document", "value", "other"),
    [
        ("", "2022-04-03", "2022-03-04"),
        ("28/11/2022 and 11/28/2022", "2022-04-03", "2022-03-04"),
        ("Please pay the total due of $ 12.00 in time", "2022-03-04", "2022-04-03"),
    ],
)
def test_where_nothing_decides_it_is_said(document, value, other):
    reading = read("date", "03/04/2022", Conventions(document))
    assert reading.value == value
    assert f"else {other}" in reading.note
    assert "--dates" in reading.note


@pytest.mark.parametrize(
    ("text", "document", "order", "value", "others"),
    [
        ("18-01-05", "", None, "2005-01-18", "(else 2018-01-05); --dates day, month or year decides it"),
        ("18-01-05", "paid 18-01-05", None, "2005-01-18", "(else 2018-01-05)"),  # it shows nothing itself
        ("05-12-17", "", None, "2017-12-05", "(else 2017-05-12 or 2005-12-17)"),
        ("05-12-17", "and 28-12-17", None, "2017-12-05", "(else 2005-12-17)"),
        ("05-05-05", "", None, "2005-05-05", None),
        ("18-01-05", "", "year", "2018-01-05", None),
        ("05-12-17", "", "month", "2017-05-12", None),
        ("18-01-05", "paid 03/04/2021", None, "2005-01-18", None),  # there the year is last
        ("18-01-05", "and 31-12-98", None, "2005-01-18", None),
        ("18-01-05", "TOTAL RM 12.00 CASH RM 20.00 CHANGE RM 8.00", None, "2005-01-18", None),
        (
            "18-01-05",
            "Faktura med belopp och moms, att betala inom trettio dagar utan avdrag",
            None,
            "2018-01-05",
            None,
        ),
        ("18/01/05", "", None, "2005-01-18", None),
        ("18-01-2005", "", None, "2005-01-18", None),
        ("18-13-05", "", None, None, "is no date"),
    ],
)
def test_a_year_of_two_digits_may_be_first(text, document, order, value, others):
    reading = read("date", text, Conventions(document, ReadingSettings(order)))
    assert reading.value == value
    assert (others is None) == (reading.note is None)
    assert reading.note is None or others in reading.note


def test_a_date_with_the_year_first_is_copied():
    (date,) = dates.find("on 18-01-05")
    assert {meaning.isoformat() for meaning in date.meanings} == {"2005-01-18", "2018-01-05"}
    swedish = Conventions("Faktura med belopp och moms, att betala senast 18-01-31 utan avdrag")
    assert read("date", "18-01-31", swedish).value == "2018-01-31"
    assert swedish.first == "month"  # 31 is no day of it


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("717,97", 717.97),
        ("1.234,56 €", 1234.56),
        ("$7.10", 7.1),
        ("RM 31.00", 31),
        ("RM31.00", 31),
        ("Rs.1939", 1939),
        ("R$ 1.234,56", 1234.56),
        ("1 234,50 zł", 1234.5),
        ("12.00EUR", 12),
        ("1,234.50-", -1234.5),
        ("(12.00)", -12),
        ("12.00-", -12),
        ("($1,234.50)", -1234.5),
        ("$ (1,234.50)", -1234.5),
        ("€ -9,32", -9.32),
        ("−12.00", -12),
        ("12.00 EUR-", -12),
        ("€ 12,-", 12),
        ("12,--", 12),
        ("29 995,00", 29995),
        ("29\u202f995,00", 29995),
        ("1'234.50", 1234.5),
        ("1,23,456.78", 123456.78),
        ("1.234.567", 1234567),
        ("530 848 134", 530848134),
        ("0,125", 0.125),
        ("1,2345", 1.2345),
        ("21 %", 21),
        (".5", 0.5),
        ("١٢٣٫٥", 123.5),
        ("12 apples", 12),
        ("x4 @ tea", 4),
        ("Total EUR 717,97", 717.97),
        ("Total - 30", 30),
        ("1.200,-", 1200),  # the dash stands for decimals, so the point groups
        ("1 200:-", 1200),
        ("12,50:-", 12.5),
        ("1.200:-", 1200),
        ("5pcs", 5),
        ("0.545kg", 0.545),
        ("2x", 2),
        ("12.50SR", 12.5),
        ("12.50S", 12.5),
        ("1.250,50円", 1250.5),
        ("12.50/kg", 12.5),
        ("1,2 Mio. €", 1200000),
        ("$1.5 million", 1500000),
        ("(3 Mrd. €)", -3000000000),
        ("12 lakh", 1200000),
        ("5万円", 50000),
        ("5 mile", 5),
        ("Discount      - 45.00", -45),  # a cell of a table
        ("Total 45.00 - thank you", 45),
        ("Subtotal -\n45.00", 45),
        ("45.00\n- Coffee", 45),
        ("45.00 -", -45),
        ("GST (6%)", 6),
        ("Adults (2)", 2),
        ("Loss (12.50)", -12.5),
        ("75G- WHITE", 75),
        ("12. 50", 12.5),  # as text recognition has it
        ("RM 12. 50", 12.5),
        ("RM1,234. 50", 1234.5),
        ("€ 12. 50", 12.5),
        ("12. 50 EUR", 12.5),
        ("12. 50€", 12.5),
        ("Total RM  12. 50", 12.5),
        ("TOTAL          12. 50", 12.5),
    ],
)
def test_amounts(text, value):
    reading = read("number", text, NOWHERE)
    assert (reading.value, reading.note) == (value, None)


@pytest.mark.parametrize(
    "text",
    ["", "n/a", "INV-12", "A12", "L12", "31/12/2017", "31.12.2017", "10:30", "12.345.67", "1.1.1.1", "1e5", "½", "12²",
     "774-00-01-454", "3 x 9.99", "6 of 7", "29.995.0024.99", "1280x720", "12.5O", "12.5S", "O.50", "1O.50", "RM1OO.50",
     "1.5E+6", "GMT+8", "2 1/2", "2 ½", "1.2k", "$1.2M", "2 billion", "5万人", "1er", "9am"],
)  # fmt: skip
def test_no_amounts(text):
    assert read("number", text, NOWHERE).value is None


@pytest.mark.parametrize(
    ("text", "document", "value"),
    [
        ("1.234", "41,31 en 8,68", 1234),
        ("1.234", "41.31 and 8.68", 1.234),
        ("1,234", "41,31 en 8,68", 1.234),
        ("1,234", "41.31 and 8.68", 1234),
        ("1.234", "Rechnung mit Betrag und Mehrwertsteuer, zahlbar innerhalb von dreißig Tagen ohne Abzug", 1234),
    ],
)
def test_what_decides_between_decimals_and_thousands(text, document, value):
    reading = read("number", text, Conventions(document))
    assert (reading.value, reading.note) == (value, None)


def test_an_amount_that_nothing_decides_is_said():
    assert read("number", "1,234", NOWHERE).note == "could also be 1.234"
    assert read("number", "1.234", NOWHERE).note == "could also be 1234"


@pytest.mark.parametrize("text", ["-0.00", "(0.00)", "0.00-"])
def test_nothing_has_no_sign(text):
    assert json.dumps(read("number", text, NOWHERE).value) == "0.0"


def test_amounts_of_a_line():
    document = "5 - 12.00\nGST (6%)      0.72\n4 1/4 CHICKEN   3.10 -"
    assert [*dict.fromkeys(copies("number", Conventions(document)))] == ["5", "12.00", "6", "0.72", "4", "3.10 -"]


def test_a_point_that_white_space_follows_ends_a_sentence():
    sentences = ["see page 12. 50 items", "page 12. 50", "1. 50 nails\n2. 30 screws", "1. 50\n2. 30", "12, 50",
                 "on all 12. 50\nmore", "It was RM 12. 50 items", "Weight 6% 12. 50", "  1. 50\n  2. 30",
                 "RM 12. 500", "1.12. 50", "Items     12. 50 boxes"]  # fmt: skip
    for sentence in sentences:
        assert not [text for text in copies("number", Conventions(sentence)) if ". " in text], sentence
        assert read("number", sentence, NOWHERE).value is None, sentence
    table = "QTY     PRICE       AMOUNT\n2       12. 50      25. 00\nTOTAL           RM 25. 00\n(GST       1. 42)"
    found = list(dict.fromkeys(copies("number", Conventions(table))))
    assert found[:5] == ["2", "12. 50", "25. 00", "1. 42", "12"]
    assert Conventions(table).decimal_mark == "."


def test_integers_and_times():
    values = [read("integer", text, NOWHERE).value for text in ("2 stuks", "3,00", "2,50", "7.740.001.454", "x")]
    assert values == [2, 3, None, 7740001454, None]
    thousands = read("integer", "1.234", Conventions("1.50 and 1.234"))
    assert (thousands.value, thousands.note) == (1234, "is read as a whole number, as the field takes no other")
    texts = ["14:30", "2.30 pm", "14h30", "9 am", "10:12:31", "12:30 AM", "14:30:00+08:00", "25:00", "12", "9-10"]
    assert [read("time", text, NOWHERE).value for text in texts] == [
        *["14:30:00Z"] * 3, "09:00:00Z", "10:12:31Z", "00:30:00Z", "14:30:00+08:00", None, None, None,
    ]  # fmt: skip
    here = Conventions("13/01/2017", ReadingSettings(utc_offset="+08:00"))
    stamp = read("date-time", "05/12/2017 10:12:31", here)
    assert stamp.value == "2017-12-05T10:12:31+08:00"
    assert "has no time zone and is taken as of +08:00" in stamp.note
    assert read("date-time", "2018-04-02T14:30:00Z", here).note is None
    assert read("date-time", "2018-04-02", here).value is None
    assert json_schema.errors(stamp.value, {"type": "string", "format": "date-time"}) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14:30 GMT+8", "14:30:00+08:00"),
        ("14:30 UTC+02:00", "14:30:00+02:00"),
        ("14:30 GMT-0530 (home)", "14:30:00-05:30"),
        ("14:30:00-0800", "14:30:00-08:00"),
        ("14:30:00 -08:00", "14:30:00-08:00"),
        ("14:30-0800", "14:30:00-08:00"),
        ("2:30 pm -0800", "14:30:00-08:00"),
        ("T14:30-08:00", "14:30:00-08:00"),
        ("14:30 UTC", "14:30:00Z"),
        ("14:30:00+08", "14:30:00+08:00"),
        ("10:30 PM EST", "22:30:00-05:00"),
        ("14:30 CEST", "14:30:00+02:00"),
        ("UTC+02:00: at 14:30 UTC+02:00", "14:30:00+02:00"),
        ("09:00-10:30", None),
        ("14:30-15:30", None),
        ("9am-5pm", None),
    ],
)
def test_offsets_of_times(text, value):
    assert read("time", text, NOWHERE).value == value


def test_a_zone_whose_name_several_have_is_said():
    reading = read("time", "14:30 CST", NOWHERE)
    assert reading.value == "14:30:00Z" and "has a time zone that several places call CST" in reading.note


@pytest.mark.parametrize(
    ("text", "value"),
    [("2:30 p. m.", "14:30:00Z"), ("下午2:30", "14:30:00Z"), ("오전 12:30", "00:30:00Z"), ("午後14:30", "14:30:00Z")],
)
def test_halves_of_days(text, value):
    assert read("time", text, NOWHERE).value == value


@pytest.mark.parametrize("text", ["Fri, 5 Jan 2024 10:30 -0500", "2024-01-05T10:30-05:00", "2024-01-05T10:30:00-0500"])
def test_offsets_of_dates_with_times(text):
    reading = read("date-time", text, NOWHERE)
    assert (reading.value, reading.note) == ("2024-01-05T10:30:00-05:00", None)
    assert [*copies("date-time", Conventions(f"Sent {text}, by mail"))] == [text.removeprefix("Fri, ")]


@pytest.mark.parametrize(
    ("kind", "document", "texts"),
    [
        ("time", "09:00-10:30", ["09:00", "10:30"]),
        ("time", "09:00:00-10:30:00", ["09:00:00", "10:30:00"]),
        ("time", "9am-5pm, B12-10:30", ["9am", "5pm"]),
        ("date-time", "at 2019-03-04T14:30:00Z", ["2019-03-04T14:30:00Z"]),
        ("date-time", "TIME 14:02:11 DATE 12-05-2018 TILL 3", ["14:02:11 DATE 12-05-2018"]),
        ("date", "20180402, due 01/05/2018", ["20180402", "01/05/2018"]),
        ("date", "No. 20180402", []),
        ("date-time", "05/12/2017               10:12:31 PM", ["05/12/2017               10:12:31 PM"]),
    ],
)
def test_times_are_copied_whole(kind, document, texts):
    assert [*copies(kind, Conventions(document))] == texts


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no cases here")
def test_shared_cases():
    cases = json.loads((SHARED / "cases" / "written_values.json").read_text())
    assert [date_of(case["written"]) for case in cases["dates"]] == [case["value"] for case in cases["dates"]]
    for case in cases["amounts"]:
        assert read("number", case["written"], NOWHERE).value == float(case["value"])


@pytest.mark.processes
@pytest.mark.parametrize(
    "junk",
    ["12 a ", "1 234 ", "1,", "(", "- ", "x", "31/12/2017", "31/12/2017 ", "5 mei 2017\n", "RM 12. 50\n", "12. 50  "],
)
def test_long_texts_take_no_time(junk):
    amounts.find(junk * 20_000)
    dates.find(junk * 20_000)


def test_month_names_of_many_languages():
    assert len({language.partition("_")[0] for language in languages.LANGUAGES}) >= 12
    assert (languages.months("MÄRZ"), languages.months("marzo"), languages.months("maa")) == ({3}, {3}, {3})
    assert languages.months("invoice") == set()


# Schemas.
