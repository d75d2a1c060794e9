"""Schemas of every kind, from clients that mean harm: each gets an answer, and the server one for everybody else.

HOSTILE_SCHEMAS=10000 asks so many; what /healthz took meanwhile is printed (pytest -s).
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.served import serve

pytestmark = pytest.mark.processes

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


def test_hostile_schemas(runs):
    count = int(os.environ.get("HOSTILE_SCHEMAS", "60"))
    statuses: list[int] = []
    waits: list[float] = []
    done = threading.Event()
    with serve(runs) as served:

        def watch() -> None:
            while not done.is_set():
                started = time.perf_counter()
                assert served.ask("GET", "/healthz")[0] == 200
                waits.append(time.perf_counter() - started)
                time.sleep(0.02)

        def ask(number: int) -> None:
            rng = random.Random(number)
            hostile = deep(rng) if number % 10 == 0 else schema(rng)
            if number % 3:
                body = {"document": "a", "schema": hostile, "run": "sft", "max_new_tokens": 4}
                status, answer, _ = served.ask("POST", "/infer/idp", body)
            else:
                wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile}}
                turns = [{"role": "user", "content": "a"}]
                body = {"model": "sft", "messages": turns, "response_format": wanted, "max_tokens": 4}
                status, answer, _ = served.ask("POST", "/v1/chat/completions", body)
            assert status in (200, 413, 422), (number, status, answer)  # some are larger than a body may be
            if status == 422:
                assert answer["error"]["message"]
            statuses.append(status)

        with ThreadPoolExecutor(5) as pool:
            watcher = pool.submit(watch)
            try:
                list(pool.map(ask, range(count)))
            finally:
                done.set()
            watcher.result()
        assert served.post("/infer/sft", {"features": "Age: 23"})["prediction"]
        assert all(not process.closed.done() for process in served.processes)
    assert len(statuses) == count
    assert {200, 422} <= set(statuses)
    ordered = sorted(waits)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    figures = {"median": statistics.median(waits), "p99": p99, "most": ordered[-1]}
    print(f"\n{count} schemas, {statuses.count(200)} followed; /healthz {len(waits)} times:", end=" ")
    print(", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in figures.items()))
