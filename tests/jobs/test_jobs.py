"""The job service: what it answers, and that its jobs survive. Stand-ins take the trainers' place."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from support.jobs_served import Process, make_place, serve_jobs, settings, sha256, write_data
from support.processes import wait_for

from common.jobs import local_backend as job_local
from common.jobs import progress as job_progress
from common.jobs import runner as job_runner
from common.jobs.checks import Device
from common.jobs.folder import JobFolder
from common.jobs.local_backend import environment_of, process_ids
from common.jobs.routes import create_app
from common.jobs.store import KeyTaken, open_store


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    monkeypatch.setenv("API_KEY", "hidden")  # of this process; the servers here are given theirs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator:
    with serve_jobs(make_place(tmp_path_factory.mktemp("jobs"))) as running:
        yield running


@pytest.fixture(scope="module")
def done(served) -> str:
    """A job that has succeeded, with both exports."""
    job_id = served.submit(post_training_quant=True, export_onnx=True)
    assert served.until(job_id)["state"] == "succeeded"
    return job_id


def processes_of(job_id: str) -> list[int]:
    mark = f"{job_local.MARK}={job_id}".encode()
    return [pid for pid in process_ids() if mark in environment_of(pid)]


# A job from its submission to its files.


def test_a_job_runs_the_scripts_and_leaves_files_with_their_hashes(served, done):
    status = served.status(done)
    assert status["progress"] == {"step": 3, "total": 3, "percent": 100.0, "seconds_left": None}
    assert status["losses"] == {"loss": 2.0, "forward_kl": pytest.approx(1 / 3)}
    assert (status["error"], status["resumable"], status["attempt"], status["command"]) == (None, False, 1, None)
    assert status["created"] <= status["started"] <= status["ended"]
    assert status["request"]["max_steps"] == 3
    listed = served.ask("GET", f"/artifacts/{done}")[1]["artifacts"]
    paths = {entry["path"] for entry in listed}
    assert paths >= {"config.json", "model.safetensors", "run.json", "int8/model.int8", "onnx/model.onnx"}
    assert not any(part.startswith(".") or part == "checkpoints" for path in paths for part in path.split("/"))
    assert not (served.artifacts(done) / "checkpoints").exists()  # of no use any more, and large
    for entry in listed:
        status, _, headers = served.ask("GET", entry["url"])
        assert (status, headers["etag"]) == (200, f'"{entry["sha256"]}"')
        content = (served.artifacts(done) / entry["path"]).read_bytes()
        assert (sha256(content), len(content)) == (entry["sha256"], entry["bytes"])
    record = json.loads((served.artifacts(done) / "run.json").read_text())
    assert f"--save_dir={served.artifacts(done)}" in record["argv"]
    assert "--max_steps=3" in record["argv"]
    assert "API_KEY" not in record["environment"]
    assert record["environment"][job_local.MARK] == done
    log = (served.artifacts(done).parent / "log.txt").read_text()
    assert "$ python sft_train.py" in log
    assert log.index("--format=int8") < log.index("--format=onnx")


def test_the_curves(served, done):
    points = served.ask("GET", f"/metrics/{done}")[1]["points"]
    assert [(point["step"], point["loss"]) for point in points] == [(1, 2.6667), (2, 2.3333), (3, 2.0)]


def test_a_key_gives_the_same_job_back(served):
    key = {"Idempotency-Key": "abc"}
    answers = [served.ask("POST", "/distill", served.payload(), key) for _ in range(2)]
    assert [status for status, _, _ in answers] == [202, 202]
    assert answers[0][1]["job_id"] == answers[1][1]["job_id"]
    assert answers[0][2]["location"] == f"/status/{answers[0][1]['job_id']}"
    status, answer, _ = served.ask("POST", "/distill", served.payload(max_steps=4), key)
    assert (status, answer["error"]["param"]) == (422, "Idempotency-Key")
    assert served.submit() != served.submit()


def test_one_key_by_many_clients_at_once_is_one_job(served):
    with ThreadPoolExecutor(8) as pool:
        ask = lambda _: served.ask("POST", "/distill", served.payload(), {"Idempotency-Key": "many"})[1]["job_id"]  # noqa: E731
        assert len(set(pool.map(ask, range(8)))) == 1


def test_a_failure_says_why_and_is_resumed_where_it_was(served):
    job_id = served.submit("failing")
    status = served.until(job_id)
    assert (status["state"], status["resumable"]) == ("failed", True)
    assert status["error"]["reason"] == "the stand-in was told to fail; tell it otherwise"
    assert status["error"]["exit_code"] == 2
    assert status["error"]["log"][-1] == "error: the stand-in was told to fail; tell it otherwise"
    assert served.ask("POST", f"/resume/{job_id}")[0] == 200
    status = served.until(job_id)
    assert (status["state"], status["attempt"], status["error"]) == ("succeeded", 2, None)
    assert (served.artifacts(job_id) / "steps.txt").read_text().split() == ["1", "2", "3"]
    assert "already" in served.refused(409, f"/cancel/{job_id}", None)
    assert "can be resumed" in served.refused(409, f"/resume/{job_id}", None)


def test_a_failed_export_is_made_again_without_training_again(served):
    exporter = served.service.settings.scripts / "export_model.py"
    script = exporter.read_text()
    exporter.write_text("raise SystemExit('error: no such format today')")
    job_id = served.submit(export_onnx=True)
    assert served.until(job_id)["error"]["reason"] == "no such format today"
    exporter.write_text(script)
    served.ask("POST", f"/resume/{job_id}")
    assert served.until(job_id)["state"] == "succeeded"
    assert (served.artifacts(job_id) / "ends.txt").read_text() == "end\n"
    assert (served.artifacts(job_id) / "onnx" / "model.onnx").is_file()


def test_jobs_by_page(served, done):
    page = served.ask("GET", "/jobs?limit=2")[1]
    assert len(page["jobs"]) == 2
    rest = served.ask("GET", f"/jobs?before={page['next']}&limit=200")[1]
    ids = [job["job_id"] for job in page["jobs"] + rest["jobs"]]
    assert len(set(ids)) == len(ids) == sum(served.service.store.counts().values())
    assert rest["next"] is None
    created = [job["created"] for job in page["jobs"] + rest["jobs"]]
    assert created == sorted(created, reverse=True)
    assert done in [job["job_id"] for job in served.ask("GET", "/jobs?state=succeeded&limit=200")[1]["jobs"]]
    assert served.ask("GET", "/jobs?state=queued")[1]["jobs"] == []


def test_events_are_what_was_logged(served, done):
    body = served.ask("GET", f"/events/{done}")[1]
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in body.strip().split("\n\n")]
    lines = [line for event in events if event["event"] == "log" for line in json.loads(event["data"])]
    assert "training from step 0" in lines
    points = [point for event in events if event["event"] == "metrics" for point in json.loads(event["data"])]
    assert [point["step"] for point in points] == [1, 2, 3]
    (state,) = [json.loads(event["data"]) for event in events if event["event"] == "state"]
    assert state == served.status(done)
    again = served.ask("GET", f"/events/{done}", headers={"Last-Event-ID": events[-1]["id"]})[1]
    assert "training from" not in again
    assert "event: state" in again


def test_events_come_while_the_job_runs(served):
    job_id = served.submit("slow", max_steps=60)
    served.until(job_id, "running")
    connection = served.connect()
    connection.request("GET", f"/events/{job_id}")
    stream = connection.getresponse()
    assert stream.getheader("content-type").startswith("text/event-stream")
    steps = []
    while len(steps) < 3:
        line = stream.readline().decode()
        if line.startswith("data: [{"):
            steps += [point["step"] for point in json.loads(line[6:])]
    assert steps == [*range(1, len(steps) + 1)]
    assert served.status(job_id)["state"] == "running"
    assert served.status(job_id)["command"] == {"number": 1, "of": 1, "name": "sft_train.py"}
    left = served.status(job_id)["progress"]["seconds_left"]
    assert 0 < left < 30
    served.ask("POST", f"/cancel/{job_id}")
    rest = stream.read().decode()
    assert '"state": "cancelled"' in rest  # and the stream has ended


# Order, cancelling, deleting.


def test_jobs_start_in_order_and_no_more_than_may_run(tmp_path):
    with serve_jobs(make_place(tmp_path), max_running=2) as served:
        ids = [served.submit("slow", max_steps=8) for _ in range(6)]
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
    monkeypatch.setattr(job_local, "GRACE", 0.3)
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


def test_retention(tmp_path, monkeypatch):
    monkeypatch.setattr(job_runner, "CLEAN", 0.0)
    with serve_jobs(make_place(tmp_path)) as served:
        ids = [served.submit() for _ in range(3)]
        for job_id in ids:
            served.until(job_id)
        runner, store = served.service.runner, served.service.store
        sizes = [size for _, _, size in store.ended()]
        assert sizes == [JobFolder(served.service.jobs_dir / job_id).size() for job_id in ids]
        assert all(size > 40_000 for size in sizes)
        runner.quota = sum(sizes[1:])  # room for two
        wait_for(lambda: store.find(ids[0]) is None)
        assert [store.find(job_id) is None for job_id in ids] == [True, False, False]
        with sqlite3.connect(store.path) as connection:
            connection.execute("UPDATE job SET ended = ended - 3 * 86400 WHERE id = ?", (ids[2],))
        runner.keep_days = 2
        wait_for(lambda: store.find(ids[2]) is None)
        (served.service.jobs_dir / "of_nobody").mkdir()
        wait_for(lambda: [folder.name for folder in served.service.jobs_dir.iterdir()] == [ids[1]])
        assert store.find(ids[1]).state == "succeeded"


# What is killed.


@pytest.fixture
def process(tmp_path):
    running = Process(make_place(tmp_path))
    running.start()
    yield running
    running.kill()
    for folder in running.jobs.iterdir():
        job_local.kill_marked(folder.name)


def once(process: Process, job_id: str, to_the_end: int = 1) -> None:
    """A job that has succeeded was trained to the end once (a kill of a worker in its last moment makes it more), by
    one worker at a time, and its files are what the list says."""
    assert process.until(job_id)["state"] == "succeeded", process.status(job_id)
    folder = process.artifacts(job_id)
    assert not (folder / "TWO_AT_ONCE").exists()
    assert 1 <= (folder / "ends.txt").read_text().count("end") <= to_the_end
    for entry in process.ask("GET", f"/artifacts/{job_id}")[1]["artifacts"]:
        assert sha256((folder / entry["path"]).read_bytes()) == entry["sha256"]


def test_a_killed_server_finds_its_jobs_again(process):
    ids = [process.submit("slow", max_steps=60), process.submit()]
    wait_for(lambda: (process.artifacts(ids[0]) / "steps.txt").exists())
    before = processes_of(ids[0])
    process.kill()
    assert processes_of(ids[0]) == before  # the worker goes on
    process.start()
    assert processes_of(ids[0]) == before
    assert process.status(ids[0])["state"] == "running"
    for job_id in ids:
        once(process, job_id)
        assert process.status(job_id)["attempt"] == 1
    steps = (process.artifacts(ids[0]) / "steps.txt").read_text().split()
    assert steps == [str(step) for step in range(1, 61)]


def test_a_killed_server_whose_worker_died_too_resumes_from_the_checkpoint(process):
    job_id = process.submit("slow", max_steps=20)
    wait_for(lambda: (process.artifacts(job_id) / "steps.txt").exists())
    process.kill()
    job_local.kill_marked(job_id)
    process.start()
    once(process, job_id)
    log = (process.artifacts(job_id).parent / "log.txt").read_text()
    assert log.count("training from step") == 2
    assert log.count("training from step 0") == 1


def test_a_server_that_is_told_to_stop_ends_its_streams_and_leaves_its_workers(process):
    job_id = process.submit("slow", max_steps=100)
    process.until(job_id, "running")
    connection = process.connect()
    connection.request("GET", f"/events/{job_id}")
    stream = connection.getresponse()
    wait_for(lambda: (process.artifacts(job_id) / "steps.txt").exists())
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(20) in (0, -signal.SIGTERM)
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
    job_id = served.submit("slow", max_steps=30)
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
    draw = random.Random(0)
    ids = [process.submit("slow", max_steps=4, export_onnx=True) for _ in range(3)]
    kills = 3
    for _ in range(kills):
        time.sleep(draw.random() * 0.5)
        process.kill()
        if draw.random() < 0.5:
            for job_id in ids:
                job_local.kill_marked(job_id)
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
            again = served.until(served.submit())  # nothing fits any more
            assert (again["state"], "No space left" in again["error"]["reason"]) == ("failed", True)
            for job_id in (status["job_id"], again["job_id"]):
                assert served.ask("DELETE", f"/jobs/{job_id}")[0] == 204
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


# Downloads.


def test_ranges_and_conditions(served, done):
    url = f"/download/{done}/model.safetensors"
    content = (served.artifacts(done) / "model.safetensors").read_bytes()
    etag = f'"{sha256(content)}"'

    def get(**headers: str) -> tuple[int, str, dict]:
        return served.ask("GET", url, headers={name.replace("_", "-"): value for name, value in headers.items()})

    status, part, headers = get(Range="bytes=10-29")
    assert (status, part.encode()) == (206, content[10:30])
    assert headers["content-range"] == f"bytes 10-29/{len(content)}"
    assert get(Range="bytes=-7")[1].encode() == content[-7:]
    assert get(Range=f"bytes={len(content)}-")[0] == 416
    assert get(If_None_Match=etag)[0] == get(If_None_Match=f'"x", W/{etag}')[0] == get(If_None_Match="*")[0] == 304
    assert get(If_None_Match='"x"')[0] == 200
    assert get(Range="bytes=0-1", If_Range=etag)[0] == 206
    assert get(Range="bytes=0-1", If_Range='"old"')[0] == 200
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment")


def hostile_path(draw: random.Random, outside: Path, job_id: str, neighbour: str) -> str:
    """A path that tries to leave a job's artifacts, percent-encoded as an attacker would."""
    up = draw.choice(["..", "%2e%2e", "%2E.", "..%2f..", "%252e%252e", "..%5c..", "....//", ".%00.", "..;", "．．"])
    target = draw.choice([
        str(outside), "etc/passwd", "jobs.db", "log.txt", "plan.json", f"{neighbour}/artifacts/run.json", "lock",
        f"{job_id}x/secret", "artifacts_secret/secret", "link", "folder/secret", "checkpoints/checkpoint-1/state.json",
        "config.json/../../log.txt", "run.json%00.txt", ".alone", "CONFIG.JSON", "config.json/", "./config.json",
        "int8/../config.json", "int8//model.int8", "config.json%20", "file:///etc/passwd", "~/.ssh/id_rsa", "", ".",
        "/proc/self/environ", "\\\\server\\share", "C:\\windows", "con", "%c0%ae%c0%ae/log.txt", "x" * 5000, "a/" * 900,
    ])  # fmt: skip
    path = "/".join([*[up] * draw.randrange(8), target])
    if draw.random() < 0.3:
        path = draw.choice(["/", "//", "%2f", "config.json/../", "./", "int8/../../", "%2f%2f"]) + path
    return "".join(
        f"%{byte:02x}" if draw.random() < 0.1 else chr(byte) for byte in quote(path, safe="%/.\\;:~").encode()
    )


