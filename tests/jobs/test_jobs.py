"""A job from its submission to its files, as clients of the service see it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.jobs_served import sha256
from support.processes import LONGEST

from common.jobs import local_backend

pytestmark = pytest.mark.processes


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
    assert record["environment"][local_backend.MARK] == done
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
    for job_id in [served.submit(), served.submit()]:
        served.until(job_id)
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
    job_id = served.submit("slow", max_steps=200)
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
    assert 0 < left < 200 * LONGEST
    served.ask("POST", f"/cancel/{job_id}")
    rest = stream.read().decode()
    assert '"state": "cancelled"' in rest  # and the stream has ended
