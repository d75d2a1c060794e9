"""OpenAI's fine-tuning jobs by its own client: what is asked for becomes a job of the service, and is shown as theirs.

No job is run here; those that are, are in test_fine_tuning_runs.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
from openai import NotFoundError, UnprocessableEntityError
from support.jobs_served import make_place
from support.openai_jobs import chats, in_process, preferences

from common.jobs import fine_tuning, fine_tuning_view, publication, published
from common.jobs.backend import Device
from common.jobs.folder import JobFolder
from common.serving import run_registry
from common.training.settings import TrainSettings
from common.vram.formulas import predict
from common.vram.model_shape import QWEN_3B


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def flags_of(job) -> dict[str, str]:
    words = [word for word in job.commands[0]["argv"] if word.startswith("--")]
    return dict(word[2:].split("=", 1) for word in words)


def stored(service, job):
    return service.find(job.id.removeprefix("ftjob-"))


def test_a_supervised_job(place):
    client, service = in_process(place)
    training = client.files.create(file=chats(40), purpose="fine-tune")
    validation = client.files.create(file=chats(5), purpose="fine-tune")
    hyper = {"batch_size": 8, "learning_rate_multiplier": 0.5, "n_epochs": 2}
    job = client.fine_tuning.jobs.create(
        model=str(place / "student"),
        training_file=training.id,
        validation_file=validation.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
        seed=7,
        suffix="My tickets!",
        metadata={"team": "support"},
    )
    assert (job.object, job.status, job.fine_tuned_model, job.error) == ("fine_tuning.job", "queued", None, None)
    assert job.method.supervised.hyperparameters.model_dump() == hyper == job.hyperparameters.model_dump()
    assert (job.seed, job.metadata, job.result_files) == (7, {"team": "support"}, [])
    assert (job.training_file, job.validation_file) == (training.id, validation.id)
    assert (job.model, job.finished_at, job.trained_tokens) == (str(place / "student"), None, None)
    flags = flags_of(stored(service, job))
    assert (float(flags["learning_rate"]), float(flags["epochs"]), flags["seed"]) == (1e-4, 2, "7")
    assert int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"]) == 8
    assert flags["save_steps"] == "5"  # an epoch
    names = [command["argv"][1] for command in stored(service, job).commands[1:]]
    assert names == ["common.jobs.validation", "common.jobs.publication"]
    name = fine_tuning.model_name(str(place / "student"), "My tickets!", job.id.removeprefix("ftjob-"))
    assert name == f"ft-student-My-tickets-{job.id.removeprefix('ftjob-')}"
    assert f"--name={name}" in stored(service, job).commands[-1]["argv"]
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    with pytest.raises(NotFoundError, match="no such fine-tuning job"):
        client.fine_tuning.jobs.retrieve("ftjob-" + "0" * 16)


def test_a_checkpoint_s_name_is_one_that_is_served():
    for suffix, base in (("s" * 64, 27), ("s" * 9, 40), (None, 40)):
        name = fine_tuning.model_name("b" * 60, suffix, "0" * 16)
        assert name == "-".join(["ft", "b" * base, *([suffix] if suffix else []), "0" * 16])
        assert run_registry.NAME.fullmatch(f"{name}{published.STEP}{10**9}")


def test_a_model_is_named_as_its_job_named_it(place):
    """An earlier version bounded a name elsewhere; of a job without a publication it is made of what was asked for."""
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    asked = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training, suffix="s" * 64)
    job = stored(service, asked)
    name = fine_tuning_view.name_of(job)
    assert name == fine_tuning.model_name(str(place / "student"), "s" * 64, job.id)
    *others, last = job.commands
    words = ["--name=ft-longer" if word.startswith("--name=") else word for word in last["argv"]]
    assert fine_tuning_view.name_of(dataclasses.replace(job, commands=[*others, last | {"argv": words}])) == "ft-longer"
    assert fine_tuning_view.name_of(dataclasses.replace(job, commands=others)) == name


def test_a_dpo_job(place):
    client, service = in_process(place)
    training = client.files.create(file=preferences(4), purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": "auto"}}}
    job = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training.id, method=method)
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.3)
    flags = flags_of(stored(service, job))
    assert (flags["beta"], float(flags["epochs"]), float(flags["learning_rate"])) == ("0.3", 25, 5e-5)
    assert stored(service, job).commands[0]["argv"][0].endswith("dpo_train.py")
    with pytest.raises(UnprocessableEntityError, match="training_file: the file has preferences, for the method dpo"):
        client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training.id)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(10, 10, 1), (40, 3, 2), (1000, 3, 16), (10_000, 2, 16), (90_000, 1, 16)]
)
def test_what_auto_stands_for(rows, epochs, batch):
    chosen = fine_tuning.chosen(fine_tuning.DpoHyperparameters(batch_size="auto"), rows, dpo=False)
    assert chosen == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}


def test_a_job_is_taken_in_the_largest_pass_that_fits(place, monkeypatch):
    """Smaller passes, then checkpointed ones; what would need another length or 4 bits is /distill's to say."""
    (place / "student" / "config.json").write_text(json.dumps(QWEN_3B))
    client, service = in_process(place)
    training = client.files.create(file=chats(40), purpose="fine-tune").id
    given = {"model": str(place / "student"), "training_file": training, "hyperparameters": {"batch_size": 8}}

    def taken(free: int) -> tuple[str, str | None]:
        service.runner.backend.device = Device(False, free)
        flags = flags_of(stored(service, client.fine_tuning.jobs.create(**given)))
        return flags["per_device_train_batch_size"], flags.get("gradient_checkpointing")

    def needed(batch: int, checkpointing: str) -> int:
        settings = TrainSettings(
            student=given["model"],
            save_dir="-",
            per_device_train_batch_size=batch,
            gradient_checkpointing=checkpointing,
        )
        return predict(settings.plan(cuda=False)).total

    assert taken(needed(4, "off")) == ("4", None)
    assert taken(needed(1, "off")) == ("1", None)
    assert taken(needed(4, "on")) == ("4", "on")
    assert taken(needed(1, "on")) == ("1", "on")
    with pytest.raises(UnprocessableEntityError, match=r"model: about .* fit with .*on.*, through POST /distill") as no:
        taken(needed(1, "on") - 1)
    assert no.value.param == "model" and "--" not in no.value.message


