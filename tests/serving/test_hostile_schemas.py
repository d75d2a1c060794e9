"""Schemas of every kind, from clients that mean harm: each gets an answer, and the server one for everybody else.

A small round of what bench/reliability.py does ten thousand times.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.hostile import schema_request
from support.served import serve

pytestmark = pytest.mark.processes

COUNT = 60
HALF = "\ud800"  # half a character, which JSON can write and UTF-8 cannot


def test_hostile_schemas(runs):
    statuses: list[int] = []
    done = threading.Event()
    with serve(runs) as served:

        def watch() -> None:
            while not done.is_set():
                assert served.ask("GET", "/healthz")[0] == 200
                time.sleep(0.02)

        def ask(number: int) -> None:
            path, body = schema_request(number)
            status, answer, _ = served.ask("POST", path, body)
            assert status in (200, 413, 422), (number, status, answer)  # some are larger than a body may be
            if status == 422:
                assert answer["error"]["message"]
            statuses.append(status)

        with ThreadPoolExecutor(5) as pool:
            watcher = pool.submit(watch)
            try:
                list(pool.map(ask, range(COUNT)))
            finally:
                done.set()
            watcher.result()
        assert served.post("/infer/sft", {"features": "Age: 23"})["prediction"]
        assert all(not process.closed.done() for process in served.processes)
    assert len(statuses) == COUNT
    assert {200, 422} <= set(statuses)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"schema": {"type": "string", "format": HALF}}, "format"),
        ({"schema": {"const": HALF}}, "schema"),
        ({"schema": {"const": float("nan")}}, "the schema holds a number that is not finite"),
        ({"schema": {"maximum": float("inf")}}, "the schema holds a number that is not finite"),
        *(
            ({"evidence": True, "lines": [{"text": "Total 50", "box": [0, 0, edge, 10]}]}, "box")
            for edge in (float("nan"), float("inf"), 10**400)
        ),
    ],
)
def test_what_an_answer_could_not_say_again_is_refused(served, more, sentence):
    body = {"document": "Total 50", "schema": {"type": "string", "maxLength": 3}, "run": "sft", "max_new_tokens": 9}
    status, answer, _ = served.ask("POST", "/infer/idp", body | more)
    assert status == 422 and sentence in answer["error"]["message"], answer
