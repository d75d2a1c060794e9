"""The job service as a whole: key, prefix, limits, its description, its settings and its cards."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from support.fuzzing import try_every_operation
from support.jobs_served import make_place, serve_jobs, settings
from support.processes import wait_for

from common.cli import UserError
from common.jobs import local_backend
from common.jobs.backend import Device
from common.jobs.routes import create_app

pytestmark = pytest.mark.processes

SMI = """#!/bin/sh
# three cards, of which those of --id are asked for
case "$*" in *--id=*) ids=${*##*--id=} ;; *) ids=0,1,GPU-ab ;; esac
for id in $(echo $ids | tr , " "); do
    case $id in 0) echo 8188 ;; 1) echo 6144 ;; GPU-ab) echo 4096 ;; *) exit 6 ;; esac
done
"""


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
    tried = try_every_operation(served.url, tmp_path)  # every generated job is refused: its student is nowhere
    assert tried >= {"/distill", "/jobs", "/status/{job_id}", "/events/{job_id}", "/download/{job_id}/{path}"}


def test_settings_from_the_environment(monkeypatch, tmp_path):
    from common.jobs.service import ROOT, JobServiceSettings

    for name in ("API_KEY", "DATA_DIR", "ALLOWED_ROOTS"):
        monkeypatch.delenv(name, raising=False)
    chosen = JobServiceSettings.from_environment()
    assert chosen.allowed_roots == (ROOT / "runs", ROOT / "data", ROOT / "models", chosen.data_dir)
    monkeypatch.setenv("ALLOWED_ROOTS", f"{tmp_path}{os.pathsep}/models")
    assert JobServiceSettings.from_environment().allowed_roots == (tmp_path, Path("/models"))
    for stray in (":{}", "{}:", "/models::{}"):  # nothing between two colons is no folder, least of all this one
        monkeypatch.setenv("ALLOWED_ROOTS", stray.format(tmp_path).replace(":", os.pathsep))
        assert set(JobServiceSettings.from_environment().allowed_roots) <= {tmp_path, Path("/models")}
    monkeypatch.setenv("ALLOWED_ROOTS", os.pathsep)
    with pytest.raises(UserError, match=r"ALLOWED_ROOTS=. names no folder; set it to some"):
        JobServiceSettings.from_environment()
    monkeypatch.delenv("ALLOWED_ROOTS")
    for name, value in (("BACKEND", "slurm"), ("API_PREFIX", "x"), ("MAX_RUNNING", "0"), ("KEEP_DAYS", "soon")):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=name):
            JobServiceSettings.from_environment()
        monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    (tmp_path / "closed" / "jobs.db").mkdir(parents=True)  # for SQLite as a file that another user owns
    for folder, reason in (("file/data", "Not a directory"), ("closed", "unable to open database file")):
        place = tmp_path / folder
        message = f"DATA_DIR={place}: {reason}; choose another folder, or give it to user {os.getuid()}"
        with pytest.raises(UserError, match=re.escape(message)):
            create_app(settings(place))


def test_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert local_backend.find_cards() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert local_backend.find_cards() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert local_backend.find_cards() == ["8188", "6144", "4096"]
    assert local_backend.find_device(["0", "1"]) == Device(True, 6144 << 20)
    assert local_backend.find_device(["0"]) == Device(True, 8188 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab, 0")
    assert local_backend.find_device(local_backend.find_cards()) == Device(True, 4096 << 20)
    assert local_backend.find_device(["9"]) == Device(True, None)  # a name that nvidia-smi does not know
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    assert local_backend.find_cards() == []
    assert local_backend.find_device(["0"]) == Device(True, None)
    here = local_backend.find_device([])
    assert not here.cuda
    assert 1 << 28 < here.size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_each_job_has_a_card_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with serve_jobs(make_place(tmp_path), max_running=None) as served:
        ids = [served.submit("slow", max_steps=40) for _ in range(3)]
        for job_id in ids:
            served.until(job_id)
        used = [
            json.loads((served.artifacts(job_id) / "run.json").read_text())["environment"]["CUDA_VISIBLE_DEVICES"]
            for job_id in ids
        ]
    assert used[:2] == ["4", "5"]
    assert used[2] in ("4", "5")


def test_native_windows_is_told_of_wsl(tmp_path, monkeypatch):
    monkeypatch.setattr("common.jobs.folder.fcntl", None)
    with pytest.raises(UserError, match="run the job service in WSL"):
        create_app(settings(tmp_path))
