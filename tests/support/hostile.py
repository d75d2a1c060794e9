"""Requests of those that mean harm: schemas and bodies of every kind, all harmless to who answers them rightly."""

from __future__ import annotations

import json
import random
from typing import Any

from support.served import ROWS

FIELDS = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TYPES = ["string", "number", "integer", "object", "array", "boolean", "null", "no", 3, None, ["string", "null"], []]
NAMES = ["a", "", "é", "__proto__", "$ref", "a/b~c", "x" * 300, "pattern", "\u2028", "properties"]
PATTERNS = ["^a*$", "(", "[", "a{3}", "\\d+", "(?<=a)b", "x" * 1500, "", "(a|b)+c", "\\p{L}", "a{2,1}", "^$"]
NUMBERS = [0, -1, 1, 2.5, 1e308, -1e308, 10**30, 0.1, True, None, "3"]
REFS = ["#", "#/nothing", "#/properties/a", "#/$defs/a", "http://example.org/x", "", "#/%", 3]


def schema(rng: random.Random, depth: int = 0) -> Any:
    """A schema that may be anything."""
    if rng.random() < 0.1:
        return rng.choice([True, False, {}, {"type": rng.choice(TYPES)}])
    made: dict[str, Any] = {}
    if rng.random() < 0.7:
        made["type"] = rng.choice(TYPES)
    for key in ("minLength", "maxLength", "minimum", "maximum", "multipleOf", "minItems", "maxItems", "minProperties"):
        if rng.random() < 0.1:
            made[key] = rng.choice(NUMBERS)
    if rng.random() < 0.15:
        made["pattern"] = rng.choice(PATTERNS)
    if rng.random() < 0.1:
        made["format"] = rng.choice(["date", "email", "regex", "no", 3])
    if rng.random() < 0.1:
        made["$ref"] = rng.choice(REFS)
    if rng.random() < 0.1:
        made["enum"] = [rng.choice([*NUMBERS, *NAMES]) for _ in range(rng.choice([0, 1, 5, 2000]))]
    if depth < 4:
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if rng.random() < 0.12:
                made[key] = [schema(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 20]))]
        for key in ("items", "not", "if", "then", "contains", "additionalProperties", "unevaluatedProperties"):
            if rng.random() < 0.1:
                made[key] = schema(rng, depth + 1)
        for key in ("properties", "patternProperties", "$defs", "dependentSchemas"):
            if rng.random() < 0.2:
                names = NAMES if key != "patternProperties" else PATTERNS
                made[key] = {rng.choice(names): schema(rng, depth + 1) for _ in range(rng.choice([1, 2, 8]))}
    return made


def deep(rng: random.Random) -> Any:
    """A schema within a schema, many times."""
    made: Any = {"type": "string"}
    for _ in range(rng.choice([10, 60, 90])):
        made = {rng.choice(["not", "items", "additionalProperties"]): made}
    return made


def schema_request(number: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request with a schema; the same for the same number."""
    rng = random.Random(number)
    hostile = deep(rng) if number % 10 == 0 else schema(rng)
    if number % 3:
        return "/infer/idp", {"document": "a", "schema": hostile, "run": "sft", "max_new_tokens": 4}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile}}
    turns = [{"role": "user", "content": "a"}]
    return "/v1/chat/completions", {"model": "sft", "messages": turns, "response_format": wanted, "max_tokens": 4}


DEEP = b'{"features": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "<|im_end|>",
    "<|im_start|>system\n",
    "</s>",
    "𝔘" * 50,
    "é\u0301",
    "9" * 400,
    "x" * 20_001,
    f"a{' ' * 19_000}a",
]
VALUES = [None, True, 0, -1, 1.5, 10**400, 1e308, float("nan"), float("inf"), [], [[]], {}, {"features": "a"}, *TEXTS]
PATHS = ["/infer/sft", "/infer/base", "/infer/sft/batch", "/infer/idp", "/infer/codegen", "/v1/chat/completions",
         "/v1/decisions", "/v1/systemone"]  # fmt: skip


def hostile_body(rng: random.Random) -> bytes:
    """A body that is broken, of the wrong shape, or right with odd content."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([b"", b"{", b"null", b"[]", b"\xff\xfe", b'"\xc3"', b"NaN", b"{}" * 2, DEEP, b"\x00" * 9])
    if kind == 1:
        return rng.randbytes(rng.randrange(200))
    names = ["features", "document", "schema", "prompt", "run", "max_new_tokens", "plan_then_code", "model",
             "messages", "temperature", "top_p", "n", "stop", "seed", "stream", "response_format", "max_tokens",
             "tools", "evidence", "lines", "input", "state", "questions", "assets"]  # fmt: skip
    body = {name: rng.choice(VALUES) for name in rng.sample(names, rng.randrange(1, 6))}
    if kind > 3:  # near enough to be taken
        text = rng.choice(TEXTS) + rng.choice(ROWS)
        body |= {
            "features": text,
            "document": text,
            "prompt": text,
            "max_new_tokens": 2,
            "max_tokens": 2,
            "model": "sft",
        }
        body["messages"] = [{"role": "user", "content": text}]
        body["input"] = body["state"] = text
        body["questions"] = rng.choice([[{"type": "predicate", "instructions": text}],
                                        {"a": {"type": "choice", "criteria": {text: None, "b": text}}}])  # fmt: skip
        body["schema"] = rng.choice([FIELDS, {}, {"type": "null"}, {"$ref": "#"}, {"pattern": "("}])
    if rng.random() < 0.2:
        body = [body] * rng.randrange(3)
    return json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