def test_a_thousand_hostile_paths(served, done):
    folder, draw = served.artifacts(done), random.Random(1)
    outside = served.data / "secret"
    outside.write_text("secret")
    for sibling in (folder.parent / "artifacts_secret", Path(f"{folder.parent}x")):
        sibling.mkdir(exist_ok=True)
        (sibling / "secret").write_text("secret")
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(served.data)
    neighbour = served.submit()
    served.until(neighbour)
    listed = {entry["path"] for entry in served.ask("GET", f"/artifacts/{done}")[1]["artifacts"]}
    connection = served.connect()
    for _ in range(1000):
        job = draw.choice([done] * 9 + ["..", "%2e%2e", done[:-1], done.upper() + "x", neighbour[:4]])
        path = hostile_path(draw, outside, done, neighbour)
        connection.request("GET", f"/download/{job}/{path}")
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 404, (job, path[:200], answer.status, body[:100])
        assert b"secret" not in body.replace(b"artifacts_secret", b"")
        assert "request_id" in json.loads(body)["error"]
    shutil.rmtree(f"{folder.parent}x")
    assert "link" not in listed
    assert served.ask("GET", f"/download/{done}/config.json")[0] == 200


def test_a_link_put_in_a_listed_files_place_is_not_followed(served):
    job_id = served.submit(post_training_quant=True)
    served.until(job_id)
    file = served.artifacts(job_id) / "config.json"
    elsewhere = served.data / "copy.json"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(elsewhere)
    served.refused(404, f"/download/{job_id}/config.json", None, "GET")
    inner = served.artifacts(job_id) / "int8"
    inner.rename(served.data / "moved")
    inner.symlink_to(served.data / "moved")
    served.refused(404, f"/download/{job_id}/int8/model.int8", None, "GET")
    (served.artifacts(job_id) / "run.json").write_text("another")
    served.refused(404, f"/download/{job_id}/run.json", None, "GET")


