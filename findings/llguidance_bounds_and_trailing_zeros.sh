#!/usr/bin/env bash
# llguidance 1.9.1: a bound on a number also decides how the number may be written.
#
# {"type": "number"} admits 0.50 and 1e1. With "exclusiveMinimum": 0, "0.5" is admitted and "0.50" or "0.10" are not,
# although they are above 0; with "minimum": 0 both are. Any bound, and "multipleOf", rules out exponents ("1e1"), and
# "multipleOf": 0.1 rules out "12.50" but not "12.5". So a model that copies an amount from a document ("0.50") cannot
# under a schema that says "above 0": it is led to another spelling, or another number.
#
# Here numbers, dates and times are copied as the document writes them, as text, and read by code (common/tasks/idp/copies.py).
#
# Seen 2026-11-28 on CPython 3.11, x86-64. Exits 1 when a later release would print something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1
"$folder/venv/bin/python" - >"$folder/seen" <<'PYTHON'
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")
NUMBERS = ("0.5", "0.50", "0.10", "12.5", "12.50", "1e1")


def admits(schema: dict, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


for bound in ({}, {"minimum": 0}, {"exclusiveMinimum": 0}, {"minimum": 0.5}, {"multipleOf": 0.1}):
    schema = {"type": "number", **bound}
    print(bound or "no bound", *(text for text in NUMBERS if admits(schema, text)))
PYTHON
diff "$folder/seen" - <<'SEEN'
no bound 0.5 0.50 0.10 12.5 12.50 1e1
{'minimum': 0} 0.5 0.50 0.10 12.5 12.50
{'exclusiveMinimum': 0} 0.5 12.5 12.50
{'minimum': 0.5} 0.5 0.50 12.5 12.50
{'multipleOf': 0.1} 0.5 12.5
SEEN
cat "$folder/seen"
