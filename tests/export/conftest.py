"""A run to export, and rows to prove it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock
from support.exported import export_run, labelled_rows
from support.served import make_run

from common.export import parity
from common.models import loading as models
from common.models.source import ModelSource


@pytest.fixture(autouse=True)
def short_proof(monkeypatch) -> None:
    """A proof writes four short answers and times one; `monkeypatch.undo()` makes it as long as it is."""
    for name, value in (("PROMPTS", 4), ("TOKENS", 12)):
        monkeypatch.setattr(parity, f"GENERATED_{name}", value)
    for name, value in (("PROMPTS", 1), ("TOKENS", 8)):
        monkeypatch.setattr(parity, f"TIMED_{name}", value)


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> str:
    """An adapter of random weights. Not to be changed."""
    return str(make_run(tmp_path_factory.mktemp("exported") / "creditmix_sft", base, seed=1))


@pytest.fixture(scope="session")
def dev(tmp_path_factory) -> str:
    return labelled_rows(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="session")
def torch_model(run):
    return models.load_for_inference(ModelSource(run, dtype="float32"))


@pytest.fixture(scope="session")
def onnx(run, dev, tmp_path_factory) -> Path:
    """The run as ONNX in float32, made once for all workers, since it takes seconds. Not to be changed."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its folder lies in that of all workers
        shared = shared.parent
    with FileLock(shared / "onnx.lock"):
        if not (shared / "onnx").is_dir():
            made = tmp_path_factory.mktemp("exports")
            export_run(run, "onnx", made / "out", dev)
            made.rename(shared / "onnx")
    return shared / "onnx" / "out"
