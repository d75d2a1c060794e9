"""Documents cut in pieces, and the answers to the pieces merged."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from common.cli import UserError
from common.generation import json_schema
from common.models.source import LoadedModel
from common.tasks.idp import confidence, long_documents
from common.tasks.idp.alignment import Haystack
from common.tasks.idp.extractor import ExtractionSettings, Extractor


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


def test_a_leaf_that_stands_in_its_piece_is_preferred():
    filler, receipt = tree({"company": "TERMS", "total": 9}, 0.9), tree({"company": "ACME", "total": 7}, 0.4)
    parts = [
        long_documents.placed(filler, Haystack("conditions apply")),
        long_documents.placed(receipt, Haystack("Acme\nTotal 7.00")),
    ]
    assert confidence.plain(long_documents.merge(parts)) == {"company": "ACME", "total": 7}


def test_what_no_piece_gives_is_taken_from_another_answer():
    known = {"company": "ACME", "to": {"name": "X"}, "lines": [], "note": None}
    other = {"company": "TERMS", "total": 9, "to": {"name": "Y", "city": "P"}, "lines": [1], "note": "n"}
    filled = confidence.plain(long_documents.fill(tree(known, 0.9), tree(other, 0.9)))
    assert filled == {"company": "ACME", "to": {"name": "X", "city": "P"}, "lines": [1], "note": None, "total": 9}


def test_an_answer_to_a_piece_may_leave_fields_out():
    item = {"type": "object", "properties": {"qty": {"type": "integer"}}, "required": ["qty"]}
    schema = {
        "type": "object",
        "properties": {
            "required": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            "lines": {"type": "array", "items": item, "minItems": 1},
        },
        "required": ["required", "lines"],
    }
    part = long_documents.optional(schema)
    for answer in ({}, {"required": {}}, {"lines": []}, {"lines": [{"qty": 1}]}):
        assert json_schema.errors(answer, part) == []
    assert json_schema.errors({"lines": [{}]}, part)
    assert json_schema.errors({}, schema)
    assert long_documents.optional(True) is True


def test_definitions_are_left_out_too_where_they_are_fields_but_not_as_items():
    person = {"type": "object", "properties": {"name": {"type": "string"}, "boss": {"$ref": "#/$defs/person"}},
              "required": ["name"]}  # fmt: skip
    schema = {
        "$defs": {"person": person},
        "allOf": [{"type": "object", "properties": {"to": {"$ref": "#/$defs/person"}}, "required": ["to"]}],
        "properties": {"from": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
                       "all": {"type": "array", "items": {"$ref": "#/$defs/person"}}},
        "required": ["from"],
    }  # fmt: skip
    part = long_documents.optional(schema)
    for answer in ({}, {"to": {}}, {"to": {"boss": {}}}, {"from": {}, "all": [{"name": "A"}]}):
        assert json_schema.errors(answer, part) == []
        assert json_schema.errors(answer, schema)
    assert json_schema.errors({"all": [{}]}, part) and json_schema.errors({"all": [{"name": "A", "boss": {}}]}, part)
    assert json_schema.preflight(part).enforced


@pytest.mark.parametrize("where", long_documents.DEFINITIONS)
def test_definitions_that_nothing_refers_to_are_left_out(where):
    place = {"type": "string"}
    person = {"type": "object", "properties": {"at": {"$ref": f"#/{where}/place"}}, "required": ["at"]}
    others = {"a b": place, "marked": {"$anchor": "here"}}  # to which other references may point
    schema = {
        where: {"person": person, "place": place, "unused": place, **others},
        "properties": {"to": {"$ref": f"#/{where}/person"}},
    }
    part = long_documents.optional(schema)
    assert part.get("$defs", {}) | part.get(where, {}) == {
        "person_part": {"type": "object", "properties": {"at": {"$ref": "#/$defs/place_part"}}},
        "place_part": place,
        **others,
    }
    schema["properties"]["all"] = {"type": "array", "items": {"$ref": f"#/{where}/person"}}
    part = long_documents.optional(schema)
    assert set(part[where]) - {"person_part", "place_part"} == {"person", "place", *others}


def test_each_prompt_of_a_piece_fits(tokenizer, monkeypatch):
    """Also that which has a definition twice, as its items are whole where its fields are not."""
    fields = {f"field_{number}": {"type": "string"} for number in range(12)}
    address = {"type": "object", "properties": fields, "required": list(fields)}
    link = {"$ref": "#/$defs/address"}
    schema = {
        "$defs": {"address": address},
        "type": "object",
        "properties": {"to": link, "stops": {"type": "array", "items": link}},
    }
    loaded = LoadedModel(SimpleNamespace(config=Qwen2Config(max_position_embeddings=8192)), tokenizer, 8192)
    extractor = Extractor(loaded, schema, None, ExtractionSettings(64, max_len=4096))
    bare, longer = (len(extractor.encode("", part)) for part in (False, True))
    assert longer > bare
    encoded = functools.cache(extractor.encode)  # the room that there is changes no prompt
    monkeypatch.setattr(Extractor, "encode", lambda self, document, part=False: encoded(document, part))
    lines = [f"{number} Cable {number}.50" for number in range(300)]
    for most in range(longer + 120, longer + 520, 40):
        extractor = Extractor(loaded, schema, None, ExtractionSettings(64, max_len=most + 64))
        pieces = extractor.pieces("\n".join(lines))
        assert max(len(extractor.encode(piece, part)) for piece in pieces for part in (False, True)) <= most
    documents = ["\n".join(lines[:number]) for number in range(1, 100)]
    whole = max((text for text in documents if len(extractor.encode(text)) <= most), key=len)
    assert len(extractor.encode(whole, part=True)) > most and extractor.pieces(whole) == [whole]
    tight = Extractor(loaded, schema, None, ExtractionSettings(64, max_len=bare + 64 + 40))  # no room for a part
    assert (tight.pieces(lines[0]), tight.pieces("\n".join(lines))) == ([lines[0]], [])
    with pytest.raises(UserError, match=f"the schema takes {bare} tokens and the answer 64"):
        Extractor(loaded, schema, None, ExtractionSettings(64, max_len=bare + 64))


def test_a_document_is_cut_between_blocks():
    text = "a first line\n" * 14 + "\n" + "another line\n" * 18
    left, right = long_documents.halves(text)
    assert left == "a first line\n" * 14 + "\n"
    assert right.endswith("another line\n" * 18)
