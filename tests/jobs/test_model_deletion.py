"""Models of fine-tuning jobs are deleted by OpenAI's client: whole ones, of jobs, that nothing needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from openai import APIStatusError
from support.jobs_served import make_place, settings
from support.openai_jobs import chats, in_process

from common.jobs.routes import create_app
from common.serving.run_registry import Registry

JOB, OTHER = "0" * 16, "1" * 16


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def published(place: Path, name: str, job_id: str | None = JOB, base: str | None = None) -> Path:
    """A run as a job leaves it: a whole model, or an adapter on a base."""
    run = place.parent / "runs" / name
    run.mkdir(parents=True)
    config = {"base_model_name_or_path": base} if base else {}
    (run / ("adapter_config.json" if base else "config.json")).write_text(json.dumps(config))
    (run / ("adapter_model.safetensors" if base else "model.safetensors")).touch()
    if job_id:
        (run / "owner.json").write_text(json.dumps({"job_id": job_id}))
    return run


def names(place: Path) -> list[str]:
    """What is served."""
    return Registry(str(place.parent / "runs"), None).names()


def refused(client, name: str, status: int) -> str:
    with pytest.raises(APIStatusError) as error:
        client.models.delete(name)
    assert (error.value.status_code, error.value.body["param"]) == (status, "model")
    return error.value.body["message"]


def test_a_model_goes_with_its_steps(place):
    for name in ("ft-a", "ft-a-step-4", "ft-a-step-12", "ft-a-2", "ft-a-step-x"):
        published(place, name)
    published(place, "ft-a-step-9", OTHER)
    client, _ = in_process(place)
    assert client.models.delete("ft-a-step-4").to_dict() == {"id": "ft-a-step-4", "object": "model", "deleted": True}
    assert names(place) == ["ft-a", "ft-a-2", "ft-a-step-12", "ft-a-step-9", "ft-a-step-x"]
    client.models.delete("ft-a")
    assert sorted(path.name for path in (place.parent / "runs").iterdir()) == ["ft-a-2", "ft-a-step-9", "ft-a-step-x"]
    assert refused(client, "ft-a", 404) == "there is no model 'ft-a'; GET /v1/models lists those there are"


def test_what_no_job_has_made_is_left_alone(place):
    own = published(place, "mine", None)
    (place.parent / "runs" / "link").symlink_to(published(place, "ft-a"))
    client, _ = in_process(place)
    assert (
        refused(client, "mine", 403) == f"mine was not made by a job of this service; delete its folder, {own}, by hand"
    )
    refused(client, "link", 403)
    for name in ("ft:gpt-4o:me::1", ".ft-a.deleted", "x" * 300, "%2e%2e"):
        refused(client, name, 404)
    assert names(place) == ["ft-a", "link", "mine"]


def test_what_is_needed_is_not_deleted(place):
    run = published(place, "ft-a")
    published(place, "ft-a-step-4")
    published(place, "on-it", None, base=f"{run}-step-4")
    client, service = in_process(place, allowed_roots=(place, place.parent / "runs"))
    sentence = "the model on-it stands on ft-a-step-4; delete that first"
    assert refused(client, "ft-a", 409) == sentence
    shutil.rmtree(run.with_name("on-it"))
    training = client.files.create(file=chats(4), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="ft-a", training_file=training)
    own_id = job.id.removeprefix("ftjob-")
    needed = f"the job {own_id}, which is queued, needs ft-a; cancel that first"
    assert refused(client, "ft-a", 409) == needed
    published(place, "ft", OTHER)  # the beginning of a name is not the name
    client.models.delete("ft")
    published(place, "ft-b", own_id)
    assert refused(client, "ft-b", 409) == f"the job {own_id}, which makes it, is queued; cancel that first"
    service.cancel(own_id)
    for name in ("ft-a", "ft-b"):
        client.models.delete(name)
    assert names(place) == []


def test_what_the_adapter_of_a_job_without_a_name_stands_on_is_not_deleted(place):
    """It is served by no name; a whole model, and a broken one, stand on nothing."""
    run = published(place, "ft-a")
    client, service = in_process(place)
    for job_id, config in ((OTHER, json.dumps({"base_model_name_or_path": str(run)})), ("2" * 16, "{"), ("3" * 16, "")):
        artifacts = service.jobs_dir / job_id / "artifacts"
        artifacts.mkdir(parents=True)
        if config:
            (artifacts / "adapter_config.json").write_text(config)
    assert refused(client, "ft-a", 409) == f"the job {OTHER} stands on ft-a; delete that first"
    shutil.rmtree(service.jobs_dir / OTHER)
    client.models.delete("ft-a")
    assert names(place) == []


def test_a_kill_leaves_no_half_of_it(place, monkeypatch):
    published(place, "ft-a")

    def killed(*args, **how):
        raise KeyboardInterrupt

    _, service = in_process(place)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.jobs.published.shutil.rmtree", killed)
        service.delete_model("ft-a")
    assert names(place) == []
    assert len(list((place.parent / "runs").iterdir())) == 1
    in_process(place)  # the next start
    assert list((place.parent / "runs").iterdir()) == []


def test_the_key_is_asked_for(place):
    published(place, "ft-a")
    web = TestClient(create_app(settings(place, api_key="secret")), base_url="http://localhost")
    assert web.delete("/v1/models/ft-a").status_code == 401
    answer = web.delete("/v1/models/ft-a", headers={"Authorization": "Bearer secret"})
    assert (answer.status_code, answer.json()["deleted"]) == (200, True)
