"""Schemas are checked in processes that can be ended. A process that sleeps takes the place of one that is busy."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.processes import wait_for
from support.served import serve

from common.serving import helpers, schema_checks
from common.serving.helpers import Helpers
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
    if schema == "busy" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
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


def checks_by(command: list[str], seconds: float = 5.0) -> SchemaChecks:
    by = Helpers("unused", {"schema": True})
    by.command, by.seconds = command, seconds
    return SchemaChecks(by)


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
    faults = checked(checks_by(command, 2.0), "sleep", "b", True, "b")
    assert faults[0] == "the schema takes longer than 2 s to check; make it smaller or simpler"
    assert faults[1:] == ["refused b", None, "refused b"]
    (pid,) = map(int, log.read_text().split())
    assert not is_alive(pid)


def test_a_process_that_ends_is_replaced(command):
    assert checked(checks_by(command), "die", "b") == [
        "the schema ends the process that checks it; simplify it", "refused b"]  # fmt: skip


def test_answers_are_remembered(command, log):
    checks = checks_by(command, 1.0)

    async def twice() -> list:
        try:
            return [await checks.fault("sleep") for _ in range(2)]
        finally:
            await checks.close()

    first, second = asyncio.run(twice())
    assert first == second
    assert len(log.read_text().split()) == 1


def test_what_a_busy_moment_may_have_caused_is_forgotten_after_a_while(command, monkeypatch):
    checks = checks_by(command, 2.0)

    async def at_times(*seconds: float) -> list:
        try:
            answers = []
            for each in seconds:
                monkeypatch.setattr(schema_checks, "BRIEFLY", each)
                answers.append(await checks.fault("busy"))
            return answers
        finally:
            await checks.close()

    assert asyncio.run(at_times(0.0, 60.0)) == [
        "the schema takes longer than 2 s to check; make it smaller or simpler", "refused busy"]  # fmt: skip


@pytest.mark.parametrize("start", ["import time; time.sleep(600)", "raise SystemExit(1)"])
def test_a_process_that_does_not_start_is_no_fault_of_the_schema(command, monkeypatch, start):
    checks = checks_by([sys.executable, "-c", start])

    async def twice() -> str | None:
        try:
            with monkeypatch.context() as patch, pytest.raises(QueueFull):
                patch.setattr(helpers, "START_SECONDS", 0.5)
                await checks.fault("a")
            checks.helpers.command = command
            return await checks.fault("a")
        finally:
            await checks.close()

    assert asyncio.run(twice()) == "refused a"


def test_no_more_than_some_wait(command, monkeypatch):
    monkeypatch.setattr(helpers, "MAX_WAITING", 3)
    faults = checked(checks_by(command), *"abcd")
    assert faults[:3] == ["refused a", "refused b", "refused c"]
    assert isinstance(faults[3], QueueFull)


def test_the_server_answers_others_while_a_schema_is_checked(runs, command, log, monkeypatch):
    with ThreadPoolExecutor(2) as pool, serve(runs) as served:
        served.server.schema_checks.helpers.command = command
        monkeypatch.setattr(served.server.schema_checks.helpers, "seconds", 3.0)
        body = {"document": "a", "run": "sft"}
        assert "refused" in served.refused(422, "/infer/idp", body | {"schema": {"type": "object"}})
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": "sleep"}}}
        chat = {"model": "sft", "messages": [{"role": "user", "content": "a"}], "response_format": wanted}
        late = pool.submit(served.refused, 422, "/infer/idp", body | {"schema": {"title": "sleep"}})
        also = pool.submit(served.refused, 422, "/v1/chat/completions", chat)
        wait_for(log.exists)
        assert served.ask("GET", "/healthz")[0] == 200
        assert not late.done()
        assert "to check; make it smaller or simpler" in late.result()
        assert "to check; make it smaller or simpler" in also.result()


def test_evidence_that_takes_too_long_is_done_without(runs, log, monkeypatch):
    """Others are answered meanwhile, and the next request has its own."""
    sleeper = f"open({str(log)!r}, 'w'); import time; time.sleep(600)"
    schema = {"const": "a"}
    body = {"document": "a b", "schema": schema, "run": "sft", "evidence": True}
    with ThreadPoolExecutor(1) as pool, serve(runs) as served:
        real = served.server.evidence.command
        served.server.evidence.command = [
            sys.executable, "-c", f"print(input() and '{{}}', flush=True); input(); {sleeper}"]  # fmt: skip
        monkeypatch.setattr(served.server.evidence, "seconds", 2.0)
        late = pool.submit(served.post, "/infer/idp", body)
        wait_for(log.exists)
        assert served.ask("GET", "/healthz")[0] == 200
        answer = late.result()
        assert (answer["fields"], answer["evidence"], answer["document"]) == ("a", None, "a b")
        assert "could not be found in time" in answer["notes"][0]
        served.server.evidence.command = real
        monkeypatch.setattr(served.server.evidence, "seconds", 60.0)
        answer = served.post("/infer/idp", body)
        assert answer["evidence"]["$"]["found"]
        assert answer["notes"] == []