# Settings, and requests of every kind.


def test_key_prefix_and_limits(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data, api_key="s3cret", api_prefix="/slm/v1", max_body_bytes=4096) as served:
        key = {"Authorization": "Bearer s3cret"}
        for method, path in (("GET", "/slm/v1/jobs"), ("POST", "/slm/v1/distill"), ("GET", "/metrics")):
            assert served.ask(method, path)[0] == 401
        for path in ("/slm/v1/", "/healthz", "/readyz", "/slm/v1/openapi.json"):
            assert served.ask("GET", path)[0] == 200
        status, answer, headers = served.ask("POST", "/slm/v1/distill", served.payload(), key)
        assert status == 202
        assert headers["location"] == answer["status_url"] == f"/slm/v1/status/{answer['job_id']}"
        job_id = answer["job_id"]
        wait_for(lambda: served.ask("GET", answer["status_url"], headers=key)[1]["state"] == "succeeded")
        url = served.ask("GET", f"/slm/v1/artifacts/{job_id}", headers=key)[1]["artifacts"][0]["url"]
        assert served.ask("GET", url)[0] == 401
        assert served.ask("GET", url, headers=key)[0] == 200
        assert served.ask("GET", f"/status/{job_id}", headers=key)[0] == 404
        assert served.ask("POST", "/slm/v1/distill", served.payload(seed=1) | {"x": "y" * 5000}, key)[0] == 413
        figures = served.ask("GET", "/metrics", headers=key)[1]
        assert 'jobs{state="succeeded"} 1.0' in figures
        assert 'http_requests_total{route="/slm/v1/distill",status="202"} 1.0' in figures


