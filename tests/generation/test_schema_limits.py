"""Schemas that ask for too much are refused by name, and work on one ends in time."""

from __future__ import annotations

import time

import pytest

from common.cli import UserError
from common.generation import json_schema
from common.generation.schema_limits import check_limits

TEXT = {"type": "string"}
TOO_MUCH = {
    "properties": (
        {f"p{n}": {"properties": {f"q{m}": TEXT for m in range(70)}} for n in range(60)},
        "4,260 properties",
    ),
    "branches": ({"x": {"anyOf": [TEXT] * 501}}, "501 branches under anyOf; 500 are the most"),
    "all branches": ({f"p{n}": {"oneOf": [TEXT] * 400} for n in range(8)}, "3,200 branches; 3,000 are the most"),
    "pattern": ({"x": {"pattern": "a" * 1001}}, "a pattern of 1,001 characters; 1,000 are the most"),
    "name pattern": ({"x": {"patternProperties": {"b" * 2000: TEXT}}}, "a pattern of 2,000 characters"),
    "repetition": (
        {"x": {"pattern": "a{999999999999}"}},
        "a pattern that cannot be read (the repetition number is too",
    ),
    "patterns": ({f"p{n}": {"pattern": f"a{n}"} for n in range(301)}, "301 patterns; 300 are the most"),
    "values": ({"x": {"enum": list(range(10_001))}}, "10,001 values under enum; 10,000 are the most"),
    "length": ({"x": {"minLength": 10**7}}, "minLength 10000000; 1,000,000 are the most"),
    "items": ({"x": {"type": "array", "minItems": 10**400}}, "minItems 100000000000"),
    "entries": ({f"p{n}": TEXT for n in range(1001)}, "an object of more than 1,000 entries"),
    "size": ({"x": {"const": "x" * 300_000}}, "larger than 256 KiB"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_is_named(name):
    properties, named = TOO_MUCH[name]
    with pytest.raises(UserError) as raised:
        json_schema.preflight({"type": "object", "properties": properties})
    assert named in str(raised.value)


def test_what_is_not_too_much_passes():
    properties = {f"p{n}": {"anyOf": [TEXT, {"pattern": "^a*$"}]} for n in range(100)}
    check_limits({"type": "object", "properties": properties, "enum": [{"pattern": 3, "anyOf": "x"}]})
    check_limits(True)


def sleep(*args: object) -> None:
    time.sleep(30)


def test_preflight_ends_in_time(monkeypatch):
    """A check that sleeps takes the place of one that takes for ever."""
    monkeypatch.setattr(json_schema, "check_limits", sleep)
    with pytest.raises(UserError, match=r"takes longer than 0\.2 s to check; make it smaller or simpler"):
        json_schema.preflight({"type": "string"}, seconds=0.2)


def test_validation_ends_in_time(monkeypatch):
    monkeypatch.setattr(json_schema, "Registry", sleep)
    monkeypatch.setattr(json_schema, "VALIDATION_SECONDS", 0.2)
    answer = json_schema.parse('"a"', {"type": "string"})
    assert answer.value is None
    assert answer.error.endswith("to check it takes longer than 0.2 s; make the schema simpler")


def test_nullable_of_openapi_is_not_passed_over():
    """With it null was meant to be allowed, which the keyword does not do here."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}
    with pytest.raises(UserError, match=r"#/properties/a/nullable: it is OpenAPI 3.0\'s; name null among the types"):
        json_schema.preflight(schema)
    json_schema.preflight({"type": "string", "nullable": False})
