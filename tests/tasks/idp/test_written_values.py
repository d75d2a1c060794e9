"""Typed fields as text: the schema that asks for it, the values read from it, and the text of known values."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.inputs import read_rows, write_rows
from transformers import Qwen2Config

import infer_idp
from common import cli
from common.generation import json_schema
from common.models.source import LoadedModel
from common.tasks.idp import written_values
from common.tasks.idp.copying import Copyist
from common.tasks.idp.extractor import ExtractionSettings, Extractor
from common.tasks.idp.written_values import TypedFields

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


def test_a_true_date_and_time_is_copied_from_its_iso_form():
    copyist = Copyist(TypedFields({"type": "string", "format": "date-time"}))
    assert copyist.written("2019-03-04T14:30:00Z", "at 2019-03-04T14:30:00Z") == "2019-03-04T14:30:00Z"
    assert copyist.written("2019-04-13T14:30:00Z", "14:30, 13/04/2019") == "14:30, 13/04/2019"
    assert (copyist.copied, copyist.missed) == (2, 0)


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