def test_what_cannot_be_is_refused_by_openais_names(place):
    client, _ = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    student = str(place / "student")
    refusals = [
        ("model", "/etc", "model: there is no model '/etc' under the allowed folders (ALLOWED_ROOTS)"),
        ("training_file", "file-x", "training_file: there is no file 'file-x'"),
        ("validation_file", "file-x", "validation_file: there is no file"),
        ("seed", -1, "seed: "),
        ("suffix", "x" * 65, "suffix: "),
        ("integrations", [{"type": "wandb"}], "integrations: there are none"),
        ("extra_body", {"extra_body": 1}, "extra_body: "),
    ]
    for name, value, message in refusals:
        given = {"model": student, "training_file": training} | {name: value}
        with pytest.raises(UnprocessableEntityError, match=re.escape(message)) as refused:
            client.fine_tuning.jobs.create(**given)
        assert refused.value.param == name
    with pytest.raises(UnprocessableEntityError, match="reinforcement is not available"):
        client.fine_tuning.jobs.create(model=student, training_file=training, method={"type": "reinforcement"})
    with pytest.raises(UnprocessableEntityError, match="n_epochs"):
        client.fine_tuning.jobs.create(model=student, training_file=training, hyperparameters={"n_epochs": 1000})
    assert client.fine_tuning.jobs.list().data == []


def test_the_same_key_gives_the_same_job(place):
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    key, given = {"Idempotency-Key": "7"}, {"model": str(place / "student"), "training_file": training}
    first = client.fine_tuning.jobs.create(**given, extra_headers=key)
    assert first.seed == client.fine_tuning.jobs.retrieve(first.id).seed  # generated, and kept
    assert client.fine_tuning.jobs.create(**given, extra_headers=key).id == first.id
    assert client.fine_tuning.jobs.create(**given).id != first.id
    with pytest.raises(UnprocessableEntityError, match="used for another request"):
        client.fine_tuning.jobs.create(**given, seed=1, extra_headers=key)
    assert len(service.store.page(10)) == 2


def test_pages_and_metadata(place):
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    given = {"model": str(place / "student"), "training_file": training}
    ids = [client.fine_tuning.jobs.create(**given, metadata={"n": str(n % 2)}).id for n in range(5)]
    plain = client.fine_tuning.jobs.create(**given).id
    service.submit({"method": "sft", "student": given["model"], "data": training}, None)  # none of OpenAI's
    jobs = client.fine_tuning.jobs
    assert [job.id for job in jobs.list(limit=2)] == [plain, *reversed(ids)]  # three pages
    assert [job.id for job in jobs.list(metadata={"n": "1"})] == [ids[3], ids[1]]
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [plain]
    assert jobs.list(metadata={"n": "9"}).data == []
    assert [job.id for job in jobs.list(after=ids[1], limit=5)] == [ids[0]]
    with pytest.raises(NotFoundError):
        jobs.list(after="ftjob-" + "0" * 16)


def test_pause_resume_cancel(place):
    client, _ = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training)
    jobs = client.fine_tuning.jobs
    assert [ask(job.id).status for ask in (jobs.pause, jobs.resume, jobs.cancel)] == ["paused", "queued", "cancelled"]
    assert jobs.list_events(job.id).data[0].message == "The job was cancelled"
    assert jobs.retrieve(job.id).finished_at >= job.created_at


