"""Jobs that go on: what of their inputs has to be there still, and what an earlier version has accepted."""

from __future__ import annotations

import json
import shutil

import pytest
from support.jobs_served import make_place
from support.openai_jobs import chats, in_process
from support.processes import wait_for

from common.jobs.backend import Device
from common.jobs.folder import JobFolder
from common.jobs.request import as_taken_now
from common.jobs.runner import Runner
from common.jobs.service import lost_inputs
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


@pytest.mark.parametrize("field", ["data", "eval_data", "student"])
def test_what_follows_a_training_is_to_find_what_it_reads(tmp_path, field):
    """The figures on the validation file are made of both files, and of the base under an adapter."""
    place = make_place(tmp_path)
    client, service = in_process(place)
    training, validation = (client.files.create(file=chats(4), purpose="fine-tune").id for _ in range(2))
    student = place / "student"
    created = client.fine_tuning.jobs.create(model=str(student), training_file=training, validation_file=validation)
    job_id = created.id.removeprefix("ftjob-")
    service.cancel(job_id)
    folder = JobFolder(service.jobs_dir / job_id)
    folder.artifacts.mkdir(parents=True)
    (folder.artifacts / "run.json").write_text('{"state": "done"}')
    (folder.artifacts / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(student)}))
    folder.write("worker.json", {"pid": 1, "finished": 1})
    if field == "student":
        shutil.move(student, place / "moved")
    else:
        client.files.delete({"data": training, "eval_data": validation}[field])
    with pytest.raises(Problem, match=f"409: {field}: .* is not there any more"):
        service.resume(job_id)
    folder.write("worker.json", {"pid": 1, "finished": 2})  # which leaves the publication
    assert service.resume(job_id).state == QUEUED


def test_an_export_is_to_find_its_model_alone(tmp_path):
    """Which is whole, or an adapter on its base; the rows of its proof were found before the training."""
    place = make_place(tmp_path)
    service = in_process(place)[1]
    rows, student = place / "rows-3.jsonl", place / "student"
    shutil.copy(place / "quick.jsonl", rows)
    body = {"method": "sft", "max_steps": 3, "student": str(student), "data": str(rows), "export_onnx": True}
    job = service.submit(body, None)
    folder = service.folder(job)
    folder.artifacts.mkdir(parents=True)
    (folder.artifacts / "run.json").write_text('{"state": "done"}')
    folder.write("worker.json", {"pid": 1, "finished": 2})
    rows.unlink()
    shutil.move(student, place / "moved")
    assert lost_inputs(job.commands) == {"student": str(student), "data": str(rows)}
    assert lost_inputs(job.commands, folder) == {}
    (folder.artifacts / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(student)}))
    assert lost_inputs(job.commands, folder) == {"student": str(student)}
    folder.write("worker.json", {"pid": 1, "finished": 0})
    assert lost_inputs(job.commands, folder).keys() == {"student", "data"}


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


@pytest.mark.parametrize("script", ["sft_train.py", "dpo_train.py"])
def test_an_adapter_s_own_settings_are_passed_on(tmp_path, script):
    """Others were taken, and did nothing; DPO's dropout of 0 does, and is what it has without the flag."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}')
    kept = ["--save_dir=run", "--student=s", "--data=rows.jsonl", f"--init_adapter={tmp_path}", "--seed=1"]

    def taken(*words: str) -> list[str]:
        return as_taken_now({"argv": [script, *kept, *words], "output": ""})["argv"][1 + len(kept) :]

    assert taken("--lora_r=4", "--lora_alpha=2", "--lora_dropout=0.1") == [
        "--lora_r=8", "--lora_alpha=16", "--lora_dropout=0.05"]  # fmt: skip
    assert taken("--lora_dropout=0.0") == [f"--lora_dropout={'0.0' if script == 'dpo_train.py' else '0.05'}"]
    assert taken() == []
    assert taken("--no_such_flag", "--lora_r=4") == ["--no_such_flag", "--lora_r=4"]  # the script says what is wrong
    (tmp_path / "adapter_config.json").write_text("{}")
    assert taken("--lora_r=4") == []
