"""Schemas are checked in processes that can be ended. A process that sleeps takes the place of one that is busy."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.processes import wait_for
from support.served import serve

from common.serving import schema_checks
from common.serving.model_process import QueueFull
from common.serving.schema_checks import SchemaChecks

pytestmark = pytest.mark.processes

STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    schema = json.loads(line)["schema"]
    if schema in ("sleep", {"title": "sleep"}):
        open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
        time.sleep(600)
    if schema == "die":
        sys.exit(1)
    print(json.dumps({"error": None if schema is True else f"refused {schema}"}), flush=True)
"""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "sleepers"


@pytest.fixture
def command(log) -> list[str]:
    return [sys.executable, "-c", STAND_IN, str(log)]


def checked(checks: SchemaChecks, *schemas: object) -> list:
    """What the checks say of schemas that come at once."""

    async def run() -> list:
        try:
            return await asyncio.gather(*map(checks.fault, schemas), return_exceptions=True)
        finally:
            await checks.close()

    return asyncio.run(run())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_real_schemas():
    good = {"type": "object", "properties": {"a": {"type": "string"}}}
    faults = checked(SchemaChecks(), good, {"type": "no"}, {"$ref": "#/nothing"})
    assert faults[0] is None
    assert faults[1].startswith("not a valid draft 2020-12 schema: #/type: ")
    assert faults[2] == "#/$ref: '#/nothing' points at nothing in the schema; correct it"


def test_one_that_takes_too_long_is_refused_and_its_process_ended(command, log):
    faults = checked(SchemaChecks(command, seconds=0.5), "sleep", "b", True, "b")
    assert faults[0] == "the schema takes longer than 0.5 s to check; make it smaller or simpler"
    assert faults[1:] == ["refused b", None, "refused b"]
    (pid,) = map(int, log.read_text().split())
    assert not is_alive(pid)


def test_a_process_that_ends_is_replaced(command):
    assert checked(SchemaChecks(command), "die", "b") == [
        "the schema ends the process that checks it; simplify it", "refused b"]  # fmt: skip


def test_answers_are_remembered(command, log):
    checks = SchemaChecks(command, seconds=0.2)
    started = time.monotonic()

    async def twice() -> list:
        try:
            return [await checks.fault("sleep") for _ in range(2)]
        finally:
            await checks.close()

    first, second = asyncio.run(twice())
    assert first == second
    assert len(log.read_text().split()) == 1
    assert time.monotonic() - started < 30


def test_no_more_than_some_wait(command, monkeypatch):
    monkeypatch.setattr(schema_checks, "MAX_WAITING", 3)
    faults = checked(SchemaChecks(command), *"abcd")
    assert faults[:3] == ["refused a", "refused b", "refused c"]
    assert isinstance(faults[3], QueueFull)


def test_the_server_answers_others_while_a_schema_is_checked(runs, command, log, monkeypatch):
    with ThreadPoolExecutor(2) as pool, serve(runs) as served:
        served.server.schema_checks.command = command
        monkeypatch.setattr(served.server.schema_checks, "seconds", 1.0)
        body = {"document": "a", "run": "sft"}
        assert "refused" in served.refused(422, "/infer/idp", body | {"schema": {"type": "object"}})
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": "sleep"}}}
        chat = {"model": "sft", "messages": [{"role": "user", "content": "a"}], "response_format": wanted}
        late = pool.submit(served.refused, 422, "/infer/idp", body | {"schema": {"title": "sleep"}})
        also = pool.submit(served.refused, 422, "/v1/chat/completions", chat)
        wait_for(log.exists, 30)
        assert served.ask("GET", "/healthz")[0] == 200
        assert not late.done()
        assert "to check; make it smaller or simpler" in late.result()
        assert "to check; make it smaller or simpler" in also.result()
