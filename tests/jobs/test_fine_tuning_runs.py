"""Fine-tuning jobs that are run by stand-ins for the trainers: to the model and its figures, whatever is killed."""

from __future__ import annotations

import csv
import shutil

import pytest
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent
from support.jobs_served import make_place, serve_jobs
from support.openai_jobs import chats, of_server, until
from support.processes import wait_for

from common.jobs import local_backend
from common.serving.run_registry import Registry

pytestmark = pytest.mark.processes


def submit(client, place, **how):
    training = client.files.create(file=chats(1, how), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=str(place / "student"), training_file=training.id, suffix="x")


def test_from_a_file_to_a_model_and_its_curves(tmp_path):
    place = make_place(tmp_path)
    with serve_jobs(place) as served:
        client = of_server(served.url)
        created = submit(client, place, seconds=0.2)
        path = f"/fine_tuning/jobs/{created.id}/events"
        events = client.get(path, cast_to=FineTuningJobEvent, stream=True, stream_cls=Stream[FineTuningJobEvent],
                            options={"params": {"stream": True}})  # fmt: skip
        streamed = list(events)
        done = until(client, created.id)
        assert done.status == "succeeded"
        name = done.fine_tuned_model
        assert name == f"ft-student-x-{created.id.removeprefix('ftjob-')}"
        assert streamed == list(client.fine_tuning.jobs.list_events(created.id))[::-1]
        assert [event.message for event in streamed][-2:] == [
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]
        assert "Step 3/3: training loss=2.0000" in [event.message for event in streamed]
        (results,) = done.result_files
        assert client.files.retrieve(results).purpose == "fine-tune-results"
        curve = list(csv.DictReader(client.files.content(results).text.splitlines()))
        assert [(line["step"], line["train_loss"]) for line in curve] == [
            ("1", "2.6667"),
            ("2", "2.3333"),
            ("3", "2.0"),
        ]
        (last,) = client.fine_tuning.jobs.checkpoints.list(created.id)
        assert (last.fine_tuned_model_checkpoint, last.step_number, last.metrics.train_loss) == (name, 3, 2.0)
        run = tmp_path / "runs" / name
        weights = served.artifacts(created.id.removeprefix("ftjob-")) / "model.safetensors"
        assert weights.samefile(run / "model.safetensors")
        assert Registry(str(tmp_path / "runs"), None).names() == [name]  # and nothing half built
        status = served.ask("GET", f"/status/{created.id.removeprefix('ftjob-')}")[1]
        assert (status["method"], status["request"]["student"]) == ("sft", str(place / "student"))  # one job, two views
        served.ask("DELETE", f"/jobs/{created.id.removeprefix('ftjob-')}")
        assert (run / "model.safetensors").is_file()  # it outlives its job


def test_a_job_is_paused_and_goes_on(tmp_path):
    place = make_place(tmp_path)
    with serve_jobs(place) as served:
        client = of_server(served.url)
        job = submit(client, place, seconds=0.5)
        steps = served.artifacts(job.id.removeprefix("ftjob-")) / "steps.txt"
        wait_for(steps.exists)
        assert client.fine_tuning.jobs.pause(job.id).status == "pausing"
        paused = until(client, job.id, "paused")
        assert (paused.finished_at, paused.fine_tuned_model) == (None, None)
        assert client.fine_tuning.jobs.list_events(job.id).data[0].message == "The job is paused"
        assert client.fine_tuning.jobs.resume(job.id).status == "queued"
        assert until(client, job.id).status == "succeeded"
        assert steps.read_text().split() == ["1", "2", "3"]
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert any(message.startswith("Fine-tuning job goes on from step") for message in messages)


@pytest.mark.parametrize("lost", ["server", "server and worker", "server and table"])
def test_a_killed_service_finds_its_fine_tuning_job_again(process, lost):
    client = of_server(f"http://127.0.0.1:{process.port}")
    key = {"Idempotency-Key": "once"}
    training = client.files.create(file=chats(1, {"seconds": 1}), purpose="fine-tune")
    given = {"model": str(process.data / "student"), "training_file": training.id, "metadata": {"a": "b"}}
    job = client.fine_tuning.jobs.create(**given, extra_headers=key)
    own_id = job.id.removeprefix("ftjob-")
    wait_for((process.artifacts(own_id) / "steps.txt").exists)
    process.kill()
    if lost == "server and worker":
        local_backend.kill_marked(own_id)
    if lost == "server and table":
        for file in process.data.glob("jobs.db*"):
            file.unlink()
    process.start()
    assert client.fine_tuning.jobs.create(**given, extra_headers=key).id == job.id
    done = until(client, job.id)
    assert done.status == "succeeded"
    assert (done.training_file, done.metadata, done.seed) == (training.id, {"a": "b"}, job.seed)
    assert [entry.id for entry in client.fine_tuning.jobs.list()] == [job.id]
    assert (process.artifacts(own_id) / "ends.txt").read_text() == "end\n"
    assert (process.data.parent / "runs" / done.fine_tuned_model / "model.safetensors").is_file()
    assert client.files.content(done.result_files[0]).text.startswith("step,train_loss")


def test_what_a_publication_was_killed_in_is_made_again(tmp_path):
    place = make_place(tmp_path)
    with serve_jobs(place) as served:
        client = of_server(served.url)
        job = submit(client, place, fail_at=2)
        assert until(client, job.id).status == "failed"
        half = tmp_path / "runs" / f".ft-student-x-{job.id.removeprefix('ftjob-')}.building"
        half.mkdir(parents=True)
        (half / "half").touch()
        client.fine_tuning.jobs.resume(job.id)
        done = until(client, job.id)
        assert done.status == "succeeded"
        assert not half.exists()
        run = tmp_path / "runs" / done.fine_tuned_model
        assert not (run / "half").exists()
        shutil.rmtree(run)
