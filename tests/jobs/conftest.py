"""Fixtures of the job service's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.jobs_served import Process, make_place, serve_jobs

from common.jobs import local_backend


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


@pytest.fixture
def process(tmp_path) -> Iterator[Process]:
    """A job service in a process of its own, which a test may kill; its jobs end with the test."""
    running = Process(make_place(tmp_path))
    running.start()
    yield running
    running.kill()
    for folder in running.jobs.iterdir():
        local_backend.kill_marked(folder.name)
