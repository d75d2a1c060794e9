"""JSON Schemas: what of one is enforced, checked or refused, and how JSON under one is written and read."""

from __future__ import annotations

import json

import pytest
from support.inputs import SHARED

from common.cli import UserError
from common.generation import json_schema, json_writer

CASES = SHARED / "data" / "jsonschema" / "cases.jsonl"


def accepts(schema, text: str) -> bool:
    """Whether the grammar of a schema lets a whole document through."""
    matcher = json_schema.compile_grammar(json_schema.preflight(schema).grammar_schema, json_schema.byte_tokenizer())
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


def treatments(schema, **kwargs) -> dict[str, str]:
    return {keyword.path: keyword.treatment for keyword in json_schema.preflight(schema, **kwargs).keywords}


def test_keywords_are_classed_with_their_paths():
    schema = {
        "title": "Invoice",
        "type": "object",
        "properties": {
            "date": {"type": "string", "format": "date"},
            "tags": {"type": "array", "uniqueItems": True},
            "a/b": {"type": "string", "pattern": "^(?=a)"},
            "total": {"$ref": "#/$defs/money"},
        },
        "if": {"required": ["date"]},
        "then": {"required": ["total"]},
        "$defs": {"money": {"type": "number", "multipleOf": 0.01}, "unused": {"format": "phone"}},
    }
    assert treatments(schema) == {
        "#/type": "enforced",
        "#/properties": "enforced",
        "#/if": "checked",
        "#/then": "checked",
        "#/properties/date/type": "enforced",
        "#/properties/date/format": "enforced",
        "#/properties/tags/type": "enforced",
        "#/properties/tags/uniqueItems": "checked",
        "#/properties/a~1b/type": "enforced",
        "#/properties/a~1b/pattern": "checked",
        "#/properties/total/$ref": "enforced",
        "#/$defs/money/type": "enforced",
        "#/$defs/money/multipleOf": "checked",
    }
    assert not json_schema.preflight(schema).enforced
    assert schema["properties"]["date"] == {"type": "string", "format": "date"}  # the caller's is left alone


@pytest.mark.parametrize(
    ("keyword", "treatment"),
    [
        ({"format": "email"}, "enforced"),
        ({"format": "uri"}, "enforced"),
        ({"format": "regex"}, "checked"),
        ({"format": "idn-email"}, "checked"),
        ({"pattern": r"^\d{3}-\w+$"}, "enforced"),
        ({"pattern": r"^[^\d]$"}, "checked"),  # ASCII digits to the engine, Unicode's to the validator
        ({"pattern": r"^\W$"}, "checked"),
        ({"pattern": r"^[a[b]$"}, "checked"),  # a nested class to the engine
        ({"pattern": r"^(a)\1$"}, "checked"),
        ({"not": {"const": 1}}, "checked"),
        ({"uniqueItems": False}, "enforced"),
        ({"multipleOf": 5}, "enforced"),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, "enforced"),
        ({"oneOf": [{"minLength": 2}, {"maxLength": 4}]}, "checked"),
        ({"minProperties": 1}, "enforced"),
        ({"minProperties": 2}, "checked"),  # a name could come twice
        ({"format": "uuid", "type": "string", "pattern": "^(?=.*a)"}, "enforced"),
    ],
)
def test_treatment(keyword, treatment):
    name = next(iter(keyword))
    assert treatments(keyword)[f"#/{name}"] == treatment


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"p": {"format": "phone"}}}, "#/properties/p/format: nothing here knows the format 'phone'"),
        ({"dependencies": {"a": ["b"]}}, "dependentRequired"),
        ({"not": {"format": "phone"}}, "#/not/format: nothing here knows"),
    ],
)
def test_unsupported_stops_unless_best_effort(schema, message):
    with pytest.raises(UserError, match="--best_effort") as refusal:
        json_schema.preflight(schema)
    assert message in str(refusal.value)
    assert "unsupported" in treatments(schema, best_effort=True).values()


