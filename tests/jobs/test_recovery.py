"""A table of jobs that is lost, damaged or of another folder: no model goes, and no job is forgotten."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
from support.jobs_served import ServedJobs, make_place, serve_jobs, settings, write_data
from support.processes import wait_for

from common.jobs import runner
from common.jobs.folder import JobFolder
from common.jobs.recovery import job_of
from common.jobs.routes import create_app
from common.jobs.store import open_store

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def clean_at_once(monkeypatch):
    monkeypatch.setattr(runner, "CLEAN", 0.0)


def lose(data: Path) -> None:
    for file in data.glob("jobs.db*"):
        file.unlink()


def inputs(data: Path, how: str = "quick") -> dict[str, str]:
    """The stand-ins' model and data, where DATA_DIR is another folder than theirs."""
    return {"student": str(data / "student"), "data": str(data / f"{how}.jsonl")}


def ends(served: ServedJobs) -> dict[str, dict]:
    """Jobs of every kind of end, by what became of them."""
    jobs = {"succeeded": served.submit(export_onnx=True), "failed": served.submit("failing")}
    for job_id in jobs.values():
        served.until(job_id)
    running, jobs["cancelled"] = served.submit("slow", max_steps=1000), served.submit()
    served.ask("POST", f"/cancel/{jobs['cancelled']}")
    served.until(jobs["cancelled"])
    served.ask("POST", f"/cancel/{running}")
    served.until(running)
    return {state: served.status(job_id) for state, job_id in jobs.items()}


@pytest.mark.parametrize("damage", ["lost", "garbage", "another table"])
def test_a_table_is_made_again_from_the_folders(tmp_path, damage, capfd):
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        before = ends(served)
        key = {"Idempotency-Key": "abc"}
        keyed = served.ask("POST", "/distill", served.payload(), key)[1]["job_id"]
        served.until(keyed)
    lose(data)
    if damage == "garbage":
        (data / "jobs.db").write_bytes(b"garbage" * 1000)
    elif damage == "another table":
        with sqlite3.connect(data / "jobs.db") as connection:
            connection.execute("CREATE TABLE job (name TEXT)")
    with serve_jobs(data) as served:
        for state, status in before.items():
            assert served.status(status["job_id"]) == status
            assert status["state"] == state
        assert served.ask("POST", "/distill", served.payload(), key)[1]["job_id"] == keyed
        newest = served.ask("GET", "/jobs")[1]["jobs"][0]["job_id"]
        assert newest == keyed  # in the order of before
        url = served.ask("GET", f"/artifacts/{before['succeeded']['job_id']}")[1]["artifacts"][0]["url"]
        assert served.ask("GET", url)[0] == 200
        served.ask("POST", f"/resume/{before['failed']['job_id']}")
        assert served.until(before["failed"]["job_id"])["state"] == "succeeded"
    log = capfd.readouterr().err
    assert "jobs that the table did not know were taken over from their folders" in log
    assert ("jobs.db cannot be read" in log) == (damage != "lost")
    assert len(list(data.glob("jobs.db.damaged-*"))) == (damage != "lost")