def test_the_description_names_every_setting(served):
    document = served.ask("GET", "/openapi.json")[1]
    body = document["paths"]["/distill"]["post"]["requestBody"]["content"]["application/json"]
    fields = body["schema"]["properties"]
    assert set(body["example"]) <= set(fields)
    assert fields["max_steps"] | {"description": ""} == {
        "type": "integer", "minimum": -1, "maximum": 1e9, "default": -1, "description": ""}  # fmt: skip
    assert (
        "(methods: dpo)" not in fields["learning_rate"]["description"]
        if "description" in fields["learning_rate"]
        else True
    )
    assert fields["teacher"]["description"].endswith("(methods: distill)")
    assert not {"save_dir", "trust_remote_code", "config"} & set(fields)


def test_schemathesis(served, done, tmp_path):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, configuration, given
    from hypothesis import settings as hypothesis_settings

    configuration.set_hypothesis_home_dir(tmp_path)
    schema = schemathesis.openapi.from_url(served.url + "/openapi.json")
    # as in test_serve_api.py; and every generated job is refused, since its student is nowhere
    names = ("allow_header_conformance", "negative_data_rejection", "positive_data_acceptance")
    left_out = [schemathesis.checks.CHECKS.get_one(name) for name in names]
    run = hypothesis_settings(max_examples=4, deadline=None, derandomize=True, database=None,
                              suppress_health_check=list(HealthCheck))  # fmt: skip
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        def check(case):
            case.call_and_validate(excluded_checks=left_out, timeout=60)

        run(given(case=operation.as_strategy())(check))()
        tried.add(operation.path)
    assert tried >= {"/distill", "/jobs", "/status/{job_id}", "/events/{job_id}", "/download/{job_id}/{path}"}


