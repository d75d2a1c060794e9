"""Typed fields as text: the schema that asks for it, the values read from it, and the text of known values."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.inputs import SHARED, read_rows, write_rows
from transformers import Qwen2Config

import infer_idp
from common import cli
from common.generation import json_schema
from common.models.source import LoadedModel
from common.tasks.idp import amounts, dates, languages, written_values
from common.tasks.idp.copies import copies
from common.tasks.idp.copying import Copyist
from common.tasks.idp.extractor import ExtractionSettings, Extractor
from common.tasks.idp.readers import Conventions, ReadingSettings, read
from common.tasks.idp.written_values import TypedFields

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
    ],
)
def test_dates(text, value):
    assert date_of(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "31.02.2020", "February 2020", "99/99/9999", "3112-01-20", "1.1.1.1", "192.168.10.12", "12.345.67",
     "22/9/2022 - 30/9/2022", "5 stuks 20", "12 Uhr 2014", "3 กุมภาพันธ์ 2564", "717,97", "774-00-01-454",
     "Jan 12 14:30", "05 Jan 12.45.30", "05 Jan,2012.50,12.00"],
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
        ("UTC+02:00: at 14:30 UTC+02:00", "14:30:00+02:00"),
        ("09:00-10:30", None),
        ("14:30-15:30", None),
        ("9am-5pm", None),
    ],
)
def test_offsets_of_times(text, value):
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
        ("date-time", "05/12/2017               10:12:31 PM", ["05/12/2017               10:12:31 PM"]),
    ],
)
def test_times_are_copied_whole(kind, document, texts):
    assert [*copies(kind, Conventions(document))] == texts


def test_a_true_date_and_time_is_copied_from_its_iso_form():
    copyist = Copyist(TypedFields({"type": "string", "format": "date-time"}))
    assert copyist.written("2019-03-04T14:30:00Z", "at 2019-03-04T14:30:00Z") == "2019-03-04T14:30:00Z"
    assert (copyist.copied, copyist.missed) == (1, 0)


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no cases here")
def test_shared_cases():
    cases = json.loads((SHARED / "cases" / "written_values.json").read_text())
    assert [date_of(case["written"]) for case in cases["dates"]] == [case["value"] for case in cases["dates"]]
    for case in cases["amounts"]:
        assert read("number", case["written"], NOWHERE).value == float(case["value"])


@pytest.mark.processes
@pytest.mark.parametrize("junk", ["12 a ", "1 234 ", "1,", "(", "- ", "x", "31/12/2017", "31/12/2017 ", "5 mei 2017\n"])
def test_long_texts_take_no_time(junk):
    amounts.find(junk * 20_000)
    dates.find(junk * 20_000)


def test_month_names_of_many_languages():
    assert len({language.partition("_")[0] for language in languages.LANGUAGES}) >= 12
    assert (languages.months("MÄRZ"), languages.months("marzo"), languages.months("maa")) == ({3}, {3}, {3})
    assert languages.months("invoice") == set()


# Schemas.

SCHEMA = {
    "type": "object",
    "properties": {
        "date": {"type": "string", "format": "date", "description": "of the invoice"},
        "total": {"type": ["number", "null"]},
        "pages": {"type": "integer", "minimum": 1},
        "note": {"type": "string", "maxLength": 9},
        "currency": {"enum": ["EUR", "USD", None], "x-written": {"EUR": ["€", "euro"], "USD": "$"}},
        "kind": {"enum": ["a", "b"]},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
        "tax": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "free": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    },
    "required": ["date", "total", "pages"],
    "additionalProperties": False,
    "$defs": {"line": {"type": "object", "properties": {"price": {"type": "number"}}, "required": ["price"]}},
}
TYPED = TypedFields(SCHEMA)


def test_the_schema_asks_for_text_in_place_of_typed_fields():
    asked = TYPED.written_schema
    text = {"type": "string", "maxLength": 64}
    assert asked["properties"] == {
        "date": text | {"description": "of the invoice (date, as written)"},
        "total": text | {"type": ["string", "null"], "description": "number, as written"},
        "pages": text | {"description": "number, as written"},
        "note": SCHEMA["properties"]["note"],
        "currency": text | {"type": ["string", "null"], "description": "EUR, USD, as written"},
        "kind": SCHEMA["properties"]["kind"],
        "lines": SCHEMA["properties"]["lines"],
        "tax": {"anyOf": [text | {"description": "number, as written"}, {"type": "null"}]},
        "free": SCHEMA["properties"]["free"],  # text may stand for itself there
    }
    assert asked["$defs"]["line"]["properties"]["price"] == text | {"description": "number, as written"}
    assert json_schema.preflight(asked).enforced
    assert TypedFields(True).written_schema is True


@pytest.mark.parametrize("mapping", [{"GBP": "£"}, {"EUR": 3}, {"EUR": ["€", None]}])
def test_a_mapping_that_is_none_is_refused(mapping):
    with pytest.raises(cli.UserError, match="must be a value of the enum, with a text or a list of texts"):
        TypedFields({"enum": ["EUR"], "x-written": mapping})


def test_values_are_read():
    written = {"date": "31/12/2017", "total": "717,97", "pages": "2 p.", "note": "12", "currency": "€", "kind": "a",
               "lines": [{"price": "9,99"}, {"price": "3,-"}], "tax": "21 %", "free": "12"}  # fmt: skip
    answer = TYPED.read(written, "")
    assert answer.value == {
        "date": "2017-12-31", "total": 717.97, "pages": 2, "note": "12", "currency": "EUR", "kind": "a",
        "lines": [{"price": 9.99}, {"price": 3}], "tax": 21, "free": "12",
    }  # fmt: skip
    assert (answer.faults, answer.notes) == ((), ())
    assert json_schema.errors(answer.value, SCHEMA) == []


def test_what_cannot_be_read_is_null_or_an_error_that_names_the_field():
    answer = TYPED.read({"date": "soon", "total": "much", "pages": "1", "lines": [{"price": "?"}], "tax": "n/a"}, "")
    assert answer.value == {"date": "soon", "total": None, "pages": 1, "lines": [{"price": "?"}], "tax": None}
    assert answer.faults == ("date: 'soon' is no date", "lines[0].price: '?' is no number")
    assert answer.notes == ("total: 'much' is no number, and is null",)


def test_an_optional_field_with_nothing_written_is_left_out():
    typed = TypedFields({"type": "object", "properties": {"due": {"type": "string", "format": "date"}}})
    assert typed.read({"due": "-"}, "").value == {}
    assert typed.read({"due": "soon"}, "").faults == ("due: 'soon' is no date",)


def test_values_that_are_typed_already_stay():
    assert TYPED.read({"date": "2017-12-31", "total": 7.5, "pages": 2}, "").value == {
        "date": "2017-12-31", "total": 7.5, "pages": 2,
    }  # fmt: skip
    assert TypedFields({"type": "number"}).read("3,5", "").value == 3.5


DOCUMENT = "02 APR 2018  14:30\nTea 3,00 x2\nCake 1.234,00\nDiscount 5,00-\nTotal € 1.235,00 (incl.)\n1.234,00"


def test_fields_are_copied_as_the_document_has_them():
    copyist = Copyist(TYPED)
    fields = {"date": "2018-04-02", "total": 1235, "pages": 2, "note": "x", "currency": "EUR", "tax": None,
              "lines": [{"price": 3.0}, {"price": 1234.0}, {"price": -5}]}  # fmt: skip
    written = copyist.written(fields, DOCUMENT)
    assert written == {
        "date": "02 APR 2018", "total": "1.235,00", "pages": "2", "note": "x", "currency": "€", "tax": None,
        "lines": [{"price": "3,00"}, {"price": "1.234,00"}, {"price": "5,00-"}],
    }  # fmt: skip
    assert TYPED.read(written, DOCUMENT).value == fields
    assert (copyist.copied, copyist.missed) == (7, 0)


def test_what_the_document_lacks_is_written_so_that_it_reads_the_same():
    copyist = Copyist(TYPED)
    fields = {"date": "2019-05-01", "total": -1.234, "pages": 7, "currency": "USD"}
    written = copyist.written(fields, DOCUMENT)
    assert written == {"date": "2019-05-01", "total": "-1.2340", "pages": "7", "currency": "USD"}
    assert TYPED.read(written, DOCUMENT).value == fields
    assert (copyist.copied, copyist.missed) == (0, 4)


def test_an_ambiguous_date_is_copied_by_the_value_that_is_known():
    copyist = Copyist(TYPED)
    fields = {"date": "2022-03-04", "total": 1.5, "pages": 1}
    assert copyist.written(fields, "03/04/2022 1.50 1 of 1")["date"] == "03/04/2022"


def test_a_copy_is_one_of_the_documents_dates_and_numbers():
    schema = TYPED.grammar_schema(DOCUMENT)["properties"]
    assert schema["date"]["enum"] == ["02 APR 2018", ""]
    numbers = ["3,00", "2", "1.234,00", "5,00-", "1.235,00"]
    assert schema["total"]["enum"] == [*numbers, "", None]
    assert schema["tax"]["anyOf"][0]["enum"] == [*numbers, ""]
    assert schema["note"] == SCHEMA["properties"]["note"]
    bare = TYPED.grammar_schema("no dates, 7")["properties"]
    assert (bare["date"]["type"], bare["total"]["enum"]) == ("string", ["7", "", None])


def test_fields_and_copies_that_are_too_many_together_are_any_text(tokenizer):
    """Each field of its own may have as many; together they are no grammar that could be compiled."""
    names = [f"amount_{number}" for number in range(50)]
    fields = {name: {"type": "number"} for name in names}
    schema = {"type": "object", "properties": fields, "required": names, "additionalProperties": False}
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=32_768)
    loaded = LoadedModel(SimpleNamespace(config=config), tokenizer, 8192)
    extractor = Extractor(loaded, schema, json_schema.preflight(schema), ExtractionSettings(4096))
    document = " ".join(f"{1_000_000 + 7 * number}.{10 + number % 90}" for number in range(395))
    assert len(extractor.typed.grammar_schema(document)["properties"]["amount_0"]["enum"]) > 395
    assert extractor.grammar_for(document) is extractor.grammar
    assert extractor.grammar_for(document, part=True) is extractor.part_grammar
    few = extractor.grammar_for("1.50 and 2.50").rows(4096)(0)
    tokens = tokenizer.encode('{"amount_0": "9')
    assert few.fitting(tokens) < len(tokens) == extractor.grammar.rows(4096)(0).fitting(tokens)


@pytest.mark.processes
def test_an_answer_is_copied_read_and_shown(capsys, monkeypatch, tiny_base, tmp_path):
    """Whatever the weights, dates and numbers are those of the document."""
    fields = {"date": {"type": "string", "format": "date"}, "total": {"type": "number"}}
    schema = {"type": "object", "properties": fields, "required": ["date", "total"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    monkeypatch.setattr(written_values, "NOTHING_WRITTEN", ())
    argv = ["--model_dir", tiny_base, "--schema", str(tmp_path / "schema.json"), "--written"]
    assert infer_idp.main([*argv, "--document", "Factuur 3 maart 2021\nTotaal 1.234,50"]) is None
    answer = json.loads(capsys.readouterr().out)
    assert answer["fields"] == {"date": "2021-03-03", "total": 1234.5}
    assert answer["written"] == {"date": "3 maart 2021", "total": "1.234,50"}
    rows = write_rows(tmp_path / "in.jsonl", [{"document": "Paid 03/04/2021: 7.50", "id": 1}])
    out = tmp_path / "out.jsonl"
    assert infer_idp.main([*argv, "--input", rows, "--output", str(out)]) is None
    assert "1 of 1 documents have values that are not sure" in capsys.readouterr().err
    (answer,) = read_rows(out)
    assert answer["fields"] == {"date": "2021-04-03", "total": 7.5}
    assert "--dates day or month decides it" in answer["notes"][0]
    assert infer_idp.main([*argv, "--document", "Paid 03/04/2021: 7.50", "--dates", "month"]) is None
    assert json.loads(capsys.readouterr().out)["fields"]["date"] == "2021-03-04"
    with pytest.raises(cli.UserError, match="'8' is no offset from UTC"):
        infer_idp.main([*argv, "--document", "x", "--utc_offset", "8"])
