"""Formats of strings: IRIs as RFC 3987 has them, and none that jsonschema knows is lost."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from common.generation import json_schema, string_formats

IRIS = [
    "http://ƒøø.ßår/?∂éœ=πîx#πîüx",
    "http://-.~_!$&'()*+,;=:%40:80%2f::::::@example.com",
    "http://[2001:0db8:85a3:0000:0000:8a2e:0370:7334]",
    "urn:日本",
    "http://例え.テスト/パス?クエリ#部",
    "http://a/?\ue000\U000f0000",  # private characters, in the query
    "http://a/\U000e1001",
    "mailto:é@ü.de",
    "a:",
]
REFERENCES = ["", "//ƒøø.ßår/?∂éœ=πîx#πîüx", "/âππ", "âππ", "#ƒrägmênt", "/abc"]
NEITHER = [
    "\\\\WINDOWS\\filëßåré",
    "#ƒräg\\mênt",
    "http://2001:0db8:85a3:0000:0000:8a2e:0370:7334",
    "http://a b",
    "http://a/%zz",
    "http://a/\ue000",  # private, outside the query
    "http://a/#\ue000",
    "http://a/\ufffe",
    "http://a/\ufdd0",
    "http://a/\U000e0001",
    "http://a\u0085",
    "<a:b>",
    "http://[é]/",
    "a:é#é#é",
]


@pytest.mark.parametrize("text", IRIS)
def test_an_iri(text):
    assert string_formats.is_iri(text) and string_formats.is_iri_reference(text)


@pytest.mark.parametrize("text", REFERENCES)
def test_a_reference_alone(text):
    assert string_formats.is_iri_reference(text) and not string_formats.is_iri(text)


@pytest.mark.parametrize("text", NEITHER)
def test_neither(text):
    assert not string_formats.is_iri(text) and not string_formats.is_iri_reference(text)


def test_the_uri_of_an_iri():
    assert string_formats.as_uri("http://a/é?ß#日") == "http://a/%C3%A9?%C3%9F#%E6%97%A5"


def test_the_validator_asks_for_them():
    schema = {"type": "string", "format": "iri"}
    assert json_schema.errors("http://例え/", schema) == [] == json_schema.errors(3, {"format": "iri"})
    assert json_schema.errors("no iri", schema) != []


def test_none_of_jsonschema_is_lost():
    assert set(string_formats.CHECKER.checkers) == {
        *Draft202012Validator.FORMAT_CHECKER.checkers,
        "iri",
        "iri-reference",
    }