def test_jobs_that_wait_and_run_go_on_without_their_table(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        running, waiting = served.submit("slow", max_steps=40), served.submit()
        wait_for(lambda: (served.artifacts(running) / "steps.txt").exists())
    lose(data)
    with serve_jobs(data) as served:
        for job_id in (running, waiting):
            status = served.until(job_id)
            assert (status["state"], status["attempt"]) == ("succeeded", 1)
        steps = (served.artifacts(running) / "steps.txt").read_text().split()
    assert steps == [str(step) for step in range(1, 41)]


def test_folders_of_a_service_that_kept_no_rows(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        before = ends(served)
    lose(data)
    for file in data.glob("jobs/*/job.json"):
        file.unlink()
    with serve_jobs(data) as served:
        done = served.status(before["succeeded"]["job_id"])
        for name in ("state", "method", "progress", "losses", "attempt", "error"):
            assert done[name] == before["succeeded"][name]
        paths = {entry["path"] for entry in served.ask("GET", f"/artifacts/{done['job_id']}")[1]["artifacts"]}
        assert "onnx/model.onnx" in paths
        failed = served.status(before["failed"]["job_id"])
        assert failed["error"]["reason"] == before["failed"]["error"]["reason"]
        states = {job["state"] for job in served.ask("GET", "/jobs")[1]["jobs"]}
        assert states == {"succeeded", "failed"}  # one that was cancelled can be resumed all the same


class Failing(sqlite3.Connection):
    """A connection whose next statement of a kind fails."""

    statement, fault = None, ""

    def execute(self, sql: str, *args):
        if sql == Failing.statement:
            Failing.statement = None
            raise sqlite3.OperationalError(Failing.fault)
        return super().execute(sql, *args)


def test_a_job_that_was_not_taken_is_not_there_after_the_next_start(tmp_path, monkeypatch):
    """Its row is kept in its folder before the table has it, and then the disk is full."""
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
    place = make_place(tmp_path)
    service = create_app(settings(place)).state.service
    payload = {"method": "sft", **inputs(place)}
    monkeypatch.setattr(Failing, "statement", "COMMIT")
    monkeypatch.setattr(Failing, "fault", "database or disk is full")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        service.submit(payload, None)
    taken = service.submit(payload, None)
    lose(place)
    store = create_app(settings(place)).state.service.store
    assert [job.id for job in store.page(10)] == [taken.id]


def test_a_job_that_is_deleted_at_the_second_try_is_not_there_after_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
    place = make_place(tmp_path)
    service = create_app(settings(place)).state.service
    job = service.submit({"method": "sft", **inputs(place)}, None)
    service.cancel(job.id)
    monkeypatch.setattr(Failing, "statement", "BEGIN IMMEDIATE")
    monkeypatch.setattr(Failing, "fault", "database is locked")
    service.delete(job.id)
    assert list(service.jobs_dir.iterdir()) == []
    assert create_app(settings(place)).state.service.store.page(10) == []


def test_nothing_is_deleted_that_is_no_jobs(tmp_path):
    """Neither by a new table, nor by one that knows other jobs, nor with DATA_DIR one level up."""
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        done = served.submit()
        served.until(done)
    (data / "jobs" / "of_nobody").mkdir()
    (data / "jobs" / "0123456789abcdef").mkdir()
    (data / "jobs" / "0123456789abcdef" / "model.safetensors").write_text("weights")
    before = sorted(path for path in tmp_path.rglob("*") if not path.name.startswith(("jobs.db", "reserve")))
    lose(data)
    for folder in (data, tmp_path, data / "jobs"):
        with serve_jobs(data, data_dir=folder) as served:
            wait_for(lambda served=served: served.service.runner.is_leader)
            served.until(served.submit(**inputs(data)))
    assert [path for path in before if not path.exists()] == []


def test_a_folder_whose_deletion_was_interrupted_goes(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        job_id = served.submit()
        served.until(job_id)
        half = data / "jobs" / "0123456789abcdef.deleted"
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "rest").touch()
        (tmp_path / "half").rename(half)
        wait_for(lambda: not half.exists())
        assert served.artifacts(job_id).is_dir()


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", '{"id": null}', "{", "NaN", "[" * 10_000, '"' + "x" * 300 + '"']
)
def test_a_damaged_folder_harms_nobody(tmp_path, content, capfd):
    data = make_place(tmp_path)
    folder = data / "jobs" / "0123456789abcdef"
    folder.mkdir(parents=True)
    for name in ("job.json", "plan.json", "result.json", "worker.json"):
        (folder / name).write_text(content)
    with serve_jobs(data) as served:
        assert served.until(served.submit())["state"] == "succeeded"
        assert len(served.ask("GET", "/jobs")[1]["jobs"]) == 1
    assert "neither job.json nor plan.json says which job it is; it is left alone" in capfd.readouterr().err
    assert folder.is_dir()


# What a job puts into its folder.


def secret_of(tmp_path: Path) -> Path:
    secret = tmp_path / "secret"
    secret.mkdir(parents=True)
    for name in ("log.txt", "progress.jsonl", "run.json"):
        (secret / name).write_text(
            json.dumps({"step": 1, "max_steps": 2, "time": 1.0, "loss": 42.0, "s": "secret"}) + "\n"
        )
    return secret


@pytest.mark.parametrize("planted", ["log.txt", "artifacts", "artifacts/progress.jsonl"])
def test_a_link_in_a_jobs_folder_is_not_followed(tmp_path, planted):
    secret = secret_of(tmp_path)
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        job_id = served.submit()
        served.until(job_id)
        target = served.artifacts(job_id).parent / planted
        target.rename(tmp_path / "moved")
        target.symlink_to(secret if planted == "artifacts" else secret / target.name)
        told = [served.ask("GET", f"/{route}/{job_id}")[1] for route in ("events", "status", "metrics")]
        assert not any("secret" in str(answer) or "42.0" in str(answer) for answer in told)
        served.ask("POST", f"/resume/{job_id}")
        assert served.ask("DELETE", f"/jobs/{job_id}")[0] == 204
    assert (secret / "log.txt").read_text().count("\n") == 1


def test_a_failed_job_with_a_link_for_a_log_is_not_resumed_into_it(tmp_path):
    secret = secret_of(tmp_path)
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        job_id = served.submit("failing")
        served.until(job_id)
        log = served.artifacts(job_id).parent / "log.txt"
        log.unlink()
        log.symlink_to(secret / "log.txt")
        served.ask("POST", f"/resume/{job_id}")
        status = served.until(job_id)
        assert (status["state"], "cannot start" in status["error"]["reason"]) == ("failed", True)
    assert "stand-in" not in (secret / "log.txt").read_text()


def test_a_link_for_all_artifacts_lists_none(tmp_path):
    """As a job can leave one to the worker that lists them at its end."""
    folder = JobFolder(tmp_path / "job")
    folder.path.mkdir()
    folder.artifacts.symlink_to(secret_of(tmp_path))
    assert folder.list_artifacts() == []
    folder.artifacts.unlink()
    secret_of(tmp_path / "job" / "own").rename(folder.artifacts)
    assert [entry["path"] for entry in folder.list_artifacts()] == ["log.txt", "progress.jsonl", "run.json"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    folder = JobFolder(tmp_path)
    for name in ("log.txt", "result.json", "lock"):
        os.mkfifo(tmp_path / name)
    assert folder.log_tail() == []
    assert folder.result(1) is None
    assert not folder.is_locked()


def test_the_services_own_files_are_no_data(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data, allowed_roots=(tmp_path,)) as served:
        job_id = served.submit()
        served.until(job_id)
        for name in ("jobs.db", "runner.lock", f"jobs/{job_id}/log.txt", f"jobs/{job_id}/plan.json"):
            assert (data / name).exists()
            body = served.payload() | {"data": str(data / name)}
            message = served.refused(422, "/distill", body)
            assert message == f"data: there is no file {str(data / name)!r} under the allowed folders (ALLOWED_ROOTS)"
        for folder in (data, data / "jobs", data / "jobs" / job_id, tmp_path):
            body = {"teacher": str(data / "student"), "student": str(data / "student"), "dataset": str(folder)}
            assert "there is no dataset" in served.refused(422, "/distill", body)
        log = served.artifacts(job_id) / "progress.jsonl"
        assert served.ask("POST", "/distill", served.payload() | {"data": str(log)})[0] == 202


# A full disk.


def test_a_full_disk_fails_the_job_and_room_can_be_made(tmp_path):
    """All that the service has is on it: the table, too."""
    data = make_place(tmp_path / "made")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        write_data(data / "filling.jsonl", {"fill_at": 1, "fill_bytes": 4 << 20})
        with serve_jobs(data, data_dir=small) as served:
            first = served.submit(**inputs(data))
            served.until(first)
            status = served.until(served.submit(**inputs(data, "filling")))
            assert status["state"] == "failed"
            assert "No space left" in status["error"]["reason"]
            waiting = served.ask("POST", "/distill", served.payload(**inputs(data)))
            assert waiting[0] in (202, 503)
            if waiting[0] == 202:
                job_id = waiting[1]["job_id"]
                served.until(job_id)
                assert served.ask("DELETE", f"/jobs/{job_id}")[0] == 204
            assert served.ask("DELETE", f"/jobs/{status['job_id']}")[0] == 204
            assert served.until(served.submit(**inputs(data)))["state"] == "succeeded"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_the_reserve_takes_what_makes_room(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    job = store.submit("sft", {}, [], "0" * 16, None)
    assert store.reserve.stat().st_size == 1 << 20
    real = sqlite3.Connection

    class Full(real):
        def execute(self, sql, *args):
            if sql.startswith("UPDATE") and store.reserve.exists():
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *args)

    monkeypatch.setattr(sqlite3, "connect", Full)
    again = open_store(tmp_path)
    assert again.cancel(job.id).state == "cancelled"
    assert not store.reserve.exists()
    again.keep_reserve()
    assert store.reserve.exists()


def test_the_row_in_a_folder_is_the_one_of_the_table(tmp_path):
    data = make_place(tmp_path)
    with serve_jobs(data) as served:
        job_id = served.submit()
        served.until(job_id)
        assert job_of(JobFolder(data / "jobs" / job_id)) == served.service.store.find(job_id)
