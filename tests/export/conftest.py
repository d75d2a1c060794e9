"""A run to export, and rows to prove it on."""

from __future__ import annotations

import pytest
from support.exported import labelled_rows
from support.served import make_run

from common.models import loading as models
from common.models.source import ModelSource


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> str:
    """An adapter of random weights. Not to be changed."""
    return str(make_run(tmp_path_factory.mktemp("exported") / "creditmix_sft", base, seed=1))


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> str:
    return labelled_rows(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def torch_model(run):
    return models.load_for_inference(ModelSource(run, dtype="float32"))
