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