# The parts.


def test_settings_from_the_environment(monkeypatch, tmp_path):
    from common.cli import UserError
    from common.jobs.service import ROOT, Settings

    for name in ("API_KEY", "DATA_DIR", "ALLOWED_ROOTS"):
        monkeypatch.delenv(name, raising=False)
    found = Settings.from_environment()
    assert found.allowed_roots == (ROOT / "runs", ROOT / "data", found.data_dir)
    monkeypatch.setenv("ALLOWED_ROOTS", f"{tmp_path}{os.pathsep}/models")
    assert Settings.from_environment().allowed_roots == (tmp_path, Path("/models"))
    for name, value in (("BACKEND", "slurm"), ("API_PREFIX", "x"), ("MAX_RUNNING", "0"), ("KEEP_DAYS", "soon")):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=name):
            Settings.from_environment()
        monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        create_app(settings(tmp_path / "file" / "data"))


def test_a_key_with_another_request_is_refused_by_the_store(tmp_path):
    store = open_store(tmp_path)
    job = store.submit("sft", {"a": 1}, [], "0" * 16, "key")
    assert store.submit("sft", {"a": 1}, [], "1" * 16, "key") == job
    with pytest.raises(KeyTaken):
        store.submit("sft", {"a": 2}, [], "2" * 16, "key")


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


