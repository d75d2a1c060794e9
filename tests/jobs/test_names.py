"""The names under which the runs of jobs are served: one run's each, whatever fails, is resumed or comes at once."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.jobs_served import make_place, serve_jobs

from common.cli import UserError
from common.jobs import publication
from common.jobs.fine_tuning import PUBLISHED, Publication


@pytest.mark.processes
def test_a_job_is_not_resumed_whose_name_is_another_s_by_now(tmp_path):
    with serve_jobs(make_place(tmp_path)) as served:
        failed = served.submit("failing", name="tickets")
        assert served.until(failed)["state"] == "failed"
        other = served.submit("slow", name="tickets")
        for _ in ("while it runs", "once it is served"):
            message = served.refused(409, f"/resume/{failed}", None)
            assert message == "there is another run called tickets by now; send the job again under another name"
            assert served.until(other)["served_as"] == "tickets"
        assert (served.status(failed)["state"], served.status(failed)["served_as"]) == ("failed", None)
        shutil.rmtree(tmp_path / "runs" / "tickets")
        assert served.ask("POST", f"/resume/{failed}")[0] == 200
        assert served.until(failed)["served_as"] == "tickets"


@pytest.mark.processes
def test_requests_that_come_at_once_do_not_get_one_name(tmp_path, monkeypatch):
    commands = Publication.commands

    def slow(*args, **how):
        time.sleep(0.3)
        return commands(*args, **how)

    monkeypatch.setattr(Publication, "commands", slow)
    with serve_jobs(make_place(tmp_path)) as served, ThreadPoolExecutor(3) as pool:
        sent = [pool.submit(served.ask, "POST", "/distill", served.payload(name="tickets")) for _ in range(3)]
        assert sorted(answer.result()[0] for answer in sent) == [202, 422, 422]
        key = {"Idempotency-Key": "once"}
        body = served.payload(name="others")
        sent = [pool.submit(served.ask, "POST", "/distill", body, key) for _ in range(3)]
        assert len({answer.result()[1]["job_id"] for answer in sent}) == 1


def artifacts(folder: Path, job_id: str) -> Path:
    """Those of a job with one checkpoint before its last step."""
    run = folder / "jobs" / job_id / "artifacts"
    point = run / "checkpoints" / "checkpoint-1"
    point.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"state": "done", "steps": 2}))
    (point / "trainer_state.json").write_text("{}")
    for place in (run, point):
        (place / "model.safetensors").write_text(f"{job_id} {place.name}")
    return run


def publish(run: Path, name: str) -> list[str]:
    """The names that a job's states are served under."""
    folder = run.parents[2]
    publication.main([f"--run={run}", f"--name={name}", f"--runs_dir={folder / 'runs'}", f"--data_dir={folder}"])
    return [state["model"] for state in json.loads((run / PUBLISHED).read_text())["checkpoints"]]


def test_a_run_is_published_once_and_not_as_another_s(tmp_path, capsys):
    own, other = artifacts(tmp_path, "a"), artifacts(tmp_path, "b")
    for _ in ("first", "again"):
        assert publish(own, "tickets") == ["tickets", "tickets-step-1"]
    with pytest.raises(UserError, match=r"there is another run called tickets in .*; move it away and resume the job"):
        publish(other, "tickets")
    assert (tmp_path / "runs" / "tickets" / "model.safetensors").read_text() == "a artifacts"
    (tmp_path / "runs" / "mine-step-1").mkdir()
    assert publish(other, "mine") == ["mine"]
    assert "step 1 is left out: there is another run called mine-step-1" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "mine-step-1").iterdir())
