"""Jobs in order; cancelled, deleted, kept for a while."""

from __future__ import annotations

import sqlite3

import pytest
from support.jobs_served import make_place, processes_of, serve_jobs, write_data
from support.processes import wait_for

from common.jobs import local_backend, runner
from common.jobs.folder import JobFolder

pytestmark = pytest.mark.processes


def test_jobs_start_in_order_and_no_more_than_may_run(tmp_path):
    with serve_jobs(make_place(tmp_path), max_running=2) as served:
        ids = [served.submit("slow", max_steps=steps) for steps in (40, 40, 8, 8, 8, 8)]
        wait_for(lambda: [served.status(job_id)["ahead"] for job_id in ids] == [None, None, 0, 1, 2, 3])
        seen = []
        while any(served.status(job_id)["ended"] is None for job_id in ids):
            seen.append(served.service.store.counts()["running"])
        assert max(seen) == 2
        started = [served.status(job_id)["started"] for job_id in ids]
        assert started == sorted(started)
        # a third begins only once one of the two before it has ended
        ended = sorted(served.status(job_id)["ended"] for job_id in ids)
        assert all(begin >= end for begin, end in zip(started[2:], ended, strict=False))


def test_cancelling(served, monkeypatch):
    first, second = served.submit("endless", max_steps=10_000), served.submit()
    status = served.ask("POST", f"/cancel/{second}")[1]  # it waits
    assert (status["state"], status["started"]) == ("cancelled", None)
    wait_for(lambda: (served.artifacts(first) / "steps.txt").exists())
    wait_for(lambda: len(processes_of(first)) == 4)  # worker, trainer, and two that it started
    assert served.ask("POST", f"/cancel/{first}")[0] == 200
    assert served.until(first)["state"] == "cancelled"
    assert processes_of(first) == []  # also the one that had left the group
    log = (served.artifacts(first).parent / "log.txt").read_text()
    assert "stopped at" in log  # it was asked first, and saved a checkpoint
    assert served.ask("POST", f"/cancel/{first}")[0] == 200  # twice is no error
    deaf = served.submit("deaf", max_steps=10_000)
    wait_for(lambda: (served.artifacts(deaf) / "steps.txt").exists())
    with monkeypatch.context() as patch:
        patch.setattr(local_backend, "GRACE", 0.3)
        served.ask("POST", f"/cancel/{deaf}")
        assert served.until(deaf)["state"] == "cancelled"
    assert processes_of(deaf) == []
    assert served.ask("POST", f"/resume/{first}")[0] == 200
    status = served.until(first, "running")
    assert status["attempt"] == 2
    wait_for(lambda: served.status(first)["progress"]["step"] > 2)
    served.ask("POST", f"/cancel/{first}")
    served.until(first)
    steps = list(map(int, (served.artifacts(first) / "steps.txt").read_text().split()))
    assert steps == [*range(1, len(steps) + 1)]  # none left out, none twice


def test_pausing(served):
    write_data(served.data / "slower.jsonl", {"seconds": 0.5})  # so that it takes a moment to be paused
    running, waiting = served.submit("slower", max_steps=400), served.submit()
    assert served.ask("POST", f"/pause/{waiting}")[1]["state"] == "paused"
    wait_for(lambda: (served.artifacts(running) / "steps.txt").exists())
    status = served.ask("POST", f"/pause/{running}")[1]
    assert status["pausing"] and not status["cancelling"]
    assert "being paused" in served.refused(409, f"/resume/{running}", None)
    status = served.until(running, "paused")
    assert (status["pausing"], status["ended"], status["resumable"]) == (False, None, True)
    assert "stopped at" in (served.artifacts(running).parent / "log.txt").read_text()
    assert served.ask("POST", f"/pause/{running}")[0] == 200  # twice is no error
    assert "cancel it first" in served.refused(409, f"/jobs/{running}", None, "DELETE")
    assert waiting not in [job_id for job_id, _, _ in served.service.store.ended()]  # retention leaves it alone
    served.ask("POST", f"/resume/{running}")
    assert served.until(running, "running")["attempt"] == 2
    wait_for(lambda: served.status(running)["progress"]["step"] > status["progress"]["step"])
    steps = list(map(int, (served.artifacts(running) / "steps.txt").read_text().split()))
    assert steps == [*range(1, len(steps) + 1)]  # none left out, none twice
    for job_id in (running, waiting):
        served.ask("POST", f"/cancel/{job_id}")
        assert served.until(job_id)["state"] == "cancelled"
    assert "the job is cancelled" in served.refused(409, f"/pause/{running}", None)


def test_deleting(served):
    job_id = served.submit()
    served.until(job_id)
    folder = served.artifacts(job_id).parent
    assert folder.is_dir()
    assert served.ask("DELETE", f"/jobs/{job_id}")[0] == 204
    assert not folder.exists()
    served.refused(404, f"/status/{job_id}", None, "GET")
    served.refused(404, f"/jobs/{job_id}", None, "DELETE")
    running = served.submit("slow", max_steps=1000)
    assert "cancel it first" in served.refused(409, f"/jobs/{running}", None, "DELETE")
    served.ask("POST", f"/cancel/{running}")
    served.until(running)


def test_what_another_job_needs_is_not_deleted(served):
    first = served.submit()
    served.until(first)
    second = served.submit("slow", max_steps=1000, student=str(served.artifacts(first)))
    sentence = served.refused(409, f"/jobs/{first}", None, "DELETE")
    assert second in sentence and "needs its model; cancel that first" in sentence
    served.ask("POST", f"/cancel/{second}")
    served.until(second)
    assert served.ask("DELETE", f"/jobs/{first}")[0] == 204
    assert "student: " in (sentence := served.refused(409, f"/resume/{second}", None))
    assert f"{first}/artifacts is not there any more" in sentence
    assert served.status(second)["state"] == "cancelled"


def test_retention(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CLEAN", 0.0)
    with serve_jobs(make_place(tmp_path)) as served:
        ids = [served.submit() for _ in range(3)]
        for job_id in ids:
            served.until(job_id)
        running, store = served.service.runner, served.service.store
        sizes = [size for _, _, size in store.ended()]
        assert sizes == [JobFolder(served.service.jobs_dir / job_id).size() for job_id in ids]
        assert all(size > 40_000 for size in sizes)
        running.quota = sum(sizes[1:])  # room for two
        wait_for(lambda: store.find(ids[0]) is None)
        assert [store.find(job_id) is None for job_id in ids] == [True, False, False]
        with sqlite3.connect(store.path) as connection:
            connection.execute("UPDATE job SET ended = ended - 3 * 86400 WHERE id = ?", (ids[2],))
        running.keep_days = 2
        wait_for(lambda: store.find(ids[2]) is None)
        (served.service.jobs_dir / "of_nobody").mkdir()
        wait_for(lambda: {folder.name for folder in served.service.jobs_dir.iterdir()} == {ids[1], "of_nobody"})
        assert store.find(ids[1]).state == "succeeded"
        going_on = served.submit("slow", max_steps=1000, student=str(served.artifacts(ids[1])))
        served.ask("POST", f"/pause/{going_on}")
        running.keep_days = 1e-9
        running.clean()
        assert store.find(ids[1]) is not None  # as what goes on from it has not ended
        served.ask("POST", f"/cancel/{going_on}")
        wait_for(lambda: store.find(ids[1]) is None)