def test_many_threads_never_share_a_claim(tmp_path):
    store = open_store(tmp_path)
    for number in range(60):
        store.submit("sft", {}, [], str(number), None)
    found: list[str] = []

    def claim() -> None:
        while job := store.claim(0, "running"):
            found.append(job.id)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=int) == [str(number) for number in range(60)]


def test_progress_of_a_training_that_went_on(tmp_path):
    folder = JobFolder(tmp_path)
    folder.artifacts.mkdir()
    assert job_progress.status(folder, False) == {"progress": None, "losses": {}}
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
    found = job_progress.status(folder, False)
    assert found["progress"] == {"step": 20, "total": 100, "percent": 20.0, "seconds_left": 48.0}
    assert found["losses"] == {"loss": 2.4, "forward_kl": 1.5, "eval_loss": 2.2}
    points = job_progress.curves(folder)
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


def test_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert job_local.find_cards() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert job_local.find_cards() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 8188\necho 6144\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert job_local.find_cards() == ["8188", "6144"]
    assert job_local.find_device(["0", "1"]) == Device(True, 6144 << 20)
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_local.find_cards() == []
    assert job_local.find_device(["0"]) == Device(True, None)
    here = job_local.find_device([])
    assert not here.cuda
    assert 1 << 28 < here.size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_each_job_has_a_card_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with serve_jobs(make_place(tmp_path), max_running=None) as served:
        ids = [served.submit("slow", max_steps=6) for _ in range(3)]
        for job_id in ids:
            served.until(job_id)
        used = [
            json.loads((served.artifacts(job_id) / "run.json").read_text())["environment"]["CUDA_VISIBLE_DEVICES"]
            for job_id in ids
        ]
    assert used[:2] == ["4", "5"]
    assert used[2] in ("4", "5")
