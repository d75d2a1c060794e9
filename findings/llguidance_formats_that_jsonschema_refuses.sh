#!/usr/bin/env bash
# llguidance 1.9.1 with jsonschema 4.26.0: under one schema with "format" a grammar writes what the validator refuses.
#
# A grammar of "date" knows how many days a month has, but not which years are leap years, and begins with the year 0.
# One of "time" admits second 60 at any minute; jsonschema, which reads times by rfc3339-validator, at none, although
# RFC 3339 has 23:59:60Z. So a model that is held to a grammar can still answer with JSON that is not valid. The other way
# round a grammar rules out what is valid: two dots in a row or a quoted name in an email (RFC 5321), an IPv6 address that
# ends in an IPv4 one, a host name with the root's dot.
#
# Here "date" is a pattern of our own, and what was decoded is validated all the same (common/generation).
#
# Seen 2026-11-29 on CPython 3.11, x86-64. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1 'jsonschema[format-nongpl]==4.26.0' \
  rfc3339-validator==0.1.4
"$folder/venv/bin/python" - >"$folder/seen" <<'PYTHON'
import json

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")
TEXTS = {
    "date": ["2024-02-29", "2023-02-29", "2023-02-30", "0000-01-01"],
    "time": ["12:00:00Z", "12:00:60Z", "23:59:60Z", "24:00:00Z"],
    "date-time": ["2023-02-29T12:00:00Z", "2024-01-01T12:00:60Z"],
    "email": ["a@b.c", "a..b@c.d", '"a b"@c.d'],
    "hostname": ["a.b", "a.", "-a.b"],
    "ipv6": ["::1", "::ffff:1.2.3.4"],
}


def admits(schema: dict, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    tokens = tokenizer.tokenize_str(json.dumps(text))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


for name, texts in TEXTS.items():
    schema = {"type": "string", "format": name}
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for text in texts:
        written, valid = admits(schema, text), validator.is_valid(text)
        if written != valid:
            print(f"{name} {text}:", "written, not valid" if written else "valid, not written")
PYTHON
diff "$folder/seen" - <<'SEEN'
date 2023-02-29: written, not valid
date 0000-01-01: written, not valid
time 12:00:60Z: written, not valid
time 23:59:60Z: written, not valid
date-time 2023-02-29T12:00:00Z: written, not valid
date-time 2024-01-01T12:00:60Z: written, not valid
email a..b@c.d: valid, not written
email "a b"@c.d: valid, not written
hostname a.: valid, not written
ipv6 ::ffff:1.2.3.4: valid, not written
SEEN
cat "$folder/seen"
