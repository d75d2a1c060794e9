"""The table of jobs, and the progress that is read from their folders."""

from __future__ import annotations

import json
import re
import sqlite3
import threading

import pytest

from common.jobs import progress
from common.jobs.folder import JobFolder
from common.jobs.store import SCHEMA, TO_CANCEL, KeyTaken, open_store


def test_a_key_with_another_request_is_refused_by_the_store(tmp_path):
    store = open_store(tmp_path)
    job = store.submit("sft", {"a": 1}, [], "0" * 16, "key")
    assert store.submit("sft", {"a": 1}, [], "1" * 16, "key") == job
    with pytest.raises(KeyTaken):
        store.submit("sft", {"a": 2}, [], "2" * 16, "key")


def test_a_table_of_before_stops_were_kept_is_read_as_it_is(tmp_path):
    before = re.sub(r",\s*--[^\n]*\n\s*stops TEXT[^\n]*", "", SCHEMA)
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        connection.executescript(before)
        values = "'a', 'sft', '{}', '[]', 1, 0"
        connection.execute(f"INSERT INTO job (id, method, request, commands, place, created) VALUES ({values})")
    store = open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "damaged" in path.name] == []
    assert (store.find("a").method, store.find("a").stops) == ("sft", [])
    assert [stop["state"] for stop in store.pause("a").stops] == ["paused"]


def test_claims_are_in_the_order_of_submission_also_after_a_resume(tmp_path):
    store = open_store(tmp_path)
    for number in range(3):
        store.submit("sft", {}, [], str(number), None)
    first = store.claim(0, "running")
    assert (first.id, first.attempt, first.state) == ("0", 1, "running")
    store.finish(first, "failed", {"reason": "x"}, [], 5)
    assert store.resume("0")
    assert not store.resume("0")  # it waits already
    assert [store.claim(0, "running").id for _ in range(3)] == ["1", "2", "0"]
    assert store.claim(0, "running") is None
    stale = first  # of the attempt before: it must not end this one
    store.finish(stale, "succeeded", None, [], 5)
    assert store.find("0").state == "running"


def test_a_job_is_paused_where_it_was_stopped_for_that_and_cancelled_where_both_were_asked(tmp_path):
    store = open_store(tmp_path)
    for number in range(3):
        store.submit("sft", {}, [], str(number), None)
    jobs = [store.claim(number, "running") for number in range(3)]
    for job in jobs:
        store.pause(job.id)
    store.cancel("1")
    assert store.pause("1").cancel == TO_CANCEL  # that stays
    for job, state in zip(jobs, ("cancelled", "cancelled", "succeeded"), strict=True):
        store.finish(job, state, None, [], 5)
    assert [store.find(job.id).state for job in jobs] == ["paused", "cancelled", "succeeded"]
    assert store.find("0").ended is None
    assert not store.delete("0")
    assert store.resume("0")
    assert store.claim(0, "running").attempt == 2


def test_many_threads_never_share_a_claim(tmp_path):
    store = open_store(tmp_path)
    for number in range(60):
        store.submit("sft", {}, [], str(number), None)
    claimed: list[str] = []

    def claim() -> None:
        while job := store.claim(0, "running"):
            claimed.append(job.id)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed, key=int) == [str(number) for number in range(60)]


def test_progress_of_a_training_that_went_on(tmp_path):
    folder = JobFolder(tmp_path)
    folder.artifacts.mkdir()
    assert progress.status(folder, False) == {"progress": None, "losses": {}}
    lines = [
        {"step": 0, "max_steps": 100, "time": 0.0},
        {"step": 10, "max_steps": 100, "time": 10.0, "loss": 3.0, "forward_kl": 2.0, "learning_rate": 0.1},
        {"step": 20, "max_steps": 100, "time": 20.0, "loss": 2.5, "forward_kl": float("nan"), "grad_norm": 1.0},
        {"step": 10, "max_steps": 100, "time": 1000.0},  # went on from step 10
        {"step": 20, "max_steps": 100, "time": 1005.0, "loss": 2.4, "forward_kl": 1.5},
        {"step": 20, "max_steps": 100, "time": 1006.0, "eval_loss": 2.2, "eval_runtime": 9.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.artifacts / "progress.jsonl").write_text(text + '{"step": 30, "max_st')  # half a line
    status = progress.status(folder, False)
    assert status["progress"] == {"step": 20, "total": 100, "percent": 20.0, "seconds_left": 48.0}
    assert status["losses"] == {"loss": 2.4, "forward_kl": 1.5, "eval_loss": 2.2}
    points = progress.curves(folder)
    assert [(point["step"], point.get("loss"), point.get("eval_loss")) for point in points] == [
        (10, 3.0, None), (20, 2.4, None), (20, None, 2.2)]  # fmt: skip


def test_a_progress_bar_in_a_log_is_what_it_showed_last(tmp_path):
    folder = JobFolder(tmp_path)
    folder.log.write_bytes(b"one\n\r 10%\r 20%\r100%\n\n\xff" + b"x" * 5000 + b"\nlast\n")
    lines = folder.log_tail()
    assert lines[:2] == ["one", "100%"]
    assert (len(lines[2]), lines[3]) == (1000, "last")
    assert folder.log_tail(1) == ["last"]
    assert folder.log_tail(start=folder.log.stat().st_size - 5) == ["last"]
