"""Jobs that go on: what of their inputs has to be there still, and what an earlier version has accepted."""

from __future__ import annotations

import json
import shutil

import pytest
from support.jobs_served import make_place
from support.openai_jobs import in_process
from support.processes import wait_for

from common.jobs.backend import Device
from common.jobs.request import as_taken_now
from common.jobs.runner import Runner
from common.jobs.store import QUEUED, Job, Store, new_id
from common.web.app import Problem


def test_a_job_is_resumed_without_the_data_that_it_has_been_trained_on(tmp_path):
    """A command that follows the training can fail after them; what is gone is named as it was asked for."""
    place = make_place(tmp_path)
    service = in_process(place)[1]
    rows, student = place / "rows-3.jsonl", place / "student"
    shutil.copy(place / "quick.jsonl", rows)
    body = {"method": "sft", "max_steps": 3, "epochs": 3, "student_model": str(student), "data": str(rows)}
    job_id = service.submit(body, None).id
    service.pause(job_id)
    rows.unlink()
    with pytest.raises(Problem) as raised:
        service.resume(job_id)
    assert raised.value.status_code == 409
    assert raised.value.detail == f"data: {rows} is not there any more; send the job again with another"
    shutil.move(student, place / "moved")
    with pytest.raises(Problem, match=f"409: student_model: {student} is not there any more"):
        service.resume(job_id)
    artifacts = service.jobs_dir / job_id / "artifacts"
    artifacts.mkdir(parents=True)
    for state in ("running", "done"):
        (artifacts / "run.json").write_text(json.dumps({"state": state}))
        if state == "running":
            with pytest.raises(Problem, match="is not there any more"):
                service.resume(job_id)
    assert service.resume(job_id).state == QUEUED


class Idle:
    """A backend that only remembers what it was to start."""

    first_state, device = "running", Device(False, None)

    def __init__(self) -> None:
        self.started: list[Job] = []

    def start(self, job: Job) -> None:
        self.started.append(job)

    def look(self, job: Job) -> str:
        return self.first_state

    def close(self) -> None:
        pass


def test_a_job_of_an_earlier_version_is_started_without_flags_that_do_nothing(tmp_path):
    """Its trainer would refuse them."""
    store, backend = Store(tmp_path / "jobs.db"), Idle()
    kept = ["--save_dir=run", "--student=s", "--data=rows.jsonl", "--teacher=t", "--jsd=0.5", "--jsd_beta=0.9"]
    dropped = ["--cache_k=32", "--text_column=body", "--hidden_mse=0.0", "--layer_map=uniform", "--ignore_collapse"]
    script, export = "scripts/distill_train.py", {"argv": ["export_model.py", "--split=test"], "output": "onnx"}
    commands = [{"argv": [script, *kept, *dropped], "output": ""}, export]
    runner = Runner(store, backend, tmp_path / "jobs", 1, None, None)
    (tmp_path / "jobs").mkdir()
    store.submit("distill", {}, commands, new_id(), None)
    runner.start()
    try:
        wait_for(lambda: backend.started)
    finally:
        runner.close()
    assert backend.started[0].commands == [{"argv": [script, *kept, "--hidden_mse=0.0"], "output": ""}, export]


@pytest.mark.parametrize(
    ("script", "words"),
    [("sft_train.py", ["--seed=1"]), ("dpo_train.py", ["--lora_dropout=0.1"])],
)
def test_an_adapters_own_settings_are_not_passed_on(script, words):
    """They were taken with another value, and did nothing; DPO's dropout of 0 does."""
    kept = ["--save_dir=run", "--student=s", "--data=rows.jsonl", "--init_adapter=a", *words]
    command = {"argv": [script, *kept, "--lora_r=4", "--lora_alpha=2"], "output": ""}
    assert as_taken_now(command)["argv"] == [script, *kept]
    broken = {"argv": [script, *kept, "--no_such_flag", "--lora_r=4"], "output": ""}
    assert as_taken_now(broken) == broken  # the script says what is wrong