def bomb(branch, depth: int = 30) -> dict:
    """Definitions that each use the next one twice: 2 to the power of `depth` in all."""
    steps = {f"d{i}": branch({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{depth}": {"type": "string"}}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def pair(part: dict) -> dict:
    return {"type": "object", "properties": {"a": part, "b": part}, "required": ["a", "b"]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "not a valid draft 2020-12 schema: #/type"),
        ({"type": "number", "exclusiveMinimum": True}, "not a valid draft 2020-12 schema: #/exclusiveMinimum"),
        ({"pattern": "("}, "not a valid draft 2020-12 schema: #/pattern"),
        ([], "not a valid draft 2020-12 schema"),
        ({"$ref": "https://example.com/a.json"}, "another document; put that schema under $defs"),
        ({"not": {"$ref": "https://example.com/a.json"}}, "another document"),
        ({"$ref": "#/$defs/a"}, "points at nothing"),
        (False, "nothing satisfies"),
        ({"enum": []}, "nothing satisfies the schema: #: enum is empty"),
        ({"type": "number", "minimum": 5, "maximum": 3}, "minimum 5 leaves nothing below maximum 3"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "nothing satisfies the schema: #: minLength 5"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "minItems": 2, "maxItems": 1}}, "required": ["a"]},
            "nothing satisfies the schema: #/properties/a: minItems 2",
        ),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a' is not allowed"),
        ({"type": "object", "additionalProperties": False, "required": ["a"]}, "required property 'a'"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "in finitely many steps"),
        ({"type": "string", "enum": [1]}, "nothing satisfies"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "nothing satisfies"),
        ({"type": "string", "pattern": "^a$", "format": "date"}, "nothing satisfies"),
        ({"$dynamicRef": "#"}, "lead back to themselves"),
        ({"$ref": "#"}, "lead back to themselves"),
        (bomb(lambda part: {"allOf": [part, part]}), "multiply"),
        (bomb(lambda part: {"anyOf": [part, part]}), "multiply"),
        (bomb(lambda part: {"not": {"allOf": [part, part]}}), "multiply"),
        (bomb(pair), "smallest document"),
        ({"type": "array", "minItems": 10**9}, "minItems 1000000000; 1,000,000 are the most"),
        (nested(100), "nested deeper than"),
        ({"description": "x" * 300_000}, "larger than 256 KiB"),
        ({"properties": {str(i): {} for i in range(2000)}}, "more than 1,000 entries"),
    ],
)
def test_refusal_is_one_sentence(schema, message):
    with pytest.raises(UserError) as refusal:
        json_schema.preflight(schema)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_large_but_harmless_passes():
    json_schema.preflight({"type": "array", "maxItems": 10**9, "items": {"type": "string", "maxLength": 10**9}})
    json_schema.preflight({"type": "string", "pattern": "^a{9000}$|^b$"})
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}, "name": {"type": "string"}}}
    assert json_schema.preflight(tree).enforced
    assert json_schema.preflight(True).enforced


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        (
            {"type": "string", "format": "date"},
            ["2024-02-29", "2025-12-31"],
            ["2025-02-29", "2025-04-31", "0000-01-01"],
        ),
        ({"type": "string", "format": "time"}, ["12:30:00Z", "12:30:00.5+01:00"], ["12:30", "24:00:00Z", "12:30:60Z"]),
        ({"type": "string", "format": "date-time"}, ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2024-02-29"]),
        ({"type": "string", "format": "email"}, ["a@b.org"], ["a", "a@", "a b@c.org"]),
        ({"type": "string", "format": "uri"}, ["https://a.org/b?c=d#e"], ["a b", "//a.org", "/a"]),
        ({"type": "string", "format": "hostname"}, ["a-b.org"], ["-a.org", "a_b", ".".join(["abc"] * 64)]),
        ({"type": "string", "format": "ipv6"}, ["::1"], ["1.2.3.4", ":::"]),
    ],
)
def test_formats_are_enforced_as_strictly_as_they_are_checked(schema, accepted, refused):
    assert all(accepts(schema, json.dumps(text)) and not json_schema.errors(text, schema) for text in accepted)
    assert not any(accepts(schema, json.dumps(text)) for text in refused)


def test_the_grammar_is_compact_canonical_and_in_order():
    schema = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "string"}}}
    assert accepts(schema, '{"a":1,"b":"é \\" \\n"}')
    for text in (
        '{"a": 1}',  # white space
        '{"b":"x","a":1}',  # order
        '{"a":1e5}',
        '{"b":"\\u00e9"}',
        '{"a":1,"a":2}',
        '{"\\u0061":"x"}',  # a property under another spelling, where it would be free
    ):
        assert not accepts(schema, text)


def test_switches_of_the_engine_in_a_schema_are_without_effect():
    assert not accepts({"type": "integer", "x-guidance": {"whitespace_flexible": True, "lenient": True}}, " 1")


