"""Whatever is killed or full, no job is lost and none runs twice."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time

import pytest
from support.jobs_served import Process, make_place, processes_of, serve_jobs, sha256, write_data
from support.processes import LONGEST, wait_for

from common.jobs import local_backend
from common.jobs.folder import JobFolder
from common.jobs.store import open_store

pytestmark = pytest.mark.processes


def once(process: Process, job_id: str, to_the_end: int = 1) -> None:
    """A job that has succeeded was trained to the end once (a kill of a worker in its last moment makes it more), by
    one worker at a time, and its files are what the list says."""
    assert process.until(job_id)["state"] == "succeeded", process.status(job_id)
    folder = process.artifacts(job_id)
    assert not (folder / "TWO_AT_ONCE").exists()
    assert 1 <= (folder / "ends.txt").read_text().count("end") <= to_the_end
    for entry in process.ask("GET", f"/artifacts/{job_id}")[1]["artifacts"]:
        assert sha256((folder / entry["path"]).read_bytes()) == entry["sha256"]


def test_a_killed_server_finds_its_jobs_again(process, tmp_path):
    count, go_on = 20, tmp_path / "go_on"
    write_data(process.data / "held.jsonl", {"hold_at": 5, "until": str(go_on)})
    ids = [process.submit("held", max_steps=count), process.submit()]
    wait_for(lambda: (process.artifacts(ids[0]) / "steps.txt").exists())
    before = processes_of(ids[0])
    process.kill()
    assert processes_of(ids[0]) == before  # the worker goes on
    process.start()
    assert processes_of(ids[0]) == before
    assert process.status(ids[0])["state"] == "running"
    go_on.touch()
    for job_id in ids:
        once(process, job_id)
        assert process.status(job_id)["attempt"] == 1
    steps = (process.artifacts(ids[0]) / "steps.txt").read_text().split()
    assert steps == [str(step) for step in range(1, count + 1)]


def test_a_killed_server_whose_worker_died_too_resumes_from_the_checkpoint(process):
    job_id = process.submit("slow", max_steps=60)
    wait_for(lambda: (process.artifacts(job_id) / "checkpoints/checkpoint-1/state.json").exists())
    process.kill()
    local_backend.kill_marked(job_id)
    process.start()
    once(process, job_id)
    log = (process.artifacts(job_id).parent / "log.txt").read_text()
    assert log.count("training from step") == 2
    assert log.count("training from step 0") == 1


def test_a_server_that_is_told_to_stop_ends_its_streams_and_leaves_its_workers(process):
    job_id = process.submit("slow", max_steps=1000)  # more than a server needs to start on a busy machine
    process.until(job_id, "running")
    connection = process.connect()
    connection.request("GET", f"/events/{job_id}")
    stream = connection.getresponse()
    wait_for(lambda: (process.artifacts(job_id) / "steps.txt").exists())
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(LONGEST) in (0, -signal.SIGTERM)
    assert b"event: state" in stream.read()
    assert len(processes_of(job_id)) == 2
    process.start()
    assert process.status(job_id)["state"] == "running"


def test_a_job_that_ended_while_no_server_was_there(process):
    job_id = process.submit("slow", max_steps=8)
    wait_for(lambda: (process.artifacts(job_id) / "steps.txt").exists())
    process.kill()
    wait_for(lambda: not processes_of(job_id))
    process.start()
    once(process, job_id)


def test_a_cancelled_job_stays_so_after_a_kill(process):
    job_id = process.submit("endless", max_steps=10_000)
    wait_for(lambda: (process.artifacts(job_id) / "steps.txt").exists())
    process.kill()
    open_store(process.data).cancel(job_id)  # as if it had died right after it was asked
    process.start()
    assert process.until(job_id)["state"] == "cancelled"
    assert processes_of(job_id) == []


@pytest.mark.parametrize("victim", ["worker", "trainer"])
def test_a_killed_worker_is_a_failure_that_can_be_resumed(served, victim):
    job_id = served.submit("slow", max_steps=100)
    wait_for(lambda: (served.artifacts(job_id) / "steps.txt").exists())
    worker = JobFolder(served.artifacts(job_id).parent).read("worker.json")["pid"]
    (trainer,) = (pid for pid in processes_of(job_id) if pid != worker)
    os.kill(worker if victim == "worker" else trainer, signal.SIGKILL)
    status = served.until(job_id)
    assert status["state"] == "failed"
    assert "killed by SIGKILL" in status["error"]["reason"]
    assert processes_of(job_id) == []
    served.ask("POST", f"/resume/{job_id}")
    once(served, job_id)


def test_any_process_at_any_time(process):
    """A small round of what bench/job_service.py does a hundred times."""
    rng = random.Random(0)
    ids = [process.submit("slow", max_steps=4, export_onnx=True) for _ in range(3)]
    kills = 3
    for _ in range(kills):
        time.sleep(rng.random() * 0.5)
        process.kill()
        if rng.random() < 0.5:
            for job_id in ids:
                local_backend.kill_marked(job_id)
        process.start()
    for job_id in ids:
        once(process, job_id, to_the_end=1 + kills)
    started = [process.status(job_id)["started"] for job_id in ids]
    assert started == sorted(started)


def test_the_second_server_takes_over(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data) as first:
        wait_for(lambda: first.service.runner.is_leader)
        with serve_jobs(data) as second:
            job_id = second.submit()  # run by the first
            assert second.until(job_id)["state"] == "succeeded"
            assert not second.service.runner.is_leader
            assert second.ask("GET", "/readyz")[1] == {"status": "ready", "runs_jobs": "elsewhere"}
            first.service.runner.close()
            wait_for(lambda: second.service.runner.is_leader)
            assert second.until(second.submit())["state"] == "succeeded"


def test_a_full_disk_fails_the_job_and_not_the_server(tmp_path):
    data = make_place(tmp_path)
    jobs = data / "jobs"
    jobs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", jobs], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        write_data(data / "filling.jsonl", {"fill_at": 1, "fill_bytes": 2 << 20})
        with serve_jobs(data) as served:
            status = served.until(served.submit("filling"))
            assert status["state"] == "failed"
            assert "No space left" in status["error"]["reason"]
            message = served.refused(503, "/distill", served.payload())  # nothing fits any more
            assert message == "the job cannot be kept (No space left on device); try again"
            assert served.ask("DELETE", f"/jobs/{status['job_id']}")[0] == 204
            assert served.until(served.submit())["state"] == "succeeded"
    finally:
        subprocess.run(["umount", "-l", jobs], check=True)


def test_a_store_that_cannot_be_written_is_no_crash(served, monkeypatch):
    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(served.service.store, "submit", full)
    assert "disk is full" in served.refused(503, "/distill", served.payload())
    monkeypatch.undo()
    monkeypatch.setattr(served.service.store, "handed", full)
    time.sleep(0.3)
    monkeypatch.undo()
    assert served.until(served.submit())["state"] == "succeeded"


def test_the_queue_has_an_end(tmp_path):
    with serve_jobs(make_place(tmp_path), max_queue=2) as served:
        ids = [served.submit("slow", max_steps=1000)]
        served.until(ids[0], "running")
        ids += [served.submit() for _ in range(2)]
        assert "jobs wait already" in served.refused(503, "/distill", served.payload())
        for job_id in reversed(ids):
            served.ask("POST", f"/cancel/{job_id}")
        served.until(ids[0])
