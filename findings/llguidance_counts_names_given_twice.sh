#!/usr/bin/env bash
# llguidance 1.9.1: where an object's names are open, the grammar lets a name be given twice, and counts it twice.
#
# {"minProperties": 2, "additionalProperties": {"type": "integer"}} admits {"a": 1, "a": 2}. Read, that is an object with one
# property, which the validator of the same schema refuses: the grammar was kept, the answer is not valid. Names that match
# "patternProperties" repeat in the same way; listed ones ("properties") do not, nor does a listed name come back as an
# additional one. Under "maxProperties": 2 the third name is refused even where two of them are the same, so a model that has
# repeated a name can no longer give the others.
#
# Here minProperties above 1 is looked at after decoding where names are open, and an object with a name given twice is no
# answer (common/generation/json_schema.py).
#
# Seen 2026-12-01 on CPython 3.11, x86-64. Exits 1 when a later release would print something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1 jsonschema==4.26.0
"$folder/venv/bin/python" - >"$folder/seen" <<'PYTHON'
import json

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")
NUMBER = {"type": "integer"}
OPEN = {"type": "object", "additionalProperties": NUMBER}
CASES = [
    ("open, at least 2", OPEN | {"minProperties": 2}, '{"a":1,"a":2}'),
    ("open, at most 2", OPEN | {"maxProperties": 2}, '{"a":1,"a":2,"b":3}'),
    ("by pattern, at least 2", {"type": "object", "patternProperties": {"^x": NUMBER}, "minProperties": 2}, '{"x":1,"x":2}'),
    ("listed", {"type": "object", "properties": {"a": NUMBER}}, '{"a":1,"a":2}'),
    ("listed, then open", OPEN | {"properties": {"a": NUMBER}}, '{"a":1,"b":2,"a":3}'),
]
for name, schema, text in CASES:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    tokens = tokenizer.tokenize_str(text)
    admitted = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
    valid = Draft202012Validator(schema).is_valid(json.loads(text))
    print(f"{name}: {text} {'admitted' if admitted else 'refused'}, as read {'valid' if valid else 'not valid'}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
open, at least 2: {"a":1,"a":2} admitted, as read not valid
open, at most 2: {"a":1,"a":2,"b":3} refused, as read valid
by pattern, at least 2: {"x":1,"x":2} admitted, as read not valid
listed: {"a":1,"a":2} refused, as read valid
listed, then open: {"a":1,"b":2,"a":3} refused, as read valid
SEEN