@pytest.mark.parametrize(
    ("value", "schema", "text"),
    [
        ({"b": 1, "a": 2}, {"properties": {"a": {}, "b": {}}}, '{"a":2,"b":1}'),
        ({"z": 1, "b": 2, "a": 3}, {"properties": {"a": {}}, "required": ["b"]}, '{"a":3,"b":2,"z":1}'),
        ([{"b": 1, "a": 2}], {"items": {"properties": {"a": {}, "b": {}}}}, '[{"a":2,"b":1}]'),
        ([{"b": 1, "a": 2}], {"prefixItems": [{"properties": {"a": {}}}]}, '[{"a":2,"b":1}]'),
        (
            {"b": {"y": 1, "x": 2}, "a": 0},
            {"$ref": "#/$defs/o", "$defs": {"o": {"properties": {"a": {}, "b": {"properties": {"x": {}}}}}}},
            '{"a":0,"b":{"x":2,"y":1}}',
        ),
        (
            {"k": 2, "b": 1},
            {"anyOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"b": {}, "k": {"const": 2}}}]},
            '{"b":1,"k":2}',
        ),
        ({"b": 1, "a": 2}, {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a":2,"b":1}'),
        ({"b": 1, "a": 2}, {"enum": [{"b": 1, "a": 2}]}, '{"b":1,"a":2}'),
        ("Straße № 5 \u2028", {}, '"Straße № 5 \u2028"'),
        ("a\x00b\nc\x7f", {}, '"a b\\nc "'),
        ([50.0, 12.5, 1e-7, 1e16, -0.25, True, None], {}, "[50,12.5,0.0000001,10000000000000000,-0.25,true,null]"),
    ],
)
def test_dumps_writes_what_the_grammar_lets_through(value, schema, text):
    assert json_writer.dumps(value, schema) == text
    assert accepts(schema, text)


def test_dumps_refuses_numbers_that_json_has_not():
    with pytest.raises(ValueError, match="nan is not a number in JSON"):
        json_writer.dumps([float("nan")], {})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"total":19.99}', None),
        ('{"total":19.9', "breaks off before its end; raise --max_new_tokens"),
        ('{"tot', "breaks off"),
        ("", "breaks off"),
        ("Sure! {}", "not JSON: Expecting value at character 0"),
        ("{} {}", "not JSON: Extra data"),
        ('{"total":1,"total":2}', "the name 'total' is given twice"),
        ('{"total":1e999}', "not a finite number"),
        ('{"total":NaN}', "not a finite number"),
        ('{"total":"1"}', "does not satisfy the schema: $.total: '1' is not of type 'number'"),
        ('{"total":19.999}', "is not a multiple of 0.01"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_parse(text, error):
    schema = {"type": "object", "properties": {"total": {"type": "number", "multipleOf": 0.01}}}
    answer = json_schema.parse(text, schema)
    assert answer.text == text
    if error is None:
        assert (answer.value, answer.error) == ({"total": 19.99}, None)
    else:
        assert answer.value is None
        assert error in answer.error


def test_load_names_the_remedy(tmp_path):
    path = tmp_path / "schema.json"
    with pytest.raises(UserError, match="give the path of a JSON Schema"):
        json_schema.load(path)
    path.write_text('{"type": ')
    with pytest.raises(UserError, match="is not JSON"):
        json_schema.load(path)
    path.write_text('{"type": "object"}')
    assert json_schema.load(path) == {"type": "object"}


@pytest.mark.processes
@pytest.mark.skipif(not CASES.exists(), reason="needs the schemas from the wild")
def test_schemas_from_the_wild():
    """What preflight calls enforced lets no invalid instance through, and hardly a valid one is kept out."""
    kept_out = valid = 0
    for line in CASES.read_text(encoding="utf-8").splitlines()[::4]:
        case = json.loads(line)
        try:
            found = json_schema.preflight(case["schema"], best_effort=True)
        except UserError:
            continue
        matcher = json_schema.compile_grammar(found.grammar_schema, json_schema.byte_tokenizer())
        for instance in case["tests"]:
            matcher.reset()
            data = list(json_writer.dumps(instance["data"], case["schema"]).encode())
            accepted = matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
            valid += instance["valid"]
            kept_out += instance["valid"] and not accepted
            assert not (accepted and found.enforced and not instance["valid"]), case["name"]
    assert valid > 80
    assert kept_out <= 0.03 * valid