def test_an_event_stays_when_the_job_is_resumed(place):
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training)
    jobs = client.fine_tuning.jobs
    seen = []

    def check(message: str) -> None:
        """The events are those from before, and one more."""
        events = [(event.id, event.message) for event in reversed(jobs.list_events(job.id).data)]
        assert (events[: len(seen)], [text for _, text in events[len(seen) :]]) == (seen, [message] if message else [])
        seen[:] = events

    check(f"Created fine-tuning job: {job.id}")
    for _ in range(2):  # twice in one attempt
        jobs.pause(job.id)
        check("The job is paused")
        jobs.resume(job.id)
        check("")
    claimed = service.store.claim(0, "running")
    service.store.finish(claimed, "failed", {"reason": "no memory"}, [], 5)
    check("no memory")
    jobs.resume(job.id)
    jobs.cancel(job.id)
    check("The job was cancelled")
    assert len({event for event, _ in seen}) == len(seen)


def test_a_name_stands_for_a_base_and_a_run_is_gone_on_from(place):
    aliases = (("gpt-4o*", str(place / "student")), ("*", "/nowhere"))
    client, service = in_process(place, fine_tuning_models=aliases, allowed_roots=(place, place.parent / "runs"))
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="gpt-4o-mini-2024-07-18", training_file=training)
    assert job.model == str(place / "student")
    named = r"model: there is no model '/nowhere' .*; there are: \S+/student.*; these names stand for .*: gpt-4o\*, \*"
    with pytest.raises(UnprocessableEntityError, match=named):
        client.fine_tuning.jobs.create(model="davinci-002", training_file=training)
    long = "a" * 300  # no folder can be called so
    assert fine_tuning.base_of(long, (), place) == fine_tuning.Base(long)
    run = place.parent / "runs" / "ft-student-1"
    run.mkdir(parents=True)
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(place / "student")}))
    (run / "adapter_model.safetensors").write_bytes(b"")
    service.settings = dataclasses.replace(service.settings, fine_tuning_models=())
    job = client.fine_tuning.jobs.create(model="ft-student-1", training_file=training)
    flags = flags_of(stored(service, job))
    assert (flags["student"], flags["init_adapter"]) == (str(place / "student"), str(run))


def test_events_and_checkpoints_of_a_job_that_has_trained(place):
    """As a training and its last command leave them; an event keeps its id when others follow."""
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training)
    row = service.store.claim(0, "running")
    folder = JobFolder(service.jobs_dir / row.id)
    folder.artifacts.mkdir(parents=True)
    now = time.time()
    lines = [{}, {"loss": 2.5}, {"eval_loss": 2.25}, {"loss": float("nan")}]
    with open(folder.artifacts / "progress.jsonl", "w") as log:
        log.writelines(
            json.dumps({"step": n, "max_steps": 9, "time": now, **line}) + "\n" for n, line in enumerate(lines)
        )
    jobs = client.fine_tuning.jobs
    events = jobs.list_events(job.id).data
    assert [event.message for event in events] == [
        "Step 3/9: the loss is not finite",
        "Step 2/9: validation loss=2.2500",
        "Step 1/9: training loss=2.5000",
        "Fine-tuning job started",
        f"Created fine-tuning job: {job.id}",
    ]
    assert [event.level for event in events] == ["warn", "info", "info", "info", "info"]
    assert events[1].data == {"step": 2, "total_steps": 9, "valid_loss": 2.25}
    assert jobs.checkpoints.list(job.id).data == []
    interval = {"value": 2.0, "low": 1.0, "high": 3.0}
    folder.write("artifacts/validation.json", {"n": 5, "loss": interval, "token_accuracy": interval | {"value": 0.5}})
    name = f"ft-student-{row.id}"
    states = [{"step": 2, "model": name, "created": now}, {"step": 1, "model": f"{name}-step-1", "created": now}]
    runs = place.parent / "runs"
    folder.write("artifacts/published.json", {"model": name, "runs_dir": str(runs), "checkpoints": states})
    for state in states:
        publication.publish([], runs / state["model"], row.id)
    service.store.finish(row, "succeeded", None, [], 5)
    later = [event for event in jobs.list_events(job.id, limit=2)]  # pages of two
    assert later[3:] == events
    assert later[0].message == "The job has successfully completed"
    assert (
        later[2].message == "Validation on 5 rows: loss 2.0000 [1.0000, 3.0000], token accuracy 0.5000 [1.0000, 3.0000]"
    )
    last, first = jobs.checkpoints.list(job.id)
    assert (last.fine_tuned_model_checkpoint, last.step_number, last.metrics.full_valid_loss) == (name, 2, 2.0)
    assert (last.metrics.train_loss, last.metrics.valid_loss) == (2.5, 2.25)
    assert last.metrics.full_valid_mean_token_accuracy == 0.5
    assert (first.step_number, first.metrics.train_loss, first.metrics.valid_loss) == (1, 2.5, None)
    client.models.delete(f"{name}-step-1")
    assert [state.step_number for state in jobs.checkpoints.list(job.id)] == [2]
    done = jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.validation["n"]) == ("succeeded", name, 5)
    assert done.finished_at >= done.created_at


def test_why_it_failed(place):
    client, service = in_process(place)
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training)
    row = service.store.claim(0, "running")
    service.store.finish(row, "failed", {"reason": "no memory", "exit_code": 1, "log": []}, [], 5)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error.code, failed.error.message) == ("failed", "job_failed", "no memory")
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (event.level, event.message) == ("error", "no memory")
