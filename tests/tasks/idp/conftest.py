"""Data that the tests of document extraction share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.documents import SCHEMA

import idp_prepare


@pytest.fixture(scope="session")
def schema_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("schema") / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """What idp_prepare.py makes of 300 synthetic invoices."""
    folder = tmp_path_factory.mktemp("idp")
    idp_prepare.main(["--synthesize", "300", "--outdir", str(folder)])
    return folder
