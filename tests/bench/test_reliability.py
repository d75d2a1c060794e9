"""bench/reliability.py finds what it looks for, and small rounds of it find nothing."""

from __future__ import annotations

import json

import pytest
import reliability

pytestmark = pytest.mark.processes


def test_small_rounds_find_nothing(capsys, monkeypatch):
    monkeypatch.setattr(reliability, "FROZEN", 5.0)  # seconds; the tests do not measure
    sizes = ["--schemas", "5", "--bodies", "20", "--minutes", "0.03", "--only", "schemas", "bodies", "soak"]
    assert reliability.main(sizes) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["hostile schemas", "hostile bodies", "soak"]
    assert all(row["faults"] == 0 and row["healthz"] > 0 for row in result["rows"])
    assert sum(result["rows"][1]["statuses"].values()) == 20


def test_another_answer_and_a_frozen_server_are_found():
    answer = {"model_name": "a", "raw_scores": {"Good": -1.0, "Bad": -2.0}}
    assert reliability.same(answer, answer | {"raw_scores": {"Good": -1.00005, "Bad": -2.0}})
    assert not reliability.same(answer, answer | {"raw_scores": {"Good": -1.1, "Bad": -2.0}})
    assert not reliability.same(answer, answer | {"model_name": "b"})
    watch = reliability.Watch(server=None)
    watch.seconds = [0.01] * 99 + [5.0]
    assert not watch.frozen
    watch.seconds += [5.0] * 5
    assert watch.frozen
    assert watch.figures()["healthz_max_ms"] == 5000.0
