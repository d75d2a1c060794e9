"""A student whose unsure answers are handed on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.served import make_run


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "student", base, seed=1)


@pytest.fixture
def student(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs" / "student"))
